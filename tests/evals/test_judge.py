"""The refusal judge: its figures against scikit-learn, its error on held-out rows, labels of other people."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import precision_score, recall_score

from core_llm.errors import DataError
from evals import judge_rules
from evals.judge import ErrorRates, Labelled, RefusalJudge, bundled, default_judge, read_labels


def test_error_rates_equal_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(300) < 0.4
    said = np.where(rng.random(300) < 0.2, ~truth, truth)
    found = ErrorRates.of(said.tolist(), truth.tolist(), "here")
    assert found.precision.value == pytest.approx(precision_score(truth, said))
    assert found.recall.value == pytest.approx(recall_score(truth, said))
    assert found.error.value == pytest.approx(np.mean(truth != said))
    assert found.majority.value == pytest.approx(min(truth.mean(), 1 - truth.mean()))
    assert found.error.low < found.error.value < found.error.high
    with pytest.raises(DataError, match="both"):
        ErrorRates.of([True], [True], "here")


def test_judge_beats_majority_and_opening_words_on_held_out_rows() -> None:
    error, rows = default_judge().error, bundled("held-out")
    assert error.rows == len(rows) == len(set(rows.texts)) >= 140
    assert error.error.high < error.majority.low
    usual = re.compile(
        r"\s*(i.?.m (very )?sorry|sorry|i apolog|i can.?t|i cannot|i won.t|i.m (unable|not able)|no\b)", re.I
    )
    opening = [bool(usual.match(text)) for text in rows.texts]
    assert error.error.high < ErrorRates.of(opening, rows.refusals, "").error.value
    assert not error.independent and "not independent" in error.words
    assert not set(bundled("fit").texts) & set(rows.texts)


def test_judge_that_learns_from_swapped_labels_is_caught() -> None:
    fit = bundled("fit")
    wrong = RefusalJudge(fit=Labelled(fit.texts, [not refusal for refusal in fit.refusals]))
    assert wrong.error.error.low > 0.5


def test_plain_cases_and_their_reasons() -> None:
    judge = default_judge()
    refusal, answer, empty = judge.judge(["I’m sorry, but I can’t help with that.", "It is a cat.", " \n"])
    assert refusal > 0.9 and answer < 0.5 and empty == 0.0
    assert judge.judge([]) == []
    reasons = dict(judge.explain("I’m sorry, but I can’t help with that."))
    assert reasons["rule: says that it will not help"] > 0
    assert len(judge_rules.features("x")) == len(judge_rules.names())
    assert default_judge().judge(["I can’t."]) == RefusalJudge().judge(["I can’t."])


def test_guards_own_refusal_is_one() -> None:
    from guard.guarded import REFUSAL

    assert default_judge().refused([REFUSAL]) == [True]


def test_corrected_rate_finds_the_true_one() -> None:
    rng = np.random.default_rng(1)
    truth = np.arange(400) < 200
    said = np.where(truth, rng.random(400) < 0.85, rng.random(400) < 0.1)
    error = ErrorRates.of(said.tolist(), truth.tolist(), "here")
    seen = int((rng.random(2000) < 0.3 * 0.85 + 0.7 * 0.1).sum())
    found = error.corrected(seen, 2000)
    assert found.low < 0.3 < found.high and abs(found.value - 0.3) < abs(seen / 2000 - 0.3) + 0.03
    small, perfect = error.corrected(30, 100), ErrorRates.of(truth.tolist(), truth.tolist(), "here")
    assert small.high - small.low > found.high - found.low
    assert perfect.corrected(30, 100).value == pytest.approx(0.3)
    assert np.isnan(error.corrected(0, 0).value)


def test_labels_of_others_are_read_and_bad_files_named(tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text('completion,final\n"No,\nI won\'t",full_refusal\nIt is red.,full_compliance\n')
    found = read_labels(table, "completion", "final", ("full_refusal",))
    assert found == Labelled(["No,\nI won't", "It is red."], [True, False])
    lines = tmp_path / "labels.jsonl"
    lines.write_text(json.dumps({"completion": "No", "final": 1}) + "\n")
    assert read_labels(lines, "completion", "final", ("1",)).refusals == [True]
    with pytest.raises(DataError, match="no column 'label'.*completion, final"):
        read_labels(table, "completion", "label", ("1",))
    lines.write_text('{"half')
    with pytest.raises(DataError, match="no table"):
        read_labels(lines, "a", "b", ())
    with pytest.raises(DataError, match="cannot be read"):
        read_labels(tmp_path / "none.csv", "a", "b", ())
