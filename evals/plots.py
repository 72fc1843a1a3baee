"""Figures of the report as inline SVG, drawn by matplotlib without a display."""

import hashlib
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from core_llm.stats import CALIBRATION_BINS, LOWER_IS_BETTER
from evals.results import Entry
from evals.scorecard import SECTIONS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID, SHADE, PAPER = "#1d2433", "#7b8496", "#e6e9ef", "#c3c9d4", "#ffffff"
SECTION_COLORS = {
    "text": "#3b6fd4",
    "vision": "#0f8f7e",
    "speech": "#b4530f",
    "safety": "#8a3ffc",
    "speed": "#5b6472",
}
# The page's own colours take these places, so that figures follow its dark and light looks.
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", SHADE: "shade", PAPER: "paper"} | {
    color: name for name, color in SECTION_COLORS.items()
}


def new(width: float, height: float) -> tuple["Figure", Any]:
    """A figure with the report's look; size in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "evals",
            "font.family": "sans-serif",
            "font.size": 10,
            "text.color": INK,
            "axes.edgecolor": MUTED,
            "axes.labelcolor": INK,
            "xtick.color": MUTED,
            "ytick.color": INK,
        }
    )
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def svg(figure: "Figure") -> str:
    """The figure as an <svg> element, without a fixed size and with ids that no other figure has."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    for color, name in _VARIABLES.items():
        text = text.replace(color, f"var(--{name})")
    # Of the content, not of the process: the same report is the same file.
    prefix = f"f{hashlib.sha256(text.encode()).hexdigest()[:8]}-"
    text = re.sub(r'id="', f'id="{prefix}', text)
    text = re.sub(r'href="#', f'href="#{prefix}', text)
    return re.sub(r"url\(#", f"url(#{prefix}", text)


def overview(entries: Sequence[Entry]) -> str:
    """Headline scores with intervals (dots), controls (grey diamonds) and references (rings)."""
    shown = [e for e in entries if next(iter(e["metrics"])) != "perplexity"]
    shown = [e for e in shown if next(iter(e["metrics"].values()))["value"] is not None]
    shown = sorted(shown, key=lambda e: SECTIONS.index(e["section"]))[::-1]
    figure, axes = new(8.6, 0.9 + 0.46 * max(len(shown), 1))
    for y, entry in enumerate(shown):
        metric, estimate = next(iter(entry["metrics"].items()))
        color = SECTION_COLORS[entry["section"]]
        for control in entry["controls"].values():
            other = control["metrics"].get(metric)
            if other is None or other["value"] is None:
                continue
            is_control = control["role"] == "control"
            axes.plot(other["ci95"], [y, y], color=SHADE, linewidth=5, solid_capstyle="round", zorder=2)
            axes.plot(
                other["value"], y, marker="D" if is_control else "o", markersize=6, zorder=3, ls="none",
                markerfacecolor=MUTED if is_control else PAPER, markeredgecolor=MUTED, markeredgewidth=1.4,
            )  # fmt: skip
        axes.plot(estimate["ci95"], [y, y], color=color, linewidth=2.4, solid_capstyle="round", zorder=4)
        axes.plot(estimate["value"], y, marker="o", markersize=9, color=color, zorder=5)
    axes.set_yticks(
        range(len(shown)), [f"{e['task']}  ({next(iter(e['metrics']))}{_arrow(e)})" for e in shown]
    )
    axes.set_xlim(
        -0.03, max(1.06, *(next(iter(e["metrics"].values()))["ci95"][1] + 0.05 for e in shown), 0.0)
    )
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.grid(axis="y", visible=False)
    _legend(axes)
    return svg(figure)


def _arrow(entry: Entry) -> str:
    return " ↓" if next(iter(entry["metrics"])) in LOWER_IS_BETTER else ""


def _legend(axes: Any) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], marker="o", color=INK, linewidth=2.4, markersize=8, label="score, 95 % interval"),
        Line2D(
            [],
            [],
            marker="D",
            color=SHADE,
            markerfacecolor=MUTED,
            markeredgecolor=MUTED,
            linewidth=5,
            label="control",
        ),
        Line2D(
            [],
            [],
            marker="o",
            color=SHADE,
            markerfacecolor=PAPER,
            markeredgecolor=MUTED,
            linewidth=5,
            label="reference",
        ),
    ]
    axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3, frameon=False)


def by_kind(entry: Entry) -> str:
    """The headline per slice of the rows."""
    kinds = list(entry["kinds"].items())[::-1]
    figure, axes = new(4.6, 0.7 + 0.34 * len(kinds))
    color = SECTION_COLORS[entry["section"]]
    metric = next(iter(kinds[0][1]["metrics"]))
    for y, (_, kind) in enumerate(kinds):
        estimate = kind["metrics"][metric]
        axes.barh(y, estimate["value"] or 0.0, height=0.62, color=color, alpha=0.28)
        axes.plot(estimate["ci95"], [y, y], color=color, linewidth=2)
        axes.plot(estimate["value"] or 0.0, y, marker="o", markersize=5, color=color)
    axes.set_yticks(range(len(kinds)), [f"{name} (n={kind['n']})" for name, kind in kinds])
    axes.set_xlim(0, max(1.03, *(kind["metrics"][metric]["ci95"][1] or 0 for _, kind in kinds)))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(metric)
    return svg(figure)


def precision_recall(probability: np.ndarray, label: np.ndarray) -> str:
    """Precision over recall, with the base rate as the line that ranking at random gives."""
    figure, axes = new(3.9, 3.2)
    order = np.argsort(-probability, kind="stable")
    hits = np.cumsum(label[order])
    ends = np.flatnonzero(np.append(np.diff(probability[order]) != 0, True))
    recall, precision = hits[ends] / max(hits[-1], 1), hits[ends] / (ends + 1)
    axes.step(recall, precision, where="post", color=SECTION_COLORS["safety"], linewidth=2)
    axes.axhline(label.mean(), color=MUTED, linestyle="--", linewidth=1.2)
    axes.text(0.02, label.mean() + 0.02, "base rate", color=MUTED)
    axes.set(xlim=(0, 1.02), ylim=(0, 1.04), xlabel="recall of unsafe", ylabel="precision")
    return svg(figure)


def reliability(probability: np.ndarray, label: np.ndarray) -> str:
    """Share that is unsafe in each bin of P(unsafe); bars below show how many rows a bin holds."""
    figure, axes = new(3.9, 3.2)
    which = np.minimum((probability * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    count = np.bincount(which, minlength=CALIBRATION_BINS)
    centre = (np.arange(CALIBRATION_BINS) + 0.5) / CALIBRATION_BINS
    axes.bar(centre, 0.25 * count / count.max(), width=0.9 / CALIBRATION_BINS, color=GRID)
    axes.plot([0, 1], [0, 1], color=MUTED, linestyle="--", linewidth=1.2)
    full = count > 0
    mean_probability = np.bincount(which, probability, CALIBRATION_BINS)[full] / count[full]
    share = np.bincount(which, label, CALIBRATION_BINS)[full] / count[full]
    axes.plot(
        mean_probability, share, marker="o", markersize=5, color=SECTION_COLORS["safety"], linewidth=1.6
    )
    axes.set(
        xlim=(0, 1), ylim=(0, 1.04), xlabel="P(unsafe) that the guard says", ylabel="share that is unsafe"
    )
    return svg(figure)
