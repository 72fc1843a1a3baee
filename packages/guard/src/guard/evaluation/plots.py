"""Figures of an evaluation as PNG, drawn by matplotlib without a display."""

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from guard.evaluation.measure import AFTER, BEFORE, LINEAR, MAJORITY, TFIDF, Measured

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1d2433", "#7b8496", "#e6e9ef"
# Distinct for the colour-blind too (Okabe and Ito's palette).
COLORS = {
    BEFORE: "#d55e00",
    AFTER: "#0072b2",
    TFIDF: "#009e73",
    LINEAR: "#cc79a7",
}
# What a reader without pictures is told of each kind; the numbers stand in the tables and the JSON.
ALT = {
    "reliability": "Share of unsafe rows over P(unsafe), before and after the temperature",
    "precision_recall": "Precision over recall of the guard and what stands beside it",
}
_RESOLUTION = 160  # dots per inch
_FEW = 10  # rows in a bin, below which its share of unsafe ones says little


def figures(each: Measured) -> Iterator[tuple[str, bytes]]:
    """Kind and PNG of every figure of a set; none of a set of one kind."""
    if each.bins:
        yield "reliability", _png(reliability(each))
        yield "precision_recall", _png(precision_recall(each))


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_RESOLUTION, metadata={"Software": None})
    return buffer.getvalue()


def _new(height_ratios: tuple[float, ...] = (1.0,)) -> tuple["Figure", list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 1.2 + 3.6 * sum(height_ratios)), layout="constrained")
    axes = figure.subplots(len(height_ratios), 1, sharex=True, height_ratios=height_ratios, squeeze=False)[
        :, 0
    ]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(color=GRID, linewidth=0.8)
        each.set_axisbelow(True)
        each.tick_params(colors=INK)
    return figure, list(axes)


def reliability(each: Measured) -> "Figure":
    """Share of unsafe rows over P(unsafe), before and after the temperature; below, how the rows spread."""
    figure, (top, bottom) = _new((1.0, 0.35))
    top.plot([0, 1], [0, 1], color=MUTED, linestyle="--", linewidth=1.2, label="exactly calibrated")
    for i, (who, bins) in enumerate(each.bins.items()):
        error = each.figures[who]["ece"].value
        full = [b for b in bins if b.rows >= _FEW]
        few = [b for b in bins if 0 < b.rows < _FEW]
        top.plot(
            [b.mean_probability for b in few], [b.unsafe_share for b in few], marker="o", markersize=5,
            linestyle="none", color=COLORS[who], markerfacecolor="none", alpha=0.6,
        )  # fmt: skip
        top.plot(
            [b.mean_probability for b in full], [b.unsafe_share for b in full], marker="o", markersize=5,
            linewidth=1.6, color=COLORS[who], label=f"{who} (ECE {error:.3f})",
        )  # fmt: skip
        width = 0.42 / len(bins)
        places = [b.low + (0.29 + 0.42 * i) / len(bins) for b in bins]
        bottom.bar(places, [b.rows for b in bins], width=width, color=COLORS[who])
    top.set(xlim=(0, 1), ylim=(-0.02, 1.02), ylabel="share that is unsafe")
    top.set_title(each.title, loc="left", color=INK, fontsize=11)
    top.plot([], [], marker="o", ls="none", color=MUTED, markerfacecolor="none", label=f"under {_FEW} rows")
    top.legend(frameon=False, fontsize=9, loc="upper left")
    bottom.set(xlabel="P(unsafe) that the guard says", ylabel="rows")
    return figure


def precision_recall(each: Measured) -> "Figure":
    """Precision over recall of the guard and the baselines, with the base rate that chance gives."""
    figure, (axes,) = _new()
    labels = np.array(each.labels, dtype=np.float64)
    for who, scored in each.scored.items():
        if who in (AFTER, MAJORITY):  # a temperature moves no rank, and a constant has no curve
            continue
        order = np.argsort(-scored.probability, kind="stable")
        hits = np.cumsum(labels[order])
        ends = np.flatnonzero(np.append(np.diff(scored.probability[order]) != 0, True))
        recall, precision = hits[ends] / hits[-1], hits[ends] / (ends + 1)
        area = each.figures[who]["auprc"].value
        axes.step(
            recall, precision, where="post", color=COLORS[who], linewidth=1.8, label=f"{who} ({area:.3f})"
        )
    base = labels.mean()
    axes.axhline(base, color=MUTED, linestyle="--", linewidth=1.2, label=f"base rate ({base:.3f})")
    axes.set(xlim=(0, 1.02), ylim=(0, 1.04), xlabel="recall of unsafe rows", ylabel="precision")
    axes.set_title(f"{each.title}: precision and recall (AUPRC)", loc="left", color=INK, fontsize=11)
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    return figure
