"""Temperature: one number that makes P(unsafe) mean what it says, fitted on rows that no test sees.

Temperature scaling divides the log-odds by T before the sigmoid (arXiv 1706.04599, section 4.2). It moves no
score past another, so rankings stay, and decisions at 0.5 stay; what changes is how sure the guard says it
is. Of several windows the worst stays the worst, so scaling a verdict equals scaling each of its windows.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from core_llm.errors import CheckpointError, UserError
from core_llm.files import read_json, write_text
from core_llm.stats import CALIBRATION_BINS

Floats = NDArray[np.float64]

SETTINGS, BESIDE = "guard.json", "calibration.json"
COLDEST, HOTTEST = 0.05, 20.0  # outside of it the validation rows say nothing about a temperature
FEWEST_ROWS = 30
# P(unsafe) of exactly 0 or 1 comes from log-odds that a double cannot tell apart any more.
_EDGE = 1e-12


@dataclass(frozen=True)
class Calibration:
    """A fitted temperature and what it rests on.

    rows, unsafe: number of validation rows, and of unsafe ones among them. nll_before, nll_after: mean
    negative log-likelihood of the labels on these rows, in nats.
    """

    temperature: float
    rows: int
    unsafe: int
    nll_before: float
    nll_after: float


@dataclass(frozen=True)
class ReliabilityBin:
    """One bin of a reliability diagram; low and high bound P(unsafe), the mean of it and the share of unsafe
    rows are None in an empty bin.
    """

    low: float
    high: float
    rows: int
    mean_probability: float | None
    unsafe_share: float | None


def log_odds(probability: Sequence[float] | Floats) -> Floats:
    """log(p / (1 - p)), finite."""
    p = np.clip(np.asarray(probability, dtype=np.float64), _EDGE, 1 - _EDGE)
    return np.log(p) - np.log1p(-p)


def scaled(probability: Sequence[float] | Floats, temperature: float) -> Floats:
    """P(unsafe) at another temperature; at 1 the very same numbers."""
    given = np.asarray(probability, dtype=np.float64)
    if temperature == 1.0:
        return given
    return 1 / (1 + np.exp(-log_odds(given) / temperature))


def negative_log_likelihood(probability: Floats, labels: Floats) -> float:
    """Mean of -log p(label), in nats."""
    p = np.clip(probability, _EDGE, 1 - _EDGE)
    return float(-np.mean(labels * np.log(p) + (1 - labels) * np.log1p(-p)))


def fit(probability: Sequence[float], labels: Sequence[int]) -> Calibration:
    """The temperature under which the labels are likeliest.

    The likelihood is concave in 1/T, so the zero of its slope is its only maximum. Raises `UserError` where
    the rows cannot tell a temperature: too few, all alike, or a guard that ranks no better than a coin.
    """
    from scipy.optimize import brentq

    odds, truth = log_odds(probability), np.asarray(labels, dtype=np.float64)
    if not np.isfinite(odds).all():
        raise UserError("the guard's scores are not finite: nothing can be calibrated")
    unsafe = int(truth.sum())
    if len(truth) < FEWEST_ROWS or unsafe in (0, len(truth)):
        raise UserError(
            f"a temperature needs at least {FEWEST_ROWS} validation rows of both kinds, "
            f"got {len(truth)} with {unsafe} unsafe: give more data"
        )

    def slope(inverse: float) -> float:
        return float(np.sum((1 / (1 + np.exp(-inverse * odds)) - truth) * odds))

    if slope(1 / HOTTEST) >= 0:
        raise UserError("on the validation rows the guard is no better than a coin: no temperature helps")
    # Without a mistake among the rows the likelihood grows without end: the coldest temperature it is.
    inverse = 1 / COLDEST if slope(1 / COLDEST) <= 0 else brentq(slope, 1 / HOTTEST, 1 / COLDEST, xtol=1e-9)
    temperature = 1 / float(inverse)
    before = np.asarray(probability, dtype=np.float64)
    return Calibration(
        temperature,
        len(truth),
        unsafe,
        negative_log_likelihood(before, truth),
        negative_log_likelihood(scaled(before, temperature), truth),
    )


def reliability(
    probability: Sequence[float] | Floats, labels: Sequence[int], bins: int = CALIBRATION_BINS
) -> list[ReliabilityBin]:
    """The bins of a reliability diagram, of equal width, those of the calibration error."""
    p, truth = np.asarray(probability, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    which = np.minimum((p * bins).astype(int), bins - 1)
    rows = np.bincount(which, minlength=bins)
    said, unsafe = np.bincount(which, p, bins), np.bincount(which, truth, bins)
    return [
        ReliabilityBin(
            i / bins,
            (i + 1) / bins,
            int(n),
            float(said[i] / n) if n else None,
            float(unsafe[i] / n) if n else None,
        )
        for i, n in enumerate(rows)
    ]


def store(folder: Path, calibration: Calibration) -> None:
    """Add the temperature to the settings of the guard in `folder`; everything else stays as it is.

    A released guard has no settings of ours: it gets `calibration.json` beside its own files. A guard that is
    trained anew writes new settings, so no temperature outlives the weights that it was fitted for.
    Raises `UserError` where it cannot be written.
    """
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: cannot write there; copy the guard to another folder first")
    values = {"temperature": calibration.temperature, "calibration": asdict(calibration)}
    path = folder / SETTINGS
    if path.is_file():
        values = read_json(path) | values
    else:
        path = folder / BESIDE
    write_text(path, json.dumps(values, indent=2) + "\n")


def stored_beside(folder: Path) -> float:
    """The temperature in `calibration.json`, or 1; raises `CheckpointError` where it is none at all."""
    path = folder / BESIDE
    if not path.is_file():
        return 1.0
    value = read_json(path).get("temperature")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise CheckpointError(f"{path}: temperature must be a positive number, not {value!r}")
    return float(value)
