"""`guard evaluate`: rows that never leak, figures against scikit-learn, scores that are not asked twice."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as sk

from core_llm.chat import Message
from core_llm.errors import UserError
from guard.evaluation import baselines, report, rows, scoring
from guard.evaluation.measure import AFTER, BEFORE, MAJORITY, TFIDF, Scored, lucky_error, measure
from guard.evaluation.run import Evaluation, Settings, run
from guard.guard import Guard
from guard.verdict import Verdict

WORDS = ("bread", "circle", "river", "garden", "kitchen", "letter", "window", "mountain")


def write_rows(path: Path, n: int = 240, split: bool = False) -> Path:
    """Rows that a bag of words can tell apart, two per context."""
    lines = []
    for i in range(n):
        context = f"{WORDS[i // 2 % 8]} question {i // 2}"
        unsafe = i % 2
        value = {
            "context": context,
            "response": f"you are a {'horrible pig' if unsafe else 'lovely friend'} {WORDS[i % 8]}",
            "label": "unsafe" if unsafe else "safe",
        }
        if split:
            value["split"] = ("train", "validation", "test")[i // 2 % 3]
        lines.append(json.dumps(value))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_rows_of_one_context_never_part(tmp_path: Path) -> None:
    made = rows.own_set(write_rows(tmp_path / "own.jsonl"))
    test, validation = ({row.group for row in part} for part in (made.test, made.validation))
    assert test and validation and not test & validation
    assert 0.15 < len(made.validation) / 240 < 0.45
    again = rows.own_set(tmp_path / "own.jsonl")
    assert again.validation == made.validation


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("5", "no object"),
        ('{"text": "x"}', "no object"),
        ('{"text": "x", "label": 2}', "must be 0, 1"),
        ('{"text": "x", "label": []}', "must be 0, 1"),
        ('{"label": 1}', "neither text"),
        ('{"text": " ", "label": 1}', "no text to judge"),
        ('{"text": "x", "label": 1, "split": "dev"}', "must be one of"),
        ('{"messages": [{"role": "boss", "content": "x"}], "label": 1}', "unknown role"),
        ('{"text": "fine", "label": 0, "split": "train"}', "another split"),
        ("{", "not JSON"),
    ],
)
def test_bad_row_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"text": "fine", "label": 0, "split": "test"}\n' + line + "\n")
    with pytest.raises(UserError, match="line 2.*" + says):
        rows.own_set(path)


def _measured(n: int = 300) -> tuple[rows.EvalSet, Scored]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, n)
    said = np.clip(0.4 * labels + rng.normal(0.3, 0.2, n), 0, 1)
    made = rows.EvalSet("made", "Made")
    made.test = [
        rows.Row(str(i), str(i), (Message("user", "x"),), int(label)) for i, label in enumerate(labels)
    ]
    return made, Scored(said, said >= 0.5)


def test_figures_equal_scikit_learn() -> None:
    made, guard = _measured()
    labels = [row.label for row in made.test]
    got = measure(made, {BEFORE: guard, MAJORITY: Scored(np.full(300, 0.4), np.zeros(300, bool))}, 200, 0)
    figures = got.figures[BEFORE]
    fpr, tpr, _ = sk.roc_curve(labels, guard.probability, drop_intermediate=False)
    expected = {
        "auprc": sk.average_precision_score(labels, guard.probability),
        "auroc": sk.roc_auc_score(labels, guard.probability),
        "f1": sk.f1_score(labels, guard.unsafe),
        "brier": sk.brier_score_loss(labels, guard.probability),
        "recall": sk.recall_score(labels, guard.unsafe),
        "recall_at_1_fpr": tpr[fpr <= 0.01].max(),
    }
    for name, value in expected.items():
        assert figures[name].value == pytest.approx(value, abs=1e-12), name
        assert figures[name].low <= value <= figures[name].high
    assert got.figures[MAJORITY]["auprc"].value == pytest.approx(np.mean(labels))
    lead = got.differences[MAJORITY]["auprc"]
    assert lead.value == pytest.approx(expected["auprc"] - np.mean(labels)) and lead.low > 0
    assert got.no_evidence == []


def test_a_guard_that_guesses_has_no_evidence() -> None:
    made, _ = _measured()
    guess = np.random.default_rng(5).random(300)
    got = measure(
        made, {BEFORE: Scored(guess, guess > 0.5), MAJORITY: Scored(np.full(300, 0.5), np.ones(300, bool))},
        500, 0,
    )  # fmt: skip
    assert got.no_evidence == [MAJORITY]


def test_calibration_error_by_chance_covers_a_calibrated_guard_and_not_another() -> None:
    rng = np.random.default_rng(1)
    said = rng.random(500)
    luck = lucky_error(said, 0)
    errors = []
    for labels in ((rng.random(500) < said).astype(int), (rng.random(500) < said**3).astype(int)):
        made = rows.EvalSet("made", "Made")
        made.test = [rows.Row(str(i), str(i), (Message("user", "x"),), int(y)) for i, y in enumerate(labels)]
        errors.append(measure(made, {BEFORE: Scored(said, said > 0.5)}, 100, 0).figures[BEFORE]["ece"].value)
    assert luck.low <= errors[0] <= luck.high < errors[1]


def test_set_of_one_kind_has_only_the_figure_that_it_can_have() -> None:
    made = rows.EvalSet("made", "Made")
    made.test = [rows.Row(str(i), str(i), (Message("user", "x"),), 1) for i in range(9)]
    got = measure(made, {BEFORE: Scored(np.full(9, 0.7), np.ones(9, bool))}, 100, 0)
    assert list(got.figures[BEFORE]) == ["recall"] and got.luck is None and not got.bins


def test_baseline_without_train_rows_never_sees_its_own_row(tmp_path: Path) -> None:
    made = rows.own_set(write_rows(tmp_path / "own.jsonl"))
    seen: list[set[str]] = []

    def learner(train: Sequence[rows.Row], asked: Sequence[rows.Row]) -> np.ndarray:
        assert not {row.group for row in train} & {row.group for row in asked}
        seen.append({row.id for row in asked})
        return np.full(len(asked), 0.25)

    found, learnt = baselines.probabilities(learner, [], [], made.test, 100)
    assert (found == 0.25).all() and "out of fold" in learnt
    assert sum(map(len, seen)) == len(made.test) and len(seen) == baselines.FOLDS
    assert baselines.probabilities(baselines.tfidf, [], [], made.test, 100)[0] == pytest.approx(
        [row.label for row in made.test], abs=0.45
    )


def test_linear_head_learns_and_padding_changes_nothing(guard: Guard, tmp_path: Path) -> None:
    made = rows.own_set(write_rows(tmp_path / "own.jsonl", split=True))
    head = baselines.LinearHead(guard.core, guard.tokenizer)
    found = head(made.train, made.test)
    assert sk.roc_auc_score([row.label for row in made.test], found) > 0.95
    together = dict(head._known)
    head._known.clear()
    text = made.test[0].messages[-1].text
    head._embed([text])
    assert head._known[text] == pytest.approx(together[text], abs=1e-5)


def test_scores_are_asked_once_also_after_a_crash(tmp_path: Path) -> None:
    made = rows.own_set(write_rows(tmp_path / "own.jsonl", 40))
    asked: list[str] = []

    def judge(conversations: Sequence[Sequence[Message]]) -> list[Verdict]:
        if len(asked) >= 16:
            raise KeyboardInterrupt
        asked.extend(messages[-1].text + messages[0].text for messages in conversations)
        return [Verdict(False, len(messages[0].text) / 100, 1.0, {}) for messages in conversations]

    path = tmp_path / "scores.jsonl"
    with pytest.raises(KeyboardInterrupt):
        scoring.score(made.test, judge, "a", path, 8, "")
    path.write_bytes(path.read_bytes()[:-20])  # what a killed process leaves
    first, asked[:] = list(asked), []
    got = scoring.score(made.test[:24], judge, "a", path, 8, "")
    assert 1 <= len(asked) <= 24 - len(first) + 1 + 8
    assert [s.probability for s in got] == [len(row.messages[0].text) / 100 for row in made.test[:24]]
    asked.clear()
    scoring.score(made.test[:24], judge, "a", path, 8, "")
    assert not asked
    scoring.score(made.test[:8], judge, "another guard", path, 8, "")
    assert len(asked) == 8


def test_fingerprint_follows_weights_and_not_the_temperature(guard: Guard, tmp_path: Path) -> None:
    guard.save(tmp_path)
    before = scoring.fingerprint(tmp_path, "p")
    settings = json.loads((tmp_path / "guard.json").read_text())
    (tmp_path / "guard.json").write_text(json.dumps(settings | {"temperature": 2.0}))
    assert scoring.fingerprint(tmp_path, "p") == before != scoring.fingerprint(tmp_path, "q")
    (tmp_path / "guard.json").write_text(json.dumps(settings | {"window": 99}))
    assert scoring.fingerprint(tmp_path, "p") != before


def test_whole_run_writes_a_page_that_needs_nothing_else(
    guard: Guard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guard.save(tmp_path / "model")
    data, out = write_rows(tmp_path / "own.jsonl", 300, split=True), tmp_path / "out"
    settings = Settings(
        model=str(tmp_path / "model"), data=data, out=out, core=str(tmp_path / "model"), resamples=100
    )
    result = run(settings)
    (made,) = result.sets
    assert made.rows == 100 and result.validation == {"own": 100}
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r'(src|href)="(?!data:)', page)
    values = json.loads((out / "evaluation.json").read_text())
    figures = values["sets"]["own"]["classifiers"]
    assert set(figures) >= {BEFORE, MAJORITY, "TF-IDF regression", "linear head on core"}
    assert (out / "reliability_own.png").read_bytes()[:4] == b"\x89PNG"
    if result.fitted is not None:
        assert figures[AFTER]["auprc"] == figures[BEFORE]["auprc"]
    monkeypatch.setenv("COLUMNS", "80")
    capsys.readouterr()
    report.show(result)
    shown = capsys.readouterr().out.split("own:")[0]
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80
    for found in made.figures.values():
        assert f"({found['auprc'].low:.3f}–{found['auprc'].high:.3f})" in shown


def test_a_guard_that_ranks_worse_is_called_worse() -> None:
    made, good = _measured()
    bad = Scored(1 - good.probability, ~good.unsafe)
    got = measure(made, {BEFORE: bad, TFIDF: good}, 200, 0)
    result = Evaluation("g", 0.5, 1.0, None, [got], {})
    said = list(report.sentences(result))
    assert any("the guard ranks worse than TF-IDF regression (AUPRC -" in sentence for sentence in said)


def test_mistakes_are_told_before_any_work(guard: Guard, tmp_path: Path) -> None:
    guard.save(tmp_path / "model")
    (tmp_path / "other").mkdir()
    data = write_rows(tmp_path / "own.jsonl", 8)
    for wrong, says in (
        ({"sets": ("xyz",)}, "unknown set 'xyz'; known: diasafety"),
        ({"batch_size": 0}, "at least 1"),
        ({"resamples": 5}, "at least 100"),
        ({"limit": 0}, "at least 1"),
        ({"data_root": tmp_path / "nothing"}, "no such folder"),
        ({"data": tmp_path / "nothing"}, "not readable"),
        ({"data": data, "save": tmp_path / "other"}, "exists and is not --model"),
        ({"data": data, "out": data}, "not a folder"),
    ):
        values = {"model": str(tmp_path / "model"), "out": tmp_path / "out", "data": None} | wrong
        with pytest.raises(UserError, match=says):
            run(Settings(**values))
        assert not (tmp_path / "out").exists()
