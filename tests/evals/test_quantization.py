"""Quantised cores in the harness: nothing is mixed up, and costs are paired differences."""

import json
from pathlib import Path

import numpy as np
import pytest

from core_llm import stats
from core_llm.errors import UserError
from evals import quantization, results, run, runner
from evals.models import Subject
from evals.tasks import Options, find, registry


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_text_logits_of_a_quantised_core_are_bit_equal_with_adapters_attached(
    tiny_model: Path, tmp_path: Path, scheme: str
) -> None:
    subject = Subject(tiny_model, scheme)
    done = runner.evaluate(registry()["text-regression"], subject, Options(limit=8), tmp_path)
    assert len(subject.assistant.adapters) == 2
    assert {sample.kind for sample in done.samples} == {"text-only batch", "mixed batch"}
    assert done.scored.estimates["exact_match"].value == 1.0


def test_answers_of_one_form_are_never_taken_for_those_of_another(tiny_model: Path, tmp_path: Path) -> None:
    task = registry()["text-qa"]
    options = Options(limit=3)
    first = runner.evaluate(task, Subject(tiny_model), options, tmp_path)
    assert first.reused == 0
    assert runner.evaluate(task, Subject(tiny_model, "int4"), options, tmp_path).reused == 0
    assert runner.evaluate(task, Subject(tiny_model, "int8"), options, tmp_path).reused == 0
    again = runner.evaluate(task, Subject(tiny_model, "int4"), options, tmp_path)
    assert again.reused == 3
    assert runner.evaluate(task, Subject(tiny_model), options, tmp_path).outputs == first.outputs


def test_results_state_the_scheme(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    run.run_tasks(find(["text-qa"]), str(tiny_model), Options(limit=2), tmp_path, output, quantization="int8")
    provenance = results.read(output)[0]["provenance"]
    assert provenance["quantization"] == "int8" and provenance["model"].endswith("(int8)")


def test_task_for_the_guard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="guard-basics.*asks the guard, and --quantize is for the core"):
        run.run_tasks(find(["guard-basics"]), "nano", Options(limit=2), tmp_path, quantization="int8")


def test_comparison_asks_every_form_the_same_rows(tmp_path: Path) -> None:
    output = tmp_path / "costs.json"
    entries = quantization.compare(find(["text-qa"]), "nano", Options(limit=4), tmp_path / "records", output)
    assert json.loads(output.read_text()) == entries
    assert [e["provenance"]["quantization"] for e in entries] == [None, "int8", "int4", "fp8"]
    assert len({e["provenance"]["dataset_sha256"] for e in entries}) == 1
    plain, int8, int4, fp8 = (e["saved_bytes"] for e in entries)
    assert int4 < int8 < fp8 < plain
    assert entries[0]["difference"] == {}
    for entry in entries[1:]:
        change = entry["metrics"]["exact_match"]["value"] - entries[0]["metrics"]["exact_match"]["value"]
        assert entry["difference"]["exact_match"]["value"] == pytest.approx(change)


def test_paired_difference_sees_what_two_intervals_do_not() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 60, 200)
    nats = rng.normal(3.0, 0.8, 200)  # samples differ much more than the two forms
    plain = [{"logprob": -float(n * t), "tokens": float(t)} for n, t in zip(nats, tokens)]
    worse = [{**row, "logprob": row["logprob"] - 0.01 * row["tokens"]} for row in plain]
    groups = [str(i) for i in range(200)]
    found = stats.difference("perplexity", plain, worse, groups)
    before = stats.estimate(["perplexity"], plain, groups)["perplexity"]
    after = stats.estimate(["perplexity"], worse, groups)["perplexity"]
    assert found.value == pytest.approx(before.value * (np.exp(0.01) - 1))
    assert before.low < after.value < before.high  # unpaired: nothing to be seen
    assert 0 < found.low < found.value < found.high
    # Every resample of the difference is exp(0.01) - 1 times the plain one's.
    assert found.high == pytest.approx(before.high * (np.exp(0.01) - 1))
    same = stats.difference("perplexity", plain, plain, groups)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_equal_answers_leave_room_for_a_difference_that_few_rows_do_not_show() -> None:
    rows = [{"correct": float(i % 3 == 0)} for i in range(40)]
    found = stats.difference("exact_match", rows, rows, [str(i) for i in range(40)])
    bound = 1 - 0.025 ** (1 / 40)  # a share above this shows in 40 rows with 97.5 % probability
    assert found.value == 0.0 and (found.low, found.high) == pytest.approx((-bound, bound))
