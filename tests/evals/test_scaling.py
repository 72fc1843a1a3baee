"""Scaling laws: known ones are found again, noise widens intervals, runs resume, tables are checked."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from core_llm.data.packing import Packed
from core_llm.errors import DataError, UserError
from core_llm.model import Llama
from evals import scaling_plots, scaling_runs
from evals.cli_scaling import scaling
from evals.scaling import Run, Scaling, analyse, budgets_of, parabola, sigmoid
from evals.scaling_runs import (
    Plan,
    World,
    answer,
    flops_per_token,
    job,
    jobs,
    parameters,
    read_csv,
    shape_config,
)

BUDGETS = (1e18, 3e18, 1e19, 3e19, 1e20)
# Of the published fit, approach 3 (Hoffmann et al. 2022): L = 1.69 + 406.4 / N^0.34 + 410.7 / D^0.28.
_A, _B, _E, _ALPHA, _BETA = 406.4, 410.7, 1.69, 0.34, 0.28


def published(noise: float = 0.0, seed: int = 0, held_out: float = 4e20) -> list[Run]:
    rng = np.random.default_rng(seed)
    found = []
    for budget in (*BUDGETS, held_out):
        best = best_size(budget)
        for factor in (1.0,) if budget == held_out else (0.4, 0.6, 0.8, 1.0, 1.25, 1.7, 2.5):
            size = best * factor
            tokens = budget / (6 * size)
            loss = _E + _A / size**_ALPHA + _B / tokens**_BETA + rng.normal(0, noise)
            nll = 0.5 * budget**-0.05 * (loss / (_E + _A / best**_ALPHA + _B / (budget / 6 / best) ** _BETA))
            accuracy = 0.25 + 0.75 / (1 + math.exp(60 * (nll - 0.06)))
            found.append(Run(f"{budget:g} {size:g}", budget, budget, size, tokens, loss, nll, accuracy, 1000))
    return found


def best_size(budget: float) -> float:
    """The minimum in closed form (Hoffmann et al. 2022, equation 4)."""
    g = (_ALPHA * _A / (_BETA * _B)) ** (1 / (_ALPHA + _BETA))
    return g * (budget / 6) ** (_BETA / (_ALPHA + _BETA))


def test_published_law_gives_its_own_exponent_and_predicts_the_held_out_run() -> None:
    found = analyse(published(noise=0.002))
    expected = _BETA / (_ALPHA + _BETA)
    assert found.exponent.value == pytest.approx(expected, abs=0.04)
    assert found.exponent.low < expected < found.exponent.high
    assert found.size.at(1e19) == pytest.approx(best_size(1e19), rel=0.15)
    assert found.held_out is not None and found.held_out.budget == 4e20
    checks = {check.name.split(",")[0]: check for check in found.checks}
    assert set(checks) == {"held-out loss", "negative log-likelihood of right answers", "accuracy"}
    score = checks["accuracy"]
    assert score.predicted.value == pytest.approx(score.measured, abs=0.02) and score.inside
    assert score.measured_interval is not None and score.measured_interval[0] < score.measured


def test_more_noise_means_wider_intervals_and_the_seed_decides() -> None:
    quiet, loud = analyse(published(noise=0.001)), analyse(published(noise=0.01))
    assert loud.exponent.high - loud.exponent.low > 2 * (quiet.exponent.high - quiet.exponent.low)
    assert analyse(published(noise=0.001)).exponent == quiet.exponent


def test_held_out_budget_touches_no_fit_and_a_broken_law_is_seen() -> None:
    runs = published(noise=0.002)
    honest = analyse(runs)
    last = runs[-1]
    worse = Run(last.name, last.budget, last.compute, last.parameters, last.tokens, 3.5, 0.2, 0.26, 1000)
    broken = analyse([*runs[:-1], worse])
    assert (broken.exponent, broken.size, broken.nll, broken.sigmoid) == (
        honest.exponent, honest.size, honest.nll, honest.sigmoid,
    )  # fmt: skip
    assert not any(check.inside for check in broken.checks)
    assert "OUTSIDE" in "\n".join(scaling_plots.lines(broken))


def test_parabola_is_the_least_squares_one_and_knows_its_edges() -> None:
    runs = [Run("", 1.0, 1.0, math.exp(x), 1.0, 2 + 0.5 * (x - 3) ** 2) for x in (1, 2, 3, 4)]
    found = parabola(1.0, runs)
    assert found.best == pytest.approx(math.exp(3)) and found.loss == pytest.approx(2.0) and found.inside
    assert found.coefficients == pytest.approx((2 + 4.5, -3.0, 0.5))
    falling = [Run("", 1.0, 1.0, math.exp(x), 1.0, 2 + 0.1 * (x - 9) ** 2) for x in (1, 2, 3)]
    assert not parabola(1.0, falling).inside
    rising = [Run("", 1.0, 1.0, math.exp(x), 1.0, 2 - 0.1 * (x - 2) ** 2) for x in (1, 2, 3)]
    assert math.isnan(parabola(1.0, rising).best)


def test_sigmoid_finds_its_own_curve() -> None:
    x = np.linspace(0.2, 2, 25)
    runs = [Run("", 1, 1, 1, 1, 1, float(v), float(0.2 + 0.8 / (1 + math.exp(5 * (v - 0.9))))) for v in x]
    found = sigmoid(runs)
    assert (found.floor, found.steepness, found.middle) == pytest.approx((0.2, 5, 0.9), rel=1e-3)


def test_too_few_budgets_or_no_minimum_is_said() -> None:
    with pytest.raises(DataError, match="compute budgets have runs of 3 sizes"):
        analyse(published()[:14])
    straight = [
        Run("", b, b, n, 1.0, 3 - 0.1 * math.log(n) + 0.001 * math.log(n) ** 2)
        for b in BUDGETS
        for n in (10, 20, 30)
    ]
    with pytest.raises(DataError, match="add smaller or larger models"):
        analyse(straight)
    bare = [Run(r.name, r.budget, r.compute, r.parameters, r.tokens, r.loss) for r in published()]
    assert any("no score is predicted" in note for note in analyse(bare).notes)
    assert [len(group) for group in budgets_of(bare).values()] == [7, 7, 7, 7, 7, 1]


def test_count_of_parameters_and_flops_equals_the_model() -> None:
    config = shape_config(64, 3)
    model = Llama(config)
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)  # the head is the embedding
    assert parameters(config) == weights
    assert flops_per_token(config, 128) == 6 * weights + 6 * 3 * 128 * 64
    found = job(Plan(), 1e11, (64, 3))
    assert found.compute == pytest.approx(1e11, rel=0.03)
    with pytest.raises(UserError, match="needs 3"):
        jobs(Plan(budgets=(1e7, 1e8, 1e9)))
    with pytest.raises(UserError, match="larger than the budgets"):
        Plan(held_out=1e9)
    with pytest.raises(UserError, match="three or more"):
        Plan(budgets=(1e10, 1e9, 1e8))


SMALL = Plan(budgets=(2e8, 4e8, 8e8), held_out=1.6e9, shapes=((16, 1), (16, 2), (24, 1), (24, 2)), windows=2,
             width=64, fewest_steps=2, questions=8)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Run]]:
    folder = tmp_path_factory.mktemp("scaling")
    return folder, scaling_runs.train_all(SMALL, folder)


def test_runs_are_trained_once_and_the_held_out_one_is_larger(trained: tuple[Path, list[Run]]) -> None:
    folder, runs = trained
    assert (
        len(runs) == 13 and runs[-1].budget == 1.6e9 and runs[-1].compute > max(r.compute for r in runs[:-1])
    )
    written = (folder / "runs.jsonl").read_bytes()
    assert scaling_runs.train_all(SMALL, folder) == runs
    assert (folder / "runs.jsonl").read_bytes() == written
    (folder / "runs.jsonl").write_bytes(b"\n".join(written.split(b"\n")[:-2]) + b'\n{"key": "half')
    again = scaling_runs.train_all(SMALL, folder)
    assert again == runs and (folder / "runs.jsonl").read_bytes() == written
    assert not [path for path in folder.iterdir() if path.is_dir()]


def test_loss_falls_with_compute(trained: tuple[Path, list[Run]]) -> None:
    best = [min(run.loss for run in group) for group in budgets_of(trained[1]).values()]
    assert best == sorted(best, reverse=True)


def test_answers_equal_those_of_the_harness(tmp_path: Path) -> None:
    from core_llm.adapters import Assistant
    from evals.tasks import find
    from evals.tasks.base import Options

    world = World(SMALL, tmp_path)
    model = Llama(shape_config(16, 1)).initialise(0).eval()
    rows = find(["text-qa"])[0].load(Options())[: SMALL.questions]
    with torch.no_grad():
        nll, accuracy = answer(model, world.questions)
        expected = Assistant(model, world.tokenizer).loglikelihood(
            [r.messages for r in rows], [r.target for r in rows]
        )
    assert nll == pytest.approx(-sum(expected) / sum(len(row.target) for row in rows), rel=1e-4)
    assert accuracy == 0.0
    assert torch.equal(world.batch(3).tokens, World(SMALL, tmp_path).batch(3).tokens)
    assert not torch.equal(world.batch(3).tokens, world.batch(4).tokens)


def table(path: Path, runs: list[Run]) -> Path:
    rows = [
        f"{r.name},{r.budget},{r.parameters},{r.tokens},{r.loss},{r.nll},{r.accuracy},{r.questions}"
        for r in runs
    ]
    path.write_text("\n".join(["name,budget,parameters,tokens,loss,nll,accuracy,questions", *rows]) + "\n")
    return path


def test_command_writes_json_png_and_page_from_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = table(tmp_path / "runs.csv", published(noise=0.002))
    scaling(csv=source, output=tmp_path / "out")
    written = json.loads((tmp_path / "out" / "scaling.json").read_text())
    expected: Scaling = analyse(read_csv(source))
    assert written["optimal_size"]["exponent"]["value"] == pytest.approx(expected.exponent.value)
    assert len(written["runs"]) == 36 and written["provenance"]["seed"] == 0
    assert (tmp_path / "out" / "scaling.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "data:image/png;base64" in page and "best size" in page and "http" not in page
    assert "accuracy: predicted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parameters,loss\n1,2\n", "no column tokens"),
        ("", "no column parameters"),
        ("parameters,tokens,loss\n1,x,3\n", "line 2: tokens is 'x'"),
        ("parameters,tokens,loss\n1,-4,3\n", "line 2: tokens is -4"),
        ("parameters,tokens,loss,accuracy\n1,4,3,1.5\n", "accuracy is 1.5"),
        ("parameters,tokens,loss\n1,4,\n", "loss is missing"),
        ("parameters,tokens,loss\n1,4,nan\n", "loss is nan"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_csv(path)
    with pytest.raises(DataError, match="no readable table"):
        read_csv(tmp_path / "none.csv")


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    from core_llm.journal import Journal

    with Journal(tmp_path / "runs.jsonl"), pytest.raises(UserError, match="another run is writing.*--runs"):
        scaling_runs.train_all(SMALL, tmp_path)


def test_killed_run_goes_on_from_its_last_saved_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    each = job(SMALL, 4e8, (16, 2))
    whole = scaling_runs._trained(SMALL, each, World(SMALL, tmp_path), tmp_path)
    asked: list[int] = []

    class Killed(World):
        def batch(self, step: int) -> Packed:
            asked.append(step)
            if len(asked) == each.steps * 3 // 4:
                raise KeyboardInterrupt
            return super().batch(step)

    monkeypatch.setattr(scaling_runs, "_SAVE_EVERY", 5)
    with pytest.raises(KeyboardInterrupt):
        scaling_runs._trained(SMALL, each, Killed(SMALL, tmp_path), tmp_path)
    asked.clear()
    monkeypatch.setattr(Killed, "batch", lambda self, step: asked.append(step) or World.batch(self, step))
    assert scaling_runs._trained(SMALL, each, Killed(SMALL, tmp_path), tmp_path) == whole
    assert asked[0] > 0 and len(asked) < each.steps
