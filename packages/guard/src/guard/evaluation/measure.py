"""Figures with intervals for the guard and its baselines on one set, all on the same test rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from core_llm import stats
from core_llm.stats import Estimate
from guard.calibration import ReliabilityBin, reliability
from guard.evaluation.rows import EvalSet

Floats = NDArray[np.float64]

METRICS = ("auprc", "auroc", "f1", "fpr", "recall", "recall_at_1_fpr", "ece", "brier")
# A set of one kind: nothing to rank, and calibration would only say how the set was chosen.
OF_UNSAFE_ROWS, OF_SAFE_ROWS = ("recall",), ("fpr",)
CALIBRATION_METRICS = ("ece", "brier")
_DRAWS = 500

BEFORE, AFTER = "guard", "guard, calibrated"
MAJORITY, TFIDF, LINEAR = "majority", "TF-IDF regression", "linear head on core"


@dataclass(frozen=True)
class Scored:
    """One classifier's word on the test rows. probability [N]; unsafe [N] bool; learnt: from what, for a
    baseline.
    """

    probability: Floats
    unsafe: NDArray[np.bool_]
    learnt: str = ""


@dataclass
class Measured:
    """A set with the figures of every classifier on it.

    differences: guard minus other, by metric, on the same resamples; of the calibrated guard, calibrated
    minus not. luck: the calibration error that a guard would get here whose every P(unsafe) were exactly
    right: mean, and 95 % interval. no_evidence: classifiers whose AUPRC the guard's does not beat with the
    whole interval of the difference.
    """

    name: str
    title: str
    rows: int
    unsafe: int
    groups: int
    scored: dict[str, Scored]
    figures: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    luck: Estimate | None = None
    bins: dict[str, list[ReliabilityBin]] = field(default_factory=dict)
    labels: list[int] = field(default_factory=list)
    no_evidence: list[str] = field(default_factory=list)


def metrics_of(labels: Sequence[int]) -> tuple[str, ...]:
    """The metrics that mean something on rows with these labels."""
    if len(set(labels)) == 2:
        return METRICS
    return OF_UNSAFE_ROWS if labels[0] else OF_SAFE_ROWS


def measure(made: EvalSet, scored: Mapping[str, Scored], resamples: int, seed: int) -> Measured:
    """Figures of every classifier in `scored`; the guard is named `BEFORE`, and `AFTER` its calibration."""
    labels = [row.label for row in made.test]
    groups = [row.group for row in made.test]
    names = metrics_of(labels)
    tables = {
        who: [
            {"probability": float(p), "unsafe": float(u), "label": float(y)}
            for p, u, y in zip(each.probability, each.unsafe, labels, strict=True)
        ]
        for who, each in scored.items()
    }
    figures = {who: stats.estimate(names, rows, groups, seed, resamples) for who, rows in tables.items()}
    result = Measured(
        made.name,
        made.title,
        len(labels),
        sum(labels),
        len(set(groups)),
        dict(scored),
        figures,
        labels=labels,
    )
    result.differences = {
        who: {
            metric: stats.difference(metric, rows, tables[BEFORE], groups, seed, resamples)
            for metric in names
            if metric not in CALIBRATION_METRICS
        }
        for who, rows in tables.items()
        if who not in (BEFORE, AFTER)
    }
    if "ece" in names:
        _add_calibration(result, tables, groups, resamples, seed)
    if names == METRICS:  # rows of one kind rank nothing: there a majority is always right
        result.no_evidence = [
            who for who, each in result.differences.items() if who != AFTER and each["auprc"].low <= 0
        ]
    return result


def _add_calibration(
    result: Measured,
    tables: Mapping[str, Sequence[Mapping[str, float]]],
    groups: Sequence[str],
    resamples: int,
    seed: int,
) -> None:
    guards = [who for who in (BEFORE, AFTER) if who in tables]
    result.bins = {who: reliability(result.scored[who].probability, result.labels) for who in guards}
    if AFTER in tables:
        result.differences[AFTER] = {
            metric: stats.difference(metric, tables[BEFORE], tables[AFTER], groups, seed, resamples)
            for metric in CALIBRATION_METRICS
        }
    result.luck = lucky_error(result.scored[guards[-1]].probability, seed)


def lucky_error(probability: Floats, seed: int) -> Estimate:
    """The calibration error that chance alone leaves: labels are drawn with exactly these probabilities.

    The error is a sum of absolute values and never 0 on finitely many rows: this is what it must be compared
    with.
    """
    rng = np.random.default_rng(seed)
    ones = np.ones((1, len(probability)))
    drawn = []
    for _ in range(_DRAWS):
        labels = (rng.random(len(probability)) < probability).astype(np.float64)
        columns = {"probability": probability, "label": labels}
        drawn.append(float(stats.calibration_error(columns, ones)[0]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(float(np.mean(drawn)), float(low), float(high))
