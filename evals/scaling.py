"""Scaling laws from small runs: the best size for a compute budget, and a score predicted from compute.

Source: Llama 3 paper (arXiv 2407.21783), section 3.2.1, after Hoffmann et al. 2022 (arXiv 2203.15556),
approach 2. Runs of one compute budget C (FLOPs) and several sizes N (parameters) give a parabola of the
held-out loss over ln N; its minimum is the best size N*(C) of that budget, and N* = A C^a over all of them.
The score is predicted in two steps: compute to the negative log-likelihood of the right answers (a power
law through the best run of each budget), and that to accuracy (a sigmoid through all runs). The largest
budget takes no part in any fit: it is what the prediction is held against.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core_llm.errors import DataError
from core_llm.stats import Estimate

Floats = NDArray[np.float64]
RESAMPLES = 2000
FEWEST = 3  # runs in a budget, and budgets, that a fit needs
_SAME_BUDGET = 1.1  # compute within this factor is one budget
_CURVES = 100  # sigmoids that are fitted to resampled runs
_MOST_FLOOR = 0.9  # of the sigmoid, which rises to 1


@dataclass(frozen=True)
class Run:
    """One trained model: compute in FLOPs, parameters that multiply, tokens seen, loss in nats per token.

    nll: negative log-likelihood of the benchmark's right answers, nats per character; accuracy: share of
    `questions` that are answered right.
    """

    name: str
    budget: float
    compute: float
    parameters: float
    tokens: float
    loss: float
    nll: float | None = None
    accuracy: float | None = None
    questions: int = 0


@dataclass(frozen=True)
class Parabola:
    """loss = c0 + c1 x + c2 x^2, x = ln N. best: N at the minimum; inside: it lies between sizes that ran."""

    budget: float
    coefficients: tuple[float, float, float]
    best: float
    loss: float
    inside: bool


@dataclass(frozen=True)
class Line:
    """ln y = intercept + slope ln C, by least squares over `n` points; deviation of the residuals."""

    intercept: float
    slope: float
    n: int
    deviation: float
    mean_x: float
    spread_x: float

    def at(self, compute: float) -> float:
        """y at a compute."""
        return math.exp(self.intercept + self.slope * math.log(compute))

    def drawn(self, compute: float, rng: np.random.Generator) -> Floats:
        """Draws of a new y [RESAMPLES] from the predictive distribution: Student's t with n - 2 degrees."""
        x = math.log(compute)
        width = self.deviation * math.sqrt(1 + 1 / self.n + (x - self.mean_x) ** 2 / self.spread_x)
        noise = rng.standard_t(self.n - 2, RESAMPLES) * width if self.n > 2 else np.full(RESAMPLES, np.nan)
        return np.exp(self.intercept + self.slope * x + noise)


@dataclass(frozen=True)
class Sigmoid:
    """accuracy = floor + (1 - floor) / (1 + exp(steepness (nll - middle)))."""

    floor: float
    steepness: float
    middle: float

    def at(self, nll: Any) -> Any:
        """Accuracy at a negative log-likelihood."""
        return _sigmoid(np.asarray(nll), self.floor, self.steepness, self.middle)


@dataclass(frozen=True)
class Check:
    """A figure of the held-out run: predicted with its 95 % interval, and measured."""

    name: str
    predicted: Estimate
    measured: float
    measured_interval: tuple[float, float] | None = None

    @property
    def inside(self) -> bool:
        """Whether what was measured lies in the interval of what was predicted."""
        return self.predicted.low <= self.measured <= self.predicted.high


@dataclass
class Scaling:
    """All fits over runs, and how they did on the held-out one."""

    runs: list[Run]
    parabolas: list[Parabola]
    exponent: Estimate  # a of N* = A C^a
    size: Line
    loss: Line
    held_out: Run | None
    nll: Line | None = None
    sigmoid: Sigmoid | None = None
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        checks = [
            {
                "name": c.name,
                "predicted": c.predicted.as_json(),
                "measured": c.measured,
                "measured_ci95": list(c.measured_interval) if c.measured_interval else None,
                "inside": c.inside,
            }
            for c in self.checks
        ]
        return {
            "runs": [asdict(run) for run in self.runs],
            "isoflop": [asdict(parabola) for parabola in self.parabolas],
            "optimal_size": {"exponent": self.exponent.as_json(), **asdict(self.size)},
            "loss": asdict(self.loss),
            "compute_to_nll": asdict(self.nll) if self.nll else None,
            "nll_to_accuracy": asdict(self.sigmoid) if self.sigmoid else None,
            "held_out": self.held_out.name if self.held_out else None,
            "checks": checks,
            "notes": self.notes,
        }


def budgets_of(runs: Sequence[Run]) -> dict[float, list[Run]]:
    """Runs by compute budget, smallest first; runs within 10 % of compute share one."""
    found: dict[float, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.budget, run.parameters)):
        near = next((budget for budget in found if run.budget / budget <= _SAME_BUDGET), None)
        found.setdefault(run.budget if near is None else near, []).append(run)
    return found


def analyse(runs: Sequence[Run], seed: int = 0) -> Scaling:
    """Fit everything but the largest budget, predict the best run of that one, and compare.

    Raises `DataError` where fewer than three budgets with three sizes each are left, or where no budget has
    its best size between the sizes that ran.
    """
    by_budget = budgets_of(runs)
    largest = max(by_budget) if len(by_budget) > FEWEST else None
    held_out = min(by_budget[largest], key=lambda run: run.loss) if largest is not None else None
    fitted = {b: group for b, group in by_budget.items() if b != largest and len(sizes(group)) >= FEWEST}
    if len(fitted) < FEWEST:
        raise DataError(
            f"{len(fitted)} compute budgets have runs of {FEWEST} sizes or more, and a power law needs "
            f"{FEWEST} besides the largest budget, which is held out; add runs"
        )
    return _fitted(list(runs), fitted, held_out, np.random.default_rng(seed))


def sizes(runs: Sequence[Run]) -> set[float]:
    """Numbers of parameters among runs."""
    return {run.parameters for run in runs}


def _fitted(
    runs: list[Run], fitted: dict[float, list[Run]], held_out: Run | None, rng: np.random.Generator
) -> Scaling:
    parabolas = [parabola(budget, group) for budget, group in fitted.items()]
    with_minimum = [p for p in parabolas if p.inside]
    if len(with_minimum) < 2:
        raise DataError(
            "no power law of the best size: fewer than two budgets have their lowest loss between the "
            "smallest and the largest size that ran; add smaller or larger models"
        )
    size = line([p.budget for p in with_minimum], [p.best for p in with_minimum])
    best = [min(group, key=lambda run: run.loss) for group in fitted.values()]
    found = Scaling(
        runs=runs,
        parabolas=parabolas,
        exponent=_exponent(fitted, parabolas, size, rng),
        size=size,
        loss=line([run.compute for run in best], [run.loss for run in best]),
        held_out=held_out,
    )
    left_out = [p.budget for p in parabolas if not p.inside]
    if left_out:
        named = ", ".join(f"{budget:.2g}" for budget in left_out)
        found.notes.append(
            f"no minimum between the sizes that ran at {named} FLOPs: left out of the size's law"
        )
    if held_out is None:
        found.notes.append("no budget is left to hold out: nothing checks these fits; add a larger one")
    else:
        found.checks.append(
            _check("held-out loss, nats per token", found.loss, held_out.compute, held_out.loss, rng)
        )
    answered = [
        run for group in fitted.values() for run in group if run.nll is not None and run.accuracy is not None
    ]
    if len(answered) >= 4 and all(run in answered for run in best):
        _predict_score(found, best, answered, rng)
    else:
        found.notes.append("no score is predicted: the runs bring no nll and accuracy of a benchmark")
    return found


def parabola(budget: float, group: Sequence[Run]) -> Parabola:
    """Least squares over ln N. Where it opens downwards there is no minimum, and `best` is NaN."""
    x = np.log([run.parameters for run in group])
    y = np.array([run.loss for run in group])
    middle = x.mean()
    c2, c1, c0 = np.polyfit(x - middle, y, 2)
    at = -c1 / (2 * c2) if c2 > 0 else float("nan")
    best = math.exp(min(at + middle, 100.0)) if c2 > 0 else float("nan")
    coefficients = (float(c0 - c1 * middle + c2 * middle**2), float(c1 - 2 * c2 * middle), float(c2))
    inside = bool(c2 > 0 and x.min() <= at + middle <= x.max())
    return Parabola(
        budget, coefficients, best, float(c0 - c1**2 / (4 * c2)) if c2 > 0 else float("nan"), inside
    )


def line(compute: Sequence[float], values: Sequence[float]) -> Line:
    """A power law of compute as a line through the logarithms."""
    x, y = np.log(np.asarray(compute)), np.log(np.asarray(values))
    slope, intercept = np.polyfit(x, y, 1)
    residuals = y - (intercept + slope * x)
    deviation = math.sqrt(float((residuals**2).sum()) / max(1, len(x) - 2))
    return Line(
        float(intercept), float(slope), len(x), deviation, float(x.mean()), float(((x - x.mean()) ** 2).sum())
    )


def _exponent(
    fitted: dict[float, list[Run]], parabolas: Sequence[Parabola], size: Line, rng: np.random.Generator
) -> Estimate:
    """The exponent of the best size with its interval: losses are the parabolas' plus residuals drawn anew.

    Residuals of all budgets are drawn together, widened by the three coefficients that each parabola took
    from them. A resample where fewer than two budgets have a minimum tells nothing; where those are more
    than a tenth, neither does the interval.
    """
    fits, residuals = [], []
    for group, p in zip(fitted.values(), parabolas, strict=True):
        x = np.log([run.parameters for run in group])
        at = p.coefficients[0] + p.coefficients[1] * x + p.coefficients[2] * x**2
        spare = len(group) - 3
        left = np.array([run.loss for run in group]) - at
        fits.append(at)
        residuals.append(left * math.sqrt(len(group) / spare) if spare else left[:0])
    pooled = np.concatenate(residuals)
    if not len(pooled):
        return Estimate(size.slope, float("nan"), float("nan"))
    best = np.stack(
        [
            _minima(group, at[:, None] + rng.choice(pooled, (len(group), RESAMPLES)))
            for group, at in zip(fitted.values(), fits, strict=True)
        ]
    )
    drawn = _slopes(np.log(list(fitted)), best)
    if np.isnan(drawn).mean() > 0.1:
        return Estimate(size.slope, float("nan"), float("nan"))
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Estimate(size.slope, float(low), float(high))


def _minima(group: Sequence[Run], losses: Floats) -> Floats:
    """ln N at the minimum for every column of losses [runs, R]; NaN where there is none between the sizes."""
    x = np.log([run.parameters for run in group])
    c2, c1, _ = np.polyfit(x - x.mean(), losses, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        at = x.mean() - c1 / (2 * c2)
    return np.where((c2 > 0) & (at >= x.min()) & (at <= x.max()), at, np.nan)


def _slopes(x: Floats, y: Floats) -> Floats:
    """Slope of y [budgets, R] over x for each column, over what is not NaN; NaN where that is one or none."""
    known = ~np.isnan(y)
    count = known.sum(axis=0)
    weights = known / np.maximum(count, 1)
    filled = np.where(known, y, 0.0)
    dx = x[:, None] - (weights * x[:, None]).sum(axis=0)
    dy = filled - (weights * filled).sum(axis=0)
    spread = (weights * dx**2).sum(axis=0)
    return np.where(count > 1, (weights * dx * dy).sum(axis=0) / np.where(spread > 0, spread, 1.0), np.nan)


def _check(name: str, law: Line, compute: float, measured: float, rng: np.random.Generator) -> Check:
    return Check(name, _estimate(law.at(compute), law.drawn(compute, rng)), measured)


def _estimate(value: float, draws: Floats) -> Estimate:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))


def _predict_score(
    found: Scaling, best: Sequence[Run], answered: Sequence[Run], rng: np.random.Generator
) -> None:
    """Compute to negative log-likelihood, that to accuracy, and both against the held-out run."""
    found.nll = line([run.compute for run in best], [run.nll or math.nan for run in best])
    found.sigmoid = sigmoid(answered)
    held_out = found.held_out
    if held_out is None or held_out.nll is None or held_out.accuracy is None:
        return
    name = "negative log-likelihood of right answers, nats per character"
    found.checks.append(_check(name, found.nll, held_out.compute, held_out.nll, rng))
    expected = float(found.sigmoid.at(found.nll.at(held_out.compute)))
    draws = _drawn_scores(found, answered, held_out, rng)
    found.checks.append(Check("accuracy", _estimate(expected, draws), held_out.accuracy, _binomial(held_out)))


def _drawn_scores(found: Scaling, answered: Sequence[Run], held_out: Run, rng: np.random.Generator) -> Floats:
    """Predicted accuracies [RESAMPLES]: step one drawn, step two refitted on resampled runs, plus residuals.

    The residuals of the sigmoid hold the noise of asking so many questions.
    """
    assert found.nll is not None and found.sigmoid is not None
    left = np.array([run.accuracy or 0.0 for run in answered]) - found.sigmoid.at(
        [run.nll for run in answered]
    )
    curves = []
    for _ in range(_CURVES):
        drawn = [answered[i] for i in rng.integers(0, len(answered), len(answered))]
        curves.append(sigmoid(drawn) if len({run.nll for run in drawn}) >= 4 else found.sigmoid)
    nll = found.nll.drawn(held_out.compute, rng)
    which = rng.integers(0, len(curves), RESAMPLES)
    means = np.array([float(curves[k].at(value)) for k, value in zip(which, nll, strict=True)])
    widened = left * math.sqrt(len(left) / max(1, len(left) - 3))
    return np.clip(means + rng.choice(widened, RESAMPLES), 0.0, 1.0)


def _sigmoid(nll: Any, floor: float, steepness: float, middle: float) -> Any:
    return floor + (1 - floor) / (1 + np.exp(np.clip(steepness * (nll - middle), -60, 60)))


def sigmoid(runs: Sequence[Run]) -> Sigmoid:
    """Least squares of accuracy over negative log-likelihood; it rises to 1 as that falls.

    Raises `DataError` where no curve is found.
    """
    from scipy.optimize import curve_fit

    x = np.array([run.nll for run in runs], dtype=np.float64)
    y = np.array([run.accuracy for run in runs], dtype=np.float64)
    span = max(float(x.max() - x.min()), 1e-3)
    start = (min(max(float(y.min()), 0.0), _MOST_FLOOR), 4 / span, float(x.min()))
    bounds = (
        [0.0, 1e-3 / span, float(x.min()) - 10 * span],
        [_MOST_FLOOR, 200 / span, float(x.max()) + span],
    )
    try:
        found, _ = curve_fit(_sigmoid, x, y, p0=start, bounds=bounds, max_nfev=4000)
    except (RuntimeError, ValueError) as error:
        raise DataError(f"no sigmoid through the runs' accuracies ({error}); add runs") from error
    return Sigmoid(*(float(value) for value in found))


def _binomial(run: Run) -> tuple[float, float] | None:
    """The exact 95 % interval of the share of questions answered right."""
    from scipy.stats import binomtest

    if not run.questions or run.accuracy is None:
        return None
    interval = binomtest(round(run.accuracy * run.questions), run.questions).proportion_ci(method="exact")
    return float(interval.low), float(interval.high)
