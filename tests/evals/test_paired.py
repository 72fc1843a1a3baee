"""Paired tests against scipy, statsmodels and rearrangements counted by hand."""

import itertools

import numpy as np
import pytest
from scipy.stats import permutation_test
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import NormalIndPower

from core_llm import stats
from evals import paired


def right_or_wrong(seed: int, n: int, p: float) -> list[dict[str, float]]:
    return [{"correct": float(x)} for x in np.random.default_rng(seed).random(n) < p]


def transcripts(seed: int, n: int, rate: float) -> list[dict[str, float]]:
    words = np.random.default_rng(7).integers(3, 20, n)  # of the reference: the same for both models
    errors = np.random.default_rng(seed).binomial(words, rate)
    return [{"word_errors": float(e), "words": float(w)} for e, w in zip(errors, words, strict=True)]


def alone(rows: list[dict[str, float]]) -> list[str]:
    return [str(i) for i in range(len(rows))]


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (10, 3), (4, 19), (30, 30)])
def test_mcnemar_is_the_exact_one_of_statsmodels(wins: int, losses: int) -> None:
    table = [[50, losses], [wins, 20]]
    expected = reference_mcnemar(table, exact=True).pvalue if wins + losses else 1.0
    assert paired.mcnemar(wins, losses) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("values", [[0.01, 0.04, 0.03, 0.005], [0.5], [0.2, 0.2, 0.9], [1e-9, 0.049, 0.05]])
def test_holm_is_statsmodels(values: list[float]) -> None:
    assert paired.holm(values) == pytest.approx(multipletests(values, method="holm")[1])


def test_holm_leaves_undefined_values_out_of_the_count() -> None:
    adjusted = paired.holm([0.01, float("nan"), 0.02])
    assert adjusted[0] == pytest.approx(0.02) and adjusted[2] == pytest.approx(0.02)
    assert np.isnan(adjusted[1])


def test_few_pairs_are_permuted_exactly_as_scipy_does() -> None:
    a, b = right_or_wrong(0, 10, 0.4), right_or_wrong(1, 10, 0.8)
    x, y = (np.array([row["correct"] for row in rows]) for rows in (a, b))
    expected = permutation_test(
        (y, x), lambda u, v: np.mean(u) - np.mean(v), permutation_type="samples", n_resamples=np.inf
    ).pvalue
    sides = stats.columns_of(a), stats.columns_of(b)
    assert paired.permutation("accuracy", *sides, alone(a)) == pytest.approx(expected)


def test_many_pairs_are_permuted_as_scipy_does_within_chance() -> None:
    a = [{"correct": float(i % 2)} for i in range(300)]
    b = [{"correct": 1.0 if i < 56 else 0.0 if i < 86 else row["correct"]} for i, row in enumerate(a)]
    x, y = (np.array([row["correct"] for row in rows]) for rows in (a, b))
    expected = permutation_test(
        (y - x,), np.mean, permutation_type="samples", n_resamples=9_999, rng=np.random.default_rng(0)
    ).pvalue
    sides = stats.columns_of(a), stats.columns_of(b)
    found = paired.permutation("accuracy", *sides, alone(a))
    spread = np.sqrt(expected * (1 - expected) / 10_000)
    assert 0.005 < expected < 0.5
    assert found == pytest.approx(expected, abs=5 * spread)


def test_word_error_rate_is_permuted_as_a_corpus_and_by_whole_groups() -> None:
    a, b = transcripts(0, 12, 0.3), transcripts(1, 12, 0.2)
    groups = [f"speaker {i // 3}" for i in range(12)]

    def rate(rows: list[dict[str, float]]) -> float:
        return sum(r["word_errors"] for r in rows) / sum(r["words"] for r in rows)

    gaps = []
    for swaps in itertools.product((False, True), repeat=4):
        one = [b[i] if swaps[i // 3] else a[i] for i in range(12)]
        other = [a[i] if swaps[i // 3] else b[i] for i in range(12)]
        gaps.append(rate(other) - rate(one))
    expected = np.mean(np.abs(gaps) >= abs(gaps[0]) - 1e-12)
    sides = stats.columns_of(a), stats.columns_of(b)
    assert paired.permutation("wer", *sides, groups) == pytest.approx(expected)


def test_permutation_gives_few_false_alarms_where_both_models_are_alike() -> None:
    alarms = 0
    for seed in range(60):
        a, b = right_or_wrong(100 + seed, 40, 0.6), right_or_wrong(900 + seed, 40, 0.6)
        sides = stats.columns_of(a), stats.columns_of(b)
        alarms += paired.permutation("accuracy", *sides, alone(a), seed) < 0.05
    assert alarms <= 8  # 3 expected; more than 8 of 60 happen once in 400 times


def test_detectable_difference_is_what_statsmodels_finds_at_power_four_fifths() -> None:
    spread = 0.02
    size = NormalIndPower(ddof=0).solve_power(None, nobs1=1 / spread**2, alpha=0.05, power=0.8, ratio=0)
    assert paired.detectable(spread) == pytest.approx(size, rel=1e-3)


def test_contrast_counts_wins_and_losses_and_agrees_with_the_clustered_formula() -> None:
    rng = np.random.default_rng(0)
    groups = [f"image {i // 5}" for i in range(400)]
    shift = np.repeat(rng.normal(0, 0.15, 80), 5)
    a = [{"correct": float(x)} for x in rng.random(400) < 0.5]
    b = [{"correct": float(x)} for x in rng.random(400) < np.clip(0.6 + shift, 0, 1)]
    done = paired.contrast("accuracy", a, b, groups)
    gap = np.array([y["correct"] - x["correct"] for x, y in zip(a, b, strict=True)])
    assert (done.wins, done.losses) == ((gap > 0).sum(), (gap < 0).sum())
    assert done.ties == 400 - done.wins - done.losses  # type: ignore[operator]
    assert done.difference.value == pytest.approx(gap.mean())
    # Sum of squared group totals of the residuals: the sandwich estimate for a mean (Liang and Zeger 1986).
    error = np.sqrt((np.bincount(np.arange(400) // 5, gap - gap.mean()) ** 2).sum()) / 400
    assert done.detectable == pytest.approx(2.8016 * error, rel=0.06)
    assert (done.difference.high - done.difference.low) / 2 == pytest.approx(1.96 * error, rel=0.08)
    assert done.groups == 80 and done.mcnemar == pytest.approx(paired.mcnemar(done.wins, done.losses))  # type: ignore[arg-type]


def test_lower_word_error_rate_is_the_better_one() -> None:
    a, b = transcripts(0, 200, 0.3), transcripts(1, 200, 0.1)
    done = paired.contrast("wer", a, b, alone(a))
    assert done.better == 1 and done.difference.value < 0
    assert done.wins > done.losses and done.mcnemar is None  # type: ignore[operator]
    assert done.permutation < 0.001


def test_same_answers_show_no_difference() -> None:
    a = right_or_wrong(0, 50, 0.5)
    done = paired.contrast("accuracy", a, a, alone(a))
    assert (done.better, done.permutation, done.mcnemar) == (0, 1.0, 1.0)
    assert done.difference.low < 0 < done.difference.high
