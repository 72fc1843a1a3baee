"""Two models on the same samples: who wins where, and whether chance could have done it.

Axes: N pairs, G groups (samples that share an image, a speaker or a context), R rearrangements.
Every figure is "second minus first".
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core_llm import stats
from core_llm.stats import Columns, Floats

RESAMPLES = 5000
REARRANGEMENTS = 9999
_EXACT_GROUPS = 12  # up to here all 2^G rearrangements are few enough to be counted
_LEVEL, _POWER = 0.05, 0.8
_CELLS = 4_000_000

Row = Mapping[str, float]


@dataclass(frozen=True)
class Contrast:
    """One metric of one task.

    first, second: the scores. difference: with its 95 % interval by paired bootstrap. wins: samples on which
    the second is better, losses: worse, ties: alike; None where the metric says nothing of one sample.
    mcnemar: exact two-sided p of wins against losses, where every sample is right or wrong. permutation:
    two-sided p that the scores would differ as much if the models' names meant nothing. detectable: the
    smallest difference that such a comparison finds four times out of five (two-sided, level 5 %).
    """

    metric: str
    n: int
    groups: int
    first: float
    second: float
    difference: stats.Estimate
    wins: int | None
    losses: int | None
    ties: int | None
    mcnemar: float | None
    permutation: float
    detectable: float

    @property
    def better(self) -> int:
        """1 where the second model is ahead, -1 where the first is, 0 where neither."""
        sign = int(np.sign(self.difference.value)) if not math.isnan(self.difference.value) else 0
        return -sign if self.metric in stats.LOWER_IS_BETTER else sign

    def as_json(self) -> dict[str, Any]:
        """All figures; what is undefined is null."""

        def clean(value: float | None) -> float | None:
            return None if value is None or math.isnan(value) else value

        return {
            "n": self.n,
            "groups": self.groups,
            "first": clean(self.first),
            "second": clean(self.second),
            "difference": clean(self.difference.value),
            "ci95": [clean(self.difference.low), clean(self.difference.high)],
            "wins": self.wins,
            "losses": self.losses,
            "ties": self.ties,
            "p_mcnemar": clean(self.mcnemar),
            "p_permutation": clean(self.permutation),
            "minimum_detectable_effect": clean(self.detectable),
        }


def contrast(
    metric: str, first: Sequence[Row], second: Sequence[Row], groups: Sequence[str], seed: int = 0
) -> Contrast:
    """Compare two models by one metric on N pairs of rows; whole groups are drawn and swapped."""
    sides = (stats.columns_of(first), stats.columns_of(second))
    ones = np.ones((1, len(first)))
    scores = [float(stats.METRICS[metric](columns, ones)[0]) for columns in sides]
    draws, _ = stats.paired_draws(metric, first, second, groups, seed, RESAMPLES)
    defined = draws[~np.isnan(draws)]
    spread = float(defined.std(ddof=1)) if len(defined) > 1 else math.nan
    merits = [merit(metric, columns) for columns in sides]
    wins = losses = ties = None
    exact = None
    if merits[0] is not None and merits[1] is not None:
        change = merits[1] - merits[0]
        wins, losses = int((change > 0).sum()), int((change < 0).sum())
        ties = len(change) - wins - losses
        if all(set(np.unique(m)) <= {0.0, 1.0} for m in merits if m is not None):
            exact = mcnemar(wins, losses)
    return Contrast(
        metric=metric,
        n=len(first),
        groups=len(set(groups)),
        first=scores[0],
        second=scores[1],
        difference=stats.difference(metric, first, second, groups, seed, RESAMPLES),
        wins=wins,
        losses=losses,
        ties=ties,
        mcnemar=exact,
        permutation=permutation(metric, *sides, groups, seed),
        detectable=detectable(spread),
    )


def merit(metric: str, columns: Columns) -> Floats | None:
    """How good one sample alone is by a metric, more is better [N]; NaN where it has no say in it.

    A metric of ranks or of a decision is judged by the sample's own right or wrong. None where the metric is
    undefined for every single sample.
    """
    if metric in ("f1", "fpr", "recall"):
        return (columns["unsafe"] == columns["label"]).astype(np.float64)
    if metric in ("brier", "auprc", "auroc", "ece", "recall_at_1_fpr"):
        return -((columns["probability"] - columns["label"]) ** 2)
    if metric == "perplexity":
        return columns["logprob"]
    count = len(next(iter(columns.values())))
    parts = []
    step = max(1, _CELLS // count)
    for start in range(0, count, step):
        alone = np.zeros((min(step, count - start), count))
        alone[np.arange(len(alone)), start + np.arange(len(alone))] = 1.0
        parts.append(stats.METRICS[metric](columns, alone))
    own = np.concatenate(parts)
    if np.isnan(own).all():
        return None
    return -own if metric in stats.LOWER_IS_BETTER else own


def mcnemar(wins: int, losses: int) -> float:
    """Exact two-sided p that a fair coin splits the discordant pairs so unevenly (McNemar 1947)."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses, 0.5).pvalue) if wins + losses else 1.0


def permutation(metric: str, first: Columns, second: Columns, groups: Sequence[str], seed: int = 0) -> float:
    """Two-sided p under swaps of the two models within groups (Fisher 1935).

    The metric is computed anew from the swapped samples, so it may be one of the whole corpus, such as a word
    error rate. With few groups every rearrangement is counted, otherwise `REARRANGEMENTS` are drawn and the
    observed one counts among them (Phipson and Smyth 2010).
    """
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    if index.max() == 0:
        index = np.arange(len(groups))
    count = int(index.max()) + 1
    both = {name: np.concatenate([first[name], second[name]]) for name in first}
    observed = _gaps(metric, both, np.zeros((1, len(index))))[0]
    if math.isnan(observed):
        return math.nan
    exact = count <= _EXACT_GROUPS
    total = 1 << count if exact else REARRANGEMENTS
    rng = np.random.default_rng([seed, 1])
    step = max(1, _CELLS // (2 * len(index)))
    extreme = 0
    for start in range(0, total, step):
        size = min(step, total - start)
        swaps = _all(start, size, count) if exact else rng.integers(0, 2, (size, count)).astype(np.float64)
        gaps = _gaps(metric, both, swaps[:, index])
        # Sums in another order differ in their last bits: what is as far apart must count as such.
        extreme += int((np.abs(gaps) >= abs(observed) - 1e-9 * max(1.0, abs(observed))).sum())
    return extreme / total if exact else (extreme + 1) / (total + 1)


def _all(start: int, size: int, count: int) -> Floats:
    """Rows start..start+size of all 2^G patterns of swaps [size, G]."""
    numbers = np.arange(start, start + size)[:, None]
    return ((numbers >> np.arange(count)) & 1).astype(np.float64)


def _gaps(metric: str, both: Columns, swapped: Floats) -> Floats:
    """Second minus first [R] after swaps [R, N] of 0 and 1. both: columns of the first, then the second."""
    kept = 1 - swapped
    compute = stats.METRICS[metric]
    first = compute(both, np.concatenate([kept, swapped], axis=1))
    return np.asarray(compute(both, np.concatenate([swapped, kept], axis=1)) - first)


def detectable(spread: float) -> float:
    """Minimum detectable effect: (z of 1 - level/2 plus z of the power) standard errors of the difference."""
    from scipy.stats import norm

    return float((norm.ppf(1 - _LEVEL / 2) + norm.ppf(_POWER)) * spread)


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, so that any false alarm at all is rare (Holm 1979); NaN stays."""
    p = np.asarray(values, dtype=np.float64)
    defined: NDArray[np.int64] = np.flatnonzero(~np.isnan(p))
    order = defined[np.argsort(p[defined], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted = np.full(len(p), np.nan)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return [float(value) for value in adjusted]
