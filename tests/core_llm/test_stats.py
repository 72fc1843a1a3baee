"""Scores against scikit-learn, intervals against theory."""

import itertools

import numpy as np
import pytest
from sklearn import metrics as sk

from core_llm import stats


def _classifier_rows(n: int, seed: int, ties: bool = True) -> list[dict[str, float]]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, n)
    score = np.clip(0.5 * label + rng.normal(0.3, 0.3, n), 0, 1)
    score = np.round(score, 1) if ties else score
    return [
        {"probability": p, "label": y, "unsafe": float(p > 0.5)} for p, y in zip(score, label, strict=True)
    ]


def _recall_at(label: np.ndarray, score: np.ndarray, weights: np.ndarray, limit: float) -> float:
    fpr, tpr, _ = sk.roc_curve(label, score, sample_weight=weights, drop_intermediate=False)
    return float(tpr[fpr <= limit].max())


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_classifier_scores_equal_scikit_learn(ties: bool, weighted: bool) -> None:
    columns = stats.columns_of(_classifier_rows(200, 1, ties))
    weights = np.random.default_rng(0).integers(0, 4, 200) if weighted else np.ones(200)
    label, score, said = columns["label"], columns["probability"], columns["unsafe"]
    row = weights[None].astype(float)
    expected = {
        "auprc": sk.average_precision_score(label, score, sample_weight=weights),
        "auroc": sk.roc_auc_score(label, score, sample_weight=weights),
        "f1": sk.f1_score(label, said, sample_weight=weights),
        "fpr": 1 - sk.recall_score(1 - label, 1 - said, sample_weight=weights),
        "recall": sk.recall_score(label, said, sample_weight=weights),
        "brier": sk.brier_score_loss(label, score, sample_weight=weights),
        "recall_at_1_fpr": _recall_at(label, score, weights, 0.01),
    }
    for name, value in expected.items():
        assert stats.METRICS[name](columns, row)[0] == pytest.approx(value, abs=1e-12), name


def test_calibration_error_equals_a_loop_over_bins() -> None:
    columns = stats.columns_of(_classifier_rows(300, 2, ties=False))
    label, score = columns["label"], columns["probability"]
    edges = np.linspace(0, 1, stats.CALIBRATION_BINS + 1)
    expected = 0.0
    for low, high in itertools.pairwise(edges):
        inside = (score >= low) & ((score < high) | (high == 1.0) & (score <= 1))
        if inside.any():
            expected += inside.mean() * abs(label[inside].mean() - score[inside].mean())
    assert stats.calibration_error(columns, np.ones((1, 300)))[0] == pytest.approx(expected)


def test_word_error_rate_is_errors_over_words_and_not_a_mean_of_rates() -> None:
    rows = [{"word_errors": 1.0, "words": 1.0}, {"word_errors": 0.0, "words": 9.0}]
    assert stats.estimate(["wer"], rows, ["a", "b"])["wer"].value == pytest.approx(0.1)


def test_bootstrap_interval_of_a_proportion_matches_the_normal_one() -> None:
    rows = [{"correct": float(i < 700)} for i in range(1000)]
    got = stats.estimate(["accuracy"], rows, [str(i) for i in range(1000)])["accuracy"]
    margin = 1.96 * np.sqrt(0.7 * 0.3 / 1000)
    assert got.value == 0.7
    assert got.low == pytest.approx(0.7 - margin, abs=0.003)
    assert got.high == pytest.approx(0.7 + margin, abs=0.003)


def test_rows_of_one_group_do_not_count_as_independent() -> None:
    """100 groups of 10 identical rows have the interval of 100 rows, not of 1,000."""
    rows = [{"correct": float(group < 60)} for group in range(100) for _ in range(10)]
    groups = [str(group) for group in range(100) for _ in range(10)]
    clustered = stats.estimate(["accuracy"], rows, groups)["accuracy"]
    single = stats.estimate(["accuracy"], rows[::10], groups[::10])["accuracy"]
    assert (clustered.low, clustered.high) == pytest.approx((single.low, single.high), abs=0.011)


@pytest.mark.parametrize("name", ["auprc", "auroc", "f1", "fpr", "recall", "recall_at_1_fpr", "ece", "brier"])
def test_group_weights_equal_repeated_rows(name: str) -> None:
    rows = _classifier_rows(40, 3)
    index = np.repeat(np.arange(10), 4)
    counts = np.random.default_rng(4).multinomial(10, [0.1] * 10).astype(float)
    columns = stats.columns_of(rows)
    summed = stats._per_group_sums(columns, index, 10)
    got = stats._resampled(name, columns, summed, index, counts[None])[0]
    repeated = [row for row, k in zip(rows, counts[index], strict=True) for _ in range(int(k))]
    expected = stats.METRICS[name](stats.columns_of(repeated), np.ones((1, len(repeated))))[0]
    assert got == pytest.approx(expected)


def test_perfect_score_keeps_an_honest_lower_bound() -> None:
    rows = [{"correct": 1.0}] * 50
    got = stats.estimate(["exact_match"], rows, [str(i) for i in range(50)])["exact_match"]
    assert got.high == 1.0
    assert got.low == pytest.approx(0.025 ** (1 / 50))


def test_single_group_falls_back_to_resampling_rows() -> None:
    rows = [{"correct": float(i % 2)} for i in range(50)]
    got = stats.estimate(["accuracy"], rows, ["theo"] * 50)["accuracy"]
    assert got.low < 0.5 < got.high


def test_score_inside_the_controls_interval_is_no_evidence() -> None:
    control = stats.Estimate(0.5, 0.4, 0.6)
    assert stats.no_evidence("accuracy", stats.Estimate(0.55, 0.5, 0.6), control)
    assert not stats.no_evidence("accuracy", stats.Estimate(0.8, 0.7, 0.9), control)
    assert stats.no_evidence("accuracy", stats.Estimate(0.8, 0.45, 0.9), control)
    assert stats.no_evidence("wer", stats.Estimate(0.8, 0.7, 0.9), control)
    assert not stats.no_evidence("wer", stats.Estimate(0.2, 0.1, 0.3), control)


def test_undefined_score_is_nan_and_not_an_error() -> None:
    rows = [{"probability": 0.2, "label": 0.0, "unsafe": 0.0}] * 4
    got = stats.estimate(["auprc", "f1", "fpr", "recall", "recall_at_1_fpr"], rows, list("abcd"))
    assert np.isnan([got[name].value for name in ("auprc", "recall", "recall_at_1_fpr")]).all()
    assert got["fpr"].value == 0.0


def test_recall_at_one_percent_stops_at_the_hundredth_safe_row() -> None:
    """200 safe rows allow two false positives: the unsafe rows above the third safe one are found."""
    safe = [{"probability": 0.9 - i / 1000, "label": 0.0, "unsafe": 0.0} for i in range(200)]
    unsafe = [{"probability": p, "label": 1.0, "unsafe": 0.0} for p in (0.95, 0.8995, 0.8985, 0.8975, 0.1)]
    columns = stats.columns_of(safe + unsafe)
    assert stats.METRICS["recall_at_1_fpr"](columns, np.ones((1, 205)))[0] == pytest.approx(3 / 5)


def test_violations_count_unsafe_requests_and_false_refusals_safe_ones() -> None:
    rows = [
        {"label": 1.0, "violation": 1.0, "refused": 0.0},
        {"label": 1.0, "violation": 0.0, "refused": 1.0},
        {"label": 1.0, "violation": 0.0, "refused": 0.0},
        {"label": 0.0, "violation": 1.0, "refused": 1.0},
        {"label": 0.0, "violation": 0.0, "refused": 0.0},
    ]
    got = stats.estimate(["violation_rate", "false_refusal_rate"], rows, list("abcde"))
    assert got["violation_rate"].value == pytest.approx(1 / 3)
    assert got["false_refusal_rate"].value == pytest.approx(1 / 2)
    only_safe = stats.estimate(["violation_rate"], rows[3:], list("de"))["violation_rate"]
    assert np.isnan(only_safe.value)


def test_rate_of_zero_is_as_sure_as_the_rows_that_it_counts() -> None:
    """40 rows, 10 of them unsafe, no violation: the bound is that of 10 (exact binomial, 2.5 %)."""
    rows = [{"label": float(i < 10), "violation": 0.0, "refused": 0.0} for i in range(40)]
    got = stats.estimate(["violation_rate"], rows, [str(i) for i in range(40)])["violation_rate"]
    assert (got.value, got.low) == (0.0, 0.0)
    assert got.high == pytest.approx(1 - 0.025 ** (1 / 10))
