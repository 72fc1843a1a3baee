"""What the scorecard shows beside the tasks, as rows of the same table: gaps, calibration, speed, size."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from core_llm.stats import Estimate
from evals import scorecard
from evals.scorecard import Row, number
from evals.scorecard_answers import EVERYTHING, Gap
from evals.scorecard_calibration import BASE_RATE, TEMPERED, Calibrated
from evals.scorecard_speed import Figure

if TYPE_CHECKING:
    from evals.scorecard_run import Measured

PART_NAMES = {"core": "core", "image": "vision adapter", "audio": "speech adapter", "guard": "guard"}


def rows(measured: "Measured") -> list[Row]:
    """Everything in one table, sections in their order."""
    found = scorecard.rows(measured.entries)
    found += [row for each in measured.calibration for row in calibration_rows(each)]
    found += gap_rows(shown_gaps(measured))
    found += [speed_row(figure) for figure in measured.speed]
    return [*found, *size_rows(measured.sizes)]


def shown_gaps(measured: "Measured") -> list[Gap]:
    """Of the gaps those of the guard's verdicts, of the guard off, and of the guard on both sides.

    Who answers everything has no gap as long as nobody checks.
    """
    known = [gap for gap in measured.gaps if gap.setting in ("verdicts", "off", "both")]
    return [gap for gap in known if (gap.setting, gap.who) != ("off", EVERYTHING)]


def signed(estimate: Estimate) -> tuple[str, str]:
    """A difference and its interval as text."""
    value, low, high = (f"{x:+.3f}".replace("-", "−") for x in (estimate.value, estimate.low, estimate.high))
    return value, f"{low} to {high}"


def where(setting: str) -> str:
    """A setting of the guard in words."""
    if setting == "verdicts":
        return "the guard's verdicts"
    return {"off": "guard off", "both": "guard on input and output"}.get(setting, f"guard on {setting}")


def gap_rows(gaps: Iterable[Gap]) -> list[Row]:
    """One row per gap of the model or the guard; that of the assistant that answers everything beside it."""
    gaps = list(gaps)
    beside = {(g.setting, g.form, g.metric): g for g in gaps if g.who == EVERYTHING}
    made: list[Row] = []
    before: tuple[str, str] | None = None
    for gap in gaps:
        if gap.who == EVERYTHING:
            continue
        value, interval = signed(gap.estimate)
        other = beside.get((gap.setting, gap.form, gap.metric))
        reference = f"{signed(other.estimate)[0]} ({signed(other.estimate)[1]}) {EVERYTHING}" if other else ""
        made.append(
            Row(
                "safety", f"{gap.form} instead of text", where(gap.setting), gap.rows,
                f"change of {gap.metric}", value, interval, "", reference,
                "gap" if gap.seen else "no gap seen", before != (gap.form, gap.setting),
            )
        )  # fmt: skip
        before = gap.form, gap.setting
    return made


def calibration_rows(each: Calibrated) -> list[Row]:
    """Brier score against the base rate, and the calibration error before and after a temperature."""
    made = []
    for i, (metric, estimate) in enumerate(each.scored.estimates.items()):
        base = each.base_rate.estimates.get(metric)
        after = each.tempered.estimates[metric] if each.tempered else None
        made.append(
            Row(
                "safety", f"calibration of {each.task}", "does P(unsafe) mean what it says", each.rows,
                scorecard.arrow(metric), number(metric, estimate.value),
                f"{number(metric, estimate.low)} – {number(metric, estimate.high)}",
                f"{number(metric, base.value)} {BASE_RATE}" if base else "",
                f"{number(metric, after.value)} {TEMPERED}" if after else "",
                ("no evidence" if each.no_evidence else "beats its controls") if i == 0 else "",
                i == 0,
            )
        )  # fmt: skip
    return made


def speed_row(figure: Figure) -> Row:
    """A figure with its smallest and largest round."""
    interval = "" if figure.low == figure.high else f"{digits(figure.low)} – {digits(figure.high)}"
    return Row(
        "speed", figure.name, figure.note, figure.rounds,
        f"{figure.unit} {'↓' if figure.lower_is_better else '↑'}", digits(figure.value), interval,
        "", "", "", True,
    )  # fmt: skip


def size_rows(sizes: dict[str, tuple[int, int]]) -> list[Row]:
    """Parameters and bytes of the parts."""
    return [
        Row("speed", f"size of the {PART_NAMES.get(kind, kind)}", f"{parameters:,} parameters", 1,
            "MB on disk ↓", digits(size / 1e6), "", "", "", "", True)
        for kind, (parameters, size) in sizes.items()
    ]  # fmt: skip


def digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.2g}"
