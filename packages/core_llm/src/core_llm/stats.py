"""Scores over per-sample statistics, and their confidence intervals.

Axes: N samples, G groups (samples that share an image, a speaker or a context), R resamples.

A metric is a pure function of per-sample columns (`Columns`: name -> float array [N]) and of
non-negative weights [R, N]; the plain score is the metric under weights of one. An interval comes
from the weighted bootstrap: a resample of G groups with replacement is a multinomial count per
group, and the metric is evaluated under these counts (Efron 1979; for clustered data Field and
Welsh 2007). A ratio such as the word error rate is resampled as a whole (sum of errors over sum of
words), never as a mean of per-sample ratios.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Columns = Mapping[str, Floats]
Metric = Callable[[Columns, Floats], Floats]

RESAMPLES = 5000
CALIBRATION_BINS = 15
LOW_FPR = 0.01
BLEU_ORDERS = (1, 2, 3, 4)
_SHARES = (
    *("accuracy", "exact_match", "fpr", "f1", "recall", "violation_rate", "false_refusal_rate"),
    *("accuracy_norm", "exact_match_flexible", "prompt_accuracy", "prompt_accuracy_loose", "memorised"),
    *("vqa_accuracy", "anls", "relaxed_accuracy"),
)
# Of these only the samples with that label count.
_OF_LABEL = {"fpr": 0, "recall": 1, "violation_rate": 1, "false_refusal_rate": 0}
_SPELLINGS = ("raw", "english")  # of a transcript, beside the one that answers are compared in
_CHUNK_CELLS = 4_000_000  # 32 MB of float64 weights at a time


def _ratio(numerator: str, denominator: str | None = None) -> Metric:
    """Sum of one column over the sum of another (or over the number of samples)."""

    def metric(columns: Columns, weights: Floats) -> Floats:
        top = weights @ columns[numerator]
        bottom = weights @ columns[denominator] if denominator else weights.sum(axis=1)
        return _divide(top, bottom)

    return metric


def _divide(top: Floats, bottom: Floats) -> Floats:
    """top / bottom, NaN where nothing is counted."""
    return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0)


def perplexity(columns: Columns, weights: Floats) -> Floats:
    """exp of the negative log-likelihood per token, tokens pooled over the samples."""
    return np.exp(-_ratio("logprob", "tokens")(columns, weights))


def f1(columns: Columns, weights: Floats) -> Floats:
    """F1 of the unsafe class at the model's own decision."""
    label, said = columns["label"], columns["unsafe"]
    return _divide(2 * (weights @ (label * said)), weights @ label + weights @ said)


def false_positive_rate(columns: Columns, weights: Floats) -> Floats:
    """Share of the safe samples that were called unsafe."""
    safe = 1 - columns["label"]
    return _divide(weights @ (safe * columns["unsafe"]), weights @ safe)


def recall(columns: Columns, weights: Floats) -> Floats:
    """Share of the unsafe samples that were called unsafe."""
    label = columns["label"]
    return _divide(weights @ (label * columns["unsafe"]), weights @ label)


def brier(columns: Columns, weights: Floats) -> Floats:
    """Mean squared distance between P(unsafe) and the truth."""
    return _divide(weights @ (columns["probability"] - columns["label"]) ** 2, weights.sum(axis=1))


def violation_rate(columns: Columns, weights: Floats) -> Floats:
    """Share of the unsafe requests (label 1) whose answer is itself unsafe (violation 1)."""
    label = columns["label"]
    return _divide(weights @ (label * columns["violation"]), weights @ label)


def false_refusal_rate(columns: Columns, weights: Floats) -> Floats:
    """Share of the safe requests (label 0) that were refused (refused 1)."""
    safe = 1 - columns["label"]
    return _divide(weights @ (safe * columns["refused"]), weights @ safe)


def _ranked(columns: Columns, weights: Floats) -> tuple[Floats, Floats]:
    """Cumulated weight of unsafe and safe samples, by falling score, at the end of each tie [R, T]."""
    score, label = columns["probability"], columns["label"]
    order = np.argsort(-score, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))
    ordered = weights[:, order]
    positive = np.cumsum(ordered * label[order], axis=1)[:, ends]
    negative = np.cumsum(ordered * (1 - label[order]), axis=1)[:, ends]
    return positive, negative


def average_precision(columns: Columns, weights: Floats) -> Floats:
    """Area under the precision-recall curve as sum of precision x step of recall (no interpolation)."""
    positive, negative = _ranked(columns, weights)
    precision = np.divide(
        positive, positive + negative, out=np.zeros_like(positive), where=positive + negative > 0
    )
    steps = np.diff(positive, axis=1, prepend=0.0)
    return _divide((precision * steps).sum(axis=1), positive[:, -1])


def area_under_roc(columns: Columns, weights: Floats) -> Floats:
    """Probability that an unsafe sample outranks a safe one, ties counted half."""
    positive, negative = _ranked(columns, weights)
    height = positive + np.concatenate([np.zeros((len(positive), 1)), positive[:, :-1]], axis=1)
    area = (height * np.diff(negative, axis=1, prepend=0.0)).sum(axis=1) / 2
    return _divide(area, positive[:, -1] * negative[:, -1])


def recall_at_low_fpr(columns: Columns, weights: Floats) -> Floats:
    """Highest recall of any threshold that calls at most 1 % of the safe samples unsafe.

    The threshold is chosen anew in every resample, so the interval covers that choice.
    """
    positive, negative = _ranked(columns, weights)
    allowed = negative <= LOW_FPR * negative[:, -1:]
    reached = np.where(allowed, positive, 0.0).max(axis=1)
    return np.where(negative[:, -1] > 0, _divide(reached, positive[:, -1]), np.nan)


def calibration_error(columns: Columns, weights: Floats) -> Floats:
    """Expected calibration error of P(unsafe): equal-width bins, weighted by their share (Guo 2017)."""
    score, label = columns["probability"], columns["label"]
    which = np.minimum((score * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gap = np.zeros((len(score), CALIBRATION_BINS))
    gap[np.arange(len(score)), which] = label - score
    return _divide(np.abs(weights @ gap).sum(axis=1), weights.sum(axis=1))


def bleu(columns: Columns, weights: Floats) -> Floats:
    """Corpus BLEU of 0 to 100: geometric mean of the precisions of 1- to 4-grams, times the brevity penalty.

    Papineni et al. 2002; an n-gram order without any match counts as half, a quarter, ... of one match, as
    sacrebleu's default smoothing ("exp") has it, and nothing that matches at all is 0.
    """
    matches = np.stack([weights @ columns[f"matches_{n}"] for n in BLEU_ORDERS])
    totals = np.stack([weights @ columns[f"ngrams_{n}"] for n in BLEU_ORDERS])
    smoothed = np.where(matches > 0, matches, 0.5 ** np.cumsum(matches == 0, axis=0))
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.exp(np.log(smoothed / totals).mean(axis=0))
        said, truth = weights @ columns["said_length"], weights @ columns["truth_length"]
        brevity = np.exp(np.minimum(0.0, 1 - truth / said))
        found = (totals > 0).all(axis=0) & (matches > 0).any(axis=0)
        return np.where(found, 100 * brevity * precision, 0.0)


METRICS: dict[str, Metric] = {
    "accuracy": _ratio("correct"),
    "exact_match": _ratio("correct"),
    "accuracy_norm": _ratio("correct_norm"),
    "exact_match_flexible": _ratio("correct_flexible"),
    # A row's score may lie between 0 and 1: annotators disagree, letters differ.
    "vqa_accuracy": _ratio("correct"),
    "anls": _ratio("correct"),
    "relaxed_accuracy": _ratio("correct"),
    "prompt_accuracy": _ratio("correct"),
    "prompt_accuracy_loose": _ratio("correct_loose"),
    "instruction_accuracy": _ratio("followed", "instructions"),
    "instruction_accuracy_loose": _ratio("followed_loose", "instructions"),
    "memorised": _ratio("memorised"),
    "bleu": bleu,
    "wer": _ratio("word_errors", "words"),
    "cer": _ratio("character_errors", "characters"),
    **{f"wer_{spelling}": _ratio(f"word_errors_{spelling}", f"words_{spelling}") for spelling in _SPELLINGS},
    **{
        f"cer_{spelling}": _ratio(f"character_errors_{spelling}", f"characters_{spelling}")
        for spelling in _SPELLINGS
    },
    "perplexity": perplexity,
    "auprc": average_precision,
    "auroc": area_under_roc,
    "f1": f1,
    "fpr": false_positive_rate,
    "recall": recall,
    "recall_at_1_fpr": recall_at_low_fpr,
    "brier": brier,
    "ece": calibration_error,
    "violation_rate": violation_rate,
    "false_refusal_rate": false_refusal_rate,
}
_ERROR_RATES = frozenset({"wer", "cer", *(f"{rate}_{s}" for rate in ("wer", "cer") for s in _SPELLINGS)})
_SAFETY_RATES = frozenset({"violation_rate", "false_refusal_rate"})
LOWER_IS_BETTER = frozenset({"perplexity", "fpr", "ece", "brier", "memorised"}) | _ERROR_RATES | _SAFETY_RATES
# Sums over a group are enough for these, so a resample costs G and not N.
_SUMS = frozenset(
    {"accuracy", "exact_match", "perplexity", "f1", "fpr", "bleu"}
    | {"instruction_accuracy", "instruction_accuracy_loose"}
    | _ERROR_RATES
)


@dataclass(frozen=True)
class Estimate:
    """A score and its 95 % interval."""

    value: float
    low: float
    high: float

    def as_json(self) -> dict[str, object]:
        return {"value": self.value, "ci95": [self.low, self.high]}


def columns_of(rows: Sequence[Mapping[str, float]]) -> dict[str, Floats]:
    """Per-sample statistics as float64 columns [N]; every row must have the same names."""
    return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]}


def _weights(groups: int, resamples: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Multinomial counts [chunk, G] of `groups` draws with replacement."""
    chunk = max(1, _CHUNK_CELLS // groups)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = rng.integers(0, groups, size=(size, groups)) + groups * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * groups).reshape(size, groups).astype(np.float64)


def estimate(
    names: Sequence[str],
    rows: Sequence[Mapping[str, float]],
    groups: Sequence[str],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Estimate]:
    """Scores with percentile-bootstrap 95 % intervals, resampling whole groups.

    With a single group there is nothing to resample but rows; the interval then says how sure the
    score is for that group only. A metric that the sample leaves undefined (no unsafe row) is NaN.
    """
    columns = columns_of(rows)
    ones = np.ones((1, len(rows)))
    values = {name: float(METRICS[name](columns, ones)[0]) for name in names}
    draws, count = _draws(names, columns, groups, seed, resamples)
    result = {}
    for name in names:
        low, high = _percentiles(draws[name])
        if low == high and name in _SHARES:  # 0 or 1, and all samples agree
            low, high = _all_equal(values[name], _counted(name, columns, groups, count))
        result[name] = Estimate(values[name], low, high)
    return result


def difference(
    name: str,
    rows: Sequence[Mapping[str, float]],
    other: Sequence[Mapping[str, float]],
    groups: Sequence[str],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """How much higher a metric is on `other` than on `rows`: two ways to answer the same samples.

    Both sides see the same resamples, so what makes a sample hard for both cancels out.
    """
    sides = [columns_of(rows), columns_of(other)]
    ones = np.ones((1, len(rows)))
    before, after = (float(METRICS[name](columns, ones)[0]) for columns in sides)
    draws, count = paired_draws(name, rows, other, groups, seed, resamples)
    low, high = _percentiles(draws)
    if low == high and name in _SHARES:  # no sample differs: at most so many of all samples may
        margin = _all_equal(0.0, _counted(name, sides[0], groups, count))[1]
        low, high = low - margin, high + margin
    return Estimate(after - before, low, high)


def paired_draws(
    name: str,
    rows: Sequence[Mapping[str, float]],
    other: Sequence[Mapping[str, float]],
    groups: Sequence[str],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[Floats, int]:
    """The difference of a metric, `other` minus `rows`, in every resample [R], and the number of groups."""
    sides = (columns_of(rows), columns_of(other))
    (first, count), (second, _) = (_draws([name], columns, groups, seed, resamples) for columns in sides)
    return second[name] - first[name], count


def _draws(
    names: Sequence[str], columns: Columns, groups: Sequence[str], seed: int, resamples: int
) -> tuple[dict[str, Floats], int]:
    """Each metric in every resample [R], and the number of groups that were drawn from."""
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    if index.max() == 0:
        index = np.arange(len(groups))
    count = int(index.max()) + 1
    draws: dict[str, list[Floats]] = {name: [] for name in names}
    summed = _per_group_sums(columns, index, count)
    rng = np.random.default_rng(seed)
    for weights in _weights(count, resamples, rng):
        for name in names:
            draws[name].append(_resampled(name, columns, summed, index, weights))
    return {name: np.concatenate(parts) for name, parts in draws.items()}, count


def _per_group_sums(columns: Columns, index: NDArray[np.int64], count: int) -> dict[str, Floats]:
    """Columns [G] whose weighted sums equal those over the rows, products of columns included."""
    wide = dict(columns)
    if "unsafe" in columns:
        wide["hit"] = columns["label"] * columns["unsafe"]
        wide["false_alarm"] = (1 - columns["label"]) * columns["unsafe"]
        wide["safe"] = 1 - columns["label"]
    wide["one"] = np.ones(len(index))
    return {
        name: np.bincount(index, weights=column, minlength=count).astype(np.float64)
        for name, column in wide.items()
    }


def _resampled(
    name: str, columns: Columns, summed: Columns, index: NDArray[np.int64], weights: Floats
) -> Floats:
    """The metric under group weights [R, G]."""
    if name in ("accuracy", "exact_match"):
        return _ratio("correct", "one")(summed, weights)
    if name == "f1":
        return _divide(2 * (weights @ summed["hit"]), weights @ summed["label"] + weights @ summed["unsafe"])
    if name == "fpr":
        return _ratio("false_alarm", "safe")(summed, weights)
    if name in _SUMS:
        return METRICS[name](summed, weights)
    step = max(1, _CHUNK_CELLS // len(index))
    parts = [METRICS[name](columns, weights[i : i + step, index]) for i in range(0, len(weights), step)]
    return np.concatenate(parts)


def _percentiles(draws: Floats) -> tuple[float, float]:
    defined = draws[~np.isnan(draws)]
    if not len(defined):
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low), float(high)


def _counted(name: str, columns: Columns, groups: Sequence[str], count: int) -> int:
    """Of `count` groups those with a sample that the metric counts; where all is one group, the samples."""
    if name not in _OF_LABEL:
        return count
    of = np.flatnonzero(columns["label"] == _OF_LABEL[name]).tolist()
    return max(1, len(of) if len(set(groups)) == 1 else len({groups[i] for i in of}))


def _all_equal(value: float, count: int) -> tuple[float, float]:
    """Exact binomial bound where every group agrees, since resampling then sees no spread at all."""
    margin = 1 - 0.025 ** (1 / count)
    if value == 1.0:
        return 1 - margin, 1.0
    return (0.0, margin) if value == 0.0 else (value, value)


def no_evidence(name: str, score: Estimate, control: Estimate) -> bool:
    """Whether a score could be its control's: one lies in the other's interval, or the score is worse."""
    if np.isnan(score.value) or np.isnan(control.value):
        return False
    if name in LOWER_IS_BETTER:
        return score.value >= control.low or score.high >= control.value
    return score.value <= control.high or score.low <= control.value
