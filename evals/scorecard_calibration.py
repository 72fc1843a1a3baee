"""Does P(unsafe) mean what it says: reliability, calibration error, and what a temperature would change."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core_llm import stats
from core_llm.errors import UserError
from evals.runner import Evaluation, Scored
from guard import calibration
from guard.calibration import ReliabilityBin

METRICS = ("brier", "ece")
FOLDS = 5
BASE_RATE, TEMPERED = "base rate", "after a temperature"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Calibrated:
    """One guard task. tempered, temperatures: of five folds, each scaled by what the others fitted; None
    where `why` says that none could be fitted.
    """

    task: str
    rows: int
    unsafe: int
    scored: Scored
    base_rate: Scored
    tempered: Scored | None
    temperatures: tuple[float, ...]
    bins: list[ReliabilityBin]
    tempered_bins: list[ReliabilityBin]
    why: str = ""

    @property
    def no_evidence(self) -> bool:
        """Whether to say the base rate to everybody would be as good."""
        return stats.no_evidence("brier", self.scored.estimates["brier"], self.base_rate.estimates["brier"])


def measure(evaluation: Evaluation, seed: int) -> Calibrated | None:
    """Calibration on one evaluated guard task; None where its rows are of one kind."""
    label = np.array([row["label"] for row in evaluation.rows])
    said = np.array([row["probability"] for row in evaluation.rows])
    if len(set(label.tolist())) < 2:
        return None
    groups = [sample.group for sample in evaluation.samples]
    tempered: Scored | None = None
    temperatures: tuple[float, ...] = ()
    why = ""
    scaled = said
    try:
        scaled, temperatures = _cross_fitted(said, label, groups, seed)
        tempered = _scored(TEMPERED, "reference", scaled, label, groups, seed)
    except UserError as error:
        why = str(error)
    whole = label.astype(int).tolist()
    return Calibrated(
        evaluation.task.name,
        len(label),
        int(label.sum()),
        _scored(evaluation.task.name, "score", said, label, groups, seed),
        _scored(BASE_RATE, "control", np.full(len(label), label.mean()), label, groups, seed, METRICS[:1]),
        tempered,
        temperatures,
        calibration.reliability(said, whole),
        calibration.reliability(scaled, whole) if tempered else [],
        why,
    )


def _scored(
    name: str, role: str, said: Floats, label: Floats, groups: Sequence[str], seed: int,
    metrics: Sequence[str] = METRICS,
) -> Scored:  # fmt: skip
    rows = [{"probability": float(p), "label": float(y)} for p, y in zip(said, label, strict=True)]
    return Scored(name, role, len(rows), stats.estimate(metrics, rows, groups, seed))


def _cross_fitted(
    said: Floats, label: Floats, groups: Sequence[str], seed: int
) -> tuple[Floats, tuple[float, ...]]:
    """P(unsafe) of each fold at the temperature of the others, and the temperatures.

    Rows of one group stay together. Raises `UserError` where the rows cannot tell a temperature.
    """
    names = sorted(set(groups))
    random.Random(seed).shuffle(names)
    fold_of = {name: i % FOLDS for i, name in enumerate(names)}
    fold = np.array([fold_of[group] for group in groups])
    scaled, temperatures = said.copy(), []
    for i in range(FOLDS):
        held, rest = fold == i, fold != i
        if not held.any():
            continue
        fitted = calibration.fit(said[rest].tolist(), label[rest].astype(int).tolist())
        temperatures.append(fitted.temperature)
        scaled[held] = calibration.scaled(said[held], fitted.temperature)
    return scaled, tuple(temperatures)
