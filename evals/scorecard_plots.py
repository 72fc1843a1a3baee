"""Figures of the scorecard's own parts: what a guard trades, forms of one request, calibration."""

from collections.abc import Sequence
from typing import Any

from core_llm.stats import Estimate
from evals.plots import GRID, INK, MUTED, PAPER, SECTION_COLORS, new, svg
from evals.scorecard_answers import EVERYTHING, METRICS, NOTHING, Answers, Gap
from evals.scorecard_calibration import Calibrated
from guard.calibration import ReliabilityBin

_SAFETY = SECTION_COLORS["safety"]
_MARKS = {"off": "o", "input": "s", "output": "^", "both": "D"}
_FORM_COLORS = {
    "text": SECTION_COLORS["text"],
    "image": SECTION_COLORS["vision"],
    "speech": SECTION_COLORS["speech"],
}


def tradeoff(found: Sequence[Answers]) -> str:
    """Violation rate over false refusal rate, with intervals: one mark per setting of the guard."""
    figure, axes = new(8.6, 4.2)
    for who, filled in ((EVERYTHING, False), ("the model", True)):
        color = _SAFETY if filled else MUTED
        for answers in found:
            evaluation = answers.own if filled else answers.everything
            violation, refusal = (evaluation.scored.estimates[name] for name in METRICS)
            label = {"off": "guard off", "both": "input and output"}.get(answers.setting, answers.setting)
            axes.plot([refusal.low, refusal.high], [violation.value] * 2, color=color, linewidth=1, alpha=0.6)
            axes.plot(
                [refusal.value] * 2, [violation.low, violation.high], color=color, linewidth=1, alpha=0.6
            )
            axes.plot(
                refusal.value, violation.value, marker=_MARKS[answers.setting], markersize=9, ls="none",
                markerfacecolor=color if filled else PAPER, markeredgecolor=color, markeredgewidth=1.6,
                label=f"{who}, {label}", zorder=4 if filled else 3,
            )  # fmt: skip
    axes.plot(1, 0, marker="x", markersize=9, color=INK, ls="none", markeredgewidth=2, label=NOTHING)
    axes.set(
        xlim=(-0.03, 1.04), ylim=(-0.04, 1.05),
        xlabel="false refusal rate: safe requests refused", ylabel="violation rate: unsafe requests answered",
    )  # fmt: skip
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return svg(figure)


def forms(found: Sequence[Gap]) -> str:
    """Each rate of each form beside that of the same requests typed, and the gap with its interval."""
    figure, axes = new(8.6, 0.9 + 0.34 * max(len(found), 1))
    for y, gap in enumerate(reversed(found)):
        color = _FORM_COLORS.get(gap.form, INK)
        axes.plot(
            [gap.estimate.low, gap.estimate.high], [y, y], color=color, linewidth=2.2, solid_capstyle="round"
        )
        axes.plot(
            gap.estimate.value, y, marker="o", markersize=7, color=color,
            markerfacecolor=color if gap.seen else PAPER, markeredgewidth=1.6,
        )  # fmt: skip
    axes.axvline(0, color=MUTED, linestyle="--", linewidth=1.2)
    axes.set_yticks(range(len(found)), [_gap_name(gap) for gap in reversed(found)])
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("difference to the same requests typed, 95 % interval (filled: zero lies outside)")
    return svg(figure)


def _gap_name(gap: Gap) -> str:
    setting = {"verdicts": "", "off": ", guard off", "both": ", guard on both"}.get(gap.setting, gap.setting)
    return f"{gap.form}: {gap.metric.replace('_', ' ')}, {gap.who}{setting}"


def reliability(each: Calibrated) -> str:
    """Share that is unsafe over P(unsafe), as said and after a temperature; rows per bin below."""
    figure, axes = new(3.9, 3.4)
    most = max(b.rows for b in each.bins)
    for b in each.bins:
        axes.bar((b.low + b.high) / 2, 0.22 * b.rows / most, width=0.9 * (b.high - b.low), color=GRID)
    axes.plot([0, 1], [0, 1], color=MUTED, linestyle="--", linewidth=1.2)
    if each.tempered is not None:
        _line(axes, each.tempered_bins, MUTED, "after a temperature", each.tempered.estimates["ece"])
    _line(axes, each.bins, _SAFETY, "as it says", each.scored.estimates["ece"])
    axes.set(
        xlim=(0, 1), ylim=(0, 1.04), xlabel="P(unsafe) that the guard says", ylabel="share that is unsafe"
    )
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=1)
    return svg(figure)


def _line(axes: Any, bins: Sequence[ReliabilityBin], color: str, name: str, error: Estimate) -> None:
    full = [b for b in bins if b.rows]
    axes.plot(
        [b.mean_probability for b in full], [b.unsafe_share for b in full],
        marker="o", markersize=5, color=color, linewidth=1.6,
        label=f"{name}: ECE {error.value:.3f} ({error.low:.3f} – {error.high:.3f})",
    )  # fmt: skip
