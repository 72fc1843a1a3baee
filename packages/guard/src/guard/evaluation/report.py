"""What an evaluation found: tables on the terminal, figures, one HTML page that needs nothing else, JSON."""

import base64
import html
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core_llm.files import write_bytes, write_text
from core_llm.stats import LOWER_IS_BETTER, Estimate
from guard.evaluation import plots
from guard.evaluation.measure import AFTER, BEFORE, Measured

if TYPE_CHECKING:
    from guard.evaluation.run import Evaluation

TITLES = {
    "auprc": "AUPRC", "auroc": "AUROC", "f1": "F1", "fpr": "FPR", "recall": "recall",
    "recall_at_1_fpr": "recall at 1 % FPR", "ece": "ECE", "brier": "Brier",
}  # fmt: skip
# A constant ranks and decides nothing: how often it is "right" at a threshold is no yardstick.
_SHOWN = ("auprc", "f1", "fpr", "recall", "recall_at_1_fpr", "ece")

_INTERVAL = len("(0.000–0.000)")


def title(metric: str) -> str:
    """The metric's name with an arrow to where better is."""
    return f"{TITLES[metric]} {'↓' if metric in LOWER_IS_BETTER else '↑'}"


def number(estimate: Estimate | None) -> str:
    """Value with its interval; a dash where it is not defined."""
    if estimate is None or math.isnan(estimate.value):
        return "–"
    return f"{estimate.value:.3f} ({estimate.low:.3f} – {estimate.high:.3f})"


def sentences(result: "Evaluation") -> Iterator[str]:
    """What the tables do not say by themselves."""
    if result.fitted is not None:
        fitted = result.fitted
        yield (
            f"Temperature {fitted.temperature:.3f}, fitted on {fitted.rows:,} validation rows "
            f"({fitted.unsafe:,} unsafe) that no figure is of: negative log-likelihood "
            f"{fitted.nll_before:.4f} before, {fitted.nll_after:.4f} after."
        )
    if result.before != 1.0:
        yield f"The guard came with temperature {result.before:.3f}; “guard” is as it came."
    yield from (f"No temperature was fitted: {note}." for note in result.notes)
    for each in result.sets:
        if each.luck is not None:
            last = AFTER if AFTER in each.figures else BEFORE
            ece = each.figures[last]["ece"].value
            verdict = "within" if ece <= each.luck.high else "above"
            yield (
                f"{each.name}: chance alone leaves a calibration error of {each.luck.low:.3f} to "
                f"{each.luck.high:.3f} on these rows; the guard's, {ece:.3f}, is {verdict} that."
            )
        for who in each.no_evidence:
            lead = each.differences[who]["auprc"]
            told = (
                "the guard ranks worse than"
                if lead.high < 0
                else "no evidence that the guard ranks better than"
            )
            yield f"{each.name}: {told} {who} (AUPRC {_signed(lead)})."


def _signed(estimate: Estimate) -> str:
    return f"{estimate.value:+.3f}, {estimate.low:+.3f} – {estimate.high:+.3f}"


def table(each: Measured) -> tuple[list[str], list[list[str]]]:
    """Head and lines of a set's table."""
    metrics = [metric for metric in _SHOWN if metric in next(iter(each.figures.values()))]
    head = ["classifier", *map(title, metrics), "guard's lead in " + TITLES[metrics[0]], "learnt from"]
    lines = []
    for who, figures in each.figures.items():
        lead = each.differences.get(who, {}).get(metrics[0])
        lines.append(
            [
                who,
                *(number(figures[metric]) for metric in metrics),
                _signed(lead) if lead is not None and not math.isnan(lead.value) else "",
                each.scored[who].learnt,
            ]
        )
    return head, lines


def subtitle(each: Measured) -> str:
    """Size of a set in words."""
    return (
        f"{each.rows:,} test rows, {each.unsafe:,} unsafe, {each.groups:,} contexts; "
        "95 % intervals by bootstrap over contexts"
    )


def show(result: "Evaluation") -> None:
    """The tables on the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for each in result.sets:
        head, lines = table(each)
        # A classifier per column, intervals on lines of their own: it must fit on 80 characters.
        shown = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
        shown.title, shown.caption = each.title, subtitle(each)
        shown.add_column("", width=8)
        for line in lines:
            shown.add_column(line[0], min_width=_INTERVAL)
        for row, name in enumerate(head[1:], start=1):
            shown.add_row(name, *(line[row].replace(" (", "\n(").replace(" – ", "–") for line in lines))
        console.print(shown)
    for sentence in sentences(result):
        console.print(sentence, highlight=False, markup=False)


def write(folder: Path, result: "Evaluation") -> Path:
    """Write report.html, evaluation.json and a PNG per figure; returns the page's path."""
    drawn = {each.name: dict(plots.figures(each)) for each in result.sets}
    for name, figures in drawn.items():
        for kind, png in figures.items():
            write_bytes(folder / f"{kind}_{name}.png", png)
    write_text(folder / "evaluation.json", json.dumps(as_json(result), indent=2, allow_nan=False) + "\n")
    write_text(folder / "report.html", page(result, drawn))
    return folder / "report.html"


def as_json(result: "Evaluation") -> dict[str, Any]:
    """All figures; an undefined one is null."""
    return {
        "guard": result.guard,
        "threshold": result.threshold,
        "temperature": {
            "before": result.before,
            "fitted": None if result.fitted is None else asdict(result.fitted),
            "validation_rows": result.validation,
        },
        "notes": result.notes,
        "sets": {
            each.name: {
                "title": each.title,
                "rows": each.rows,
                "unsafe": each.unsafe,
                "groups": each.groups,
                "classifiers": {who: _estimates(figures) for who, figures in each.figures.items()},
                "learnt_from": {who: s.learnt for who, s in each.scored.items() if s.learnt},
                "differences": {who: _estimates(d) for who, d in each.differences.items()},
                "no_evidence_against": each.no_evidence,
                "calibration_error_by_chance": None if each.luck is None else _estimate(each.luck),
                "reliability": {who: [asdict(b) for b in bins] for who, bins in each.bins.items()},
            }
            for each in result.sets
        },
        "provenance": result.provenance,
    }


def _estimates(estimates: dict[str, Estimate]) -> dict[str, Any]:
    return {name: _estimate(estimate) for name, estimate in estimates.items()}


def _estimate(estimate: Estimate) -> dict[str, Any]:
    def clean(value: float) -> float | None:
        return None if math.isnan(value) else value

    return {"value": clean(estimate.value), "ci95": [clean(estimate.low), clean(estimate.high)]}


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1d2433;max-width:1180px;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px;margin:.6rem 0}
.wide{overflow-x:auto}th{font-weight:600}
th,td{padding:.35rem .7rem;text-align:left;border-bottom:1px solid #e6e9ef;white-space:nowrap}
small,.facts{color:#6a7385}figure{margin:0}.figures{display:flex;flex-wrap:wrap;gap:1.2rem}
img{max-width:100%;width:520px;border-radius:4px}h2{margin:2.2rem 0 0}
@media(prefers-color-scheme:dark){body{color:#e4e7ee;background:#14171f}
th,td{border-color:#2c3240}small,.facts{color:#98a1b3}}
"""


def page(result: "Evaluation", drawn: dict[str, dict[str, bytes]]) -> str:
    """The report as one HTML page, pictures included."""
    made = result.provenance
    facts = [
        f"guard <b>{html.escape(result.guard)}</b>",
        html.escape(str(made.get("date", ""))[:16].replace("T", " ")),
    ]
    if made.get("commit"):
        facts.append(f"commit {html.escape(made['commit'][:10])}")
    facts += [
        html.escape(str(made.get("hardware", ""))),
        f"<code>{html.escape(str(made.get('command', '')))}</code>",
    ]
    said = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences(result))
    body = "".join(_section(each, drawn) for each in result.sets)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Guard evaluation: {html.escape(result.guard)}</title><style>{_STYLE}</style>"
        f"<h1>Guard evaluation</h1><p class=facts>{' · '.join(facts)}</p>"
        f"<ul>{said}</ul>{body}</html>\n"
    )


def _section(each: Measured, drawn: dict[str, dict[str, bytes]]) -> str:
    head, lines = table(each)
    rows = "".join(_row(line, "td") for line in lines)
    shown = "".join(
        f'<figure><img alt="{html.escape(plots.ALT[kind])}" src="{_uri(png)}"></figure>'
        for kind, png in drawn[each.name].items()
    )
    return (
        f"<h2>{html.escape(each.title)} <small>{html.escape(each.name)}</small></h2>"
        f"<p class=facts>{subtitle(each)}</p><div class=wide><table>{_row(head, 'th')}{rows}</table></div>"
        f"<div class=figures>{shown}</div>"
    )


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _row(cells: list[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
