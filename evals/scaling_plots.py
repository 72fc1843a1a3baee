"""The figures and the page of `evals scaling`."""

import base64
import html
import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from core_llm.stats import Estimate
from evals.scaling import Scaling, budgets_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK, _BLUE, _RED, _GREY = "#1d2433", "#3b6fd4", "#c2410c", "#7b8496"


def draw(found: Scaling) -> "Figure":
    """Four panels: parabolas, best size, and the two steps from compute to a score."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    panels = figure.subplots(2, 2)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e9ef", linewidth=0.8)
        axes.set_axisbelow(True)
    _parabolas(panels[0, 0], found)
    _best_size(panels[0, 1], found)
    _first_step(panels[1, 0], found)
    _second_step(panels[1, 1], found)
    return figure


def _parabolas(axes: Any, found: Scaling) -> None:
    import matplotlib

    groups = budgets_of(found.runs)
    colors = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.85, len(groups)))
    for color, (budget, group) in zip(colors, groups.items(), strict=True):
        axes.plot(
            [run.parameters for run in group],
            [run.loss for run in group],
            "o",
            color=color,
            label=f"{budget:.2g}",
        )
        for p in found.parabolas:
            if p.budget == budget:
                x = np.linspace(math.log(group[0].parameters), math.log(group[-1].parameters), 100)
                axes.plot(np.exp(x), np.polyval(p.coefficients[::-1], x), "-", color=color, linewidth=1.2)
                if p.inside:
                    axes.plot(p.best, p.loss, "x", color=_RED, markersize=9)
    axes.set_xscale("log")
    axes.set(
        xlabel="parameters N", ylabel="held-out loss, nats per token", title="One parabola per compute budget"
    )
    axes.legend(title="FLOPs", fontsize=8, title_fontsize=8)


def _best_size(axes: Any, found: Scaling) -> None:
    used = [p for p in found.parabolas if p.inside]
    axes.plot(
        [p.budget for p in used], [p.best for p in used], "x", color=_RED, markersize=9, label="minimum"
    )
    x = _span(found)
    axes.plot(x, [found.size.at(c) for c in x], "-", color=_INK, label=f"N* = A C^{_shown(found.exponent)}")
    if found.held_out is not None:
        axes.plot(
            found.held_out.compute,
            found.held_out.parameters,
            "D",
            color=_BLUE,
            label="held-out run (chosen, not fitted)",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set(xlabel="compute C, FLOPs", ylabel="best size N*", title="Best size for a budget")
    axes.legend(fontsize=8)


def _span(found: Scaling) -> Any:
    compute = [run.compute for run in found.runs]
    return np.geomspace(min(compute), max(compute), 60)


def _first_step(axes: Any, found: Scaling) -> None:
    """Log-likelihood over compute, or the loss where the runs bring no benchmark."""
    law, value = (found.nll, "nll") if found.nll else (found.loss, "loss")
    runs = [run for run in found.runs if getattr(run, value) is not None]
    axes.plot(
        [r.compute for r in runs], [getattr(r, value) for r in runs], ".", color=_GREY, label="all runs"
    )
    x = _span(found)
    axes.plot(x, [law.at(c) for c in x], "-", color=_INK, label="power law through the best of each budget")
    name = "negative log-likelihood" if found.nll else "held-out loss"
    for check in found.checks:
        if check.name.startswith(name) and found.held_out is not None:
            _interval(axes, found.held_out.compute, check.predicted)
            axes.plot(found.held_out.compute, check.measured, "D", color=_BLUE, label="held-out, measured")
    axes.set_xscale("log")
    axes.set_yscale("log")
    unit = "nats per character of the right answer" if found.nll else "nats per token"
    axes.set(xlabel="compute C, FLOPs", ylabel=f"{name}, {unit}", title="Step 1: compute to loss")
    axes.legend(fontsize=8)


def _interval(axes: Any, x: float, predicted: Estimate) -> None:
    axes.errorbar(
        [x],
        [predicted.value],
        yerr=[[max(0.0, predicted.value - predicted.low)], [max(0.0, predicted.high - predicted.value)]],
        fmt="s",
        color=_RED,
        capsize=4,
        label="held-out, predicted (95 %)",
    )


def _second_step(axes: Any, found: Scaling) -> None:
    axes.set(
        xlabel="negative log-likelihood, nats per character",
        ylabel="accuracy",
        title="Step 2: loss to accuracy",
    )
    runs = [run for run in found.runs if run.nll is not None and run.accuracy is not None]
    if found.sigmoid is None or found.nll is None:
        axes.text(0.5, 0.5, "no score of a benchmark", ha="center", transform=axes.transAxes)
        return
    axes.plot([r.nll for r in runs], [r.accuracy for r in runs], ".", color=_GREY, label="all runs")
    x = np.linspace(min(r.nll or 0 for r in runs) * 0.9, max(r.nll or 0 for r in runs), 200)
    axes.plot(x, found.sigmoid.at(x), "-", color=_INK, label="sigmoid")
    for check in found.checks:
        if check.name == "accuracy" and found.held_out is not None:
            _interval(axes, found.nll.at(found.held_out.compute), check.predicted)
            axes.plot(found.held_out.nll, check.measured, "D", color=_BLUE, label="held-out, measured")
    axes.invert_xaxis()
    axes.set_ylim(-0.02, 1.02)
    axes.legend(fontsize=8)


def _shown(value: Estimate, digits: int = 2) -> str:
    return f"{value.value:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def lines(found: Scaling) -> list[str]:
    """The results in plain words, one per line."""
    said = [
        f"best size: N* = A C^a with a = {_shown(found.exponent)}, from {found.size.n} budgets",
        f"loss of the best run: C^{found.loss.slope:.3f}",
    ]
    for check in found.checks:
        measured = f"{check.measured:.3g}"
        if check.measured_interval:
            measured += " [{:.3g}, {:.3g}]".format(*check.measured_interval)
        verdict = "inside" if check.inside else "OUTSIDE"
        said.append(
            f"{check.name}: predicted {_shown(check.predicted, 3)}, measured {measured}: {verdict} "
            "the interval"
        )
    return said + [f"note: {note}" for note in found.notes]


def png(figure: "Figure") -> bytes:
    """The figure as a PNG without a date, so that equal fits give equal files."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def page(found: Scaling, picture: bytes, command: str) -> str:
    """One self-contained HTML page: results, figure, every run."""
    rows = "".join(
        f"<tr><td>{html.escape(run.name)}<td>{run.compute:.3g}<td>{run.parameters:.3g}<td>{run.tokens:.3g}"
        f"<td>{run.loss:.4f}<td>{_or_dash(run.nll)}<td>{_or_dash(run.accuracy)}"
        for run in found.runs
    )
    said = "".join(f"<li>{html.escape(text)}" for text in lines(found))
    source = base64.b64encode(picture).decode()
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Scaling</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
color: #1d2433; background: #fff }}
img {{ max-width: 100% }} table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
td, th {{ text-align: right; padding: .2rem .8rem; border-bottom: 1px solid #e6e9ef }}
td:first-child, th:first-child {{ text-align: left }} code {{ overflow-wrap: anywhere }}
</style>
<h1>Scaling</h1>
<ul>{said}</ul>
<img alt="Loss over size for each compute budget, best size over compute, both steps of the prediction"
src="data:image/png;base64,{source}">
<h2>Runs</h2>
<table><tr><th>run<th>FLOPs<th>parameters<th>tokens<th>loss<th>nats per character<th>accuracy{rows}</table>
<p><code>{html.escape(command)}</code></p>
</html>
"""


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
