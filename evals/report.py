"""One HTML file that needs nothing else: scorecard, plots, and the samples behind them."""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from core_llm.files import write_text
from evals import plots, scorecard
from evals.report_samples import FAILURES_SHOWN, OTHERS_SHOWN, Media, browser_rows
from evals.results import Entry
from evals.runner import Evaluation
from evals.scorecard import Row


@dataclass(frozen=True)
class Section:
    """A part of the page that only some reports have. body: HTML."""

    id: str
    title: str
    body: str


def write(folder: Path, entries: Sequence[Entry], evaluations: Sequence[Evaluation]) -> Path:
    """Write DIR/index.html and return its path."""
    path = folder / "index.html"
    write_text(path, page(entries, evaluations))
    return path


def page(
    entries: Sequence[Entry],
    evaluations: Sequence[Evaluation],
    sections: Sequence[Section] = (),
    rows: Sequence[Row] | None = None,
) -> str:
    """The whole report as HTML. sections: stand before the table; rows: its rows, by default the tasks'."""
    template = files("evals").joinpath("report.html").read_text(encoding="utf-8")
    media = Media()
    samples = browser_rows(evaluations, media)
    fields = {
        "SUBTITLE": _subtitle(entries),
        "NAVIGATION": "".join(f'<a href="#{s.id}">{html.escape(s.title.lower())}</a>' for s in sections),
        "SUMMARY": _summary(entries),
        "SECTIONS": "".join(f'<h2 id="{s.id}">{html.escape(s.title)}</h2>{s.body}' for s in sections),
        "SCORECARD": table(entries, rows),
        "OVERVIEW": plots.overview(entries),
        "DETAILS": "".join(_detail(e, v) for e, v in zip(entries, evaluations, strict=True)),
        "PROVENANCE": _provenance(entries),
        "KEPT": _kept(media),
        "DATA": _script_json({"samples": samples, "media": media.uris}),
    }
    for name, value in fields.items():
        template = template.replace(f"<!--{name}-->", value)
    return template


def _kept(media: Media) -> str:
    """What of the rows the file holds."""
    said = f"Per task at most {FAILURES_SHOWN} failures and {OTHERS_SHOWN} other rows are kept in this file."
    if media.left_out:
        said += f" {media.left_out:,} pictures or sounds are left out, so that it stays small."
    return said


def _script_json(value: Any) -> str:
    """JSON that cannot end the <script> element that holds it."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")


def _subtitle(entries: Sequence[Entry]) -> str:
    provenance = entries[0]["provenance"]
    parts = [
        f"model <b>{html.escape(provenance['model'])}</b>",
        html.escape(provenance["date"][:16].replace("T", " ") + " UTC"),
    ]
    if provenance["commit"]:
        parts.append(f"commit {html.escape(provenance['commit'][:10])}")
    parts.append(html.escape(provenance["hardware"]))
    return " · ".join(parts)


def _summary(entries: Sequence[Entry]) -> str:
    """One tile per task: headline, interval, control."""
    tiles = []
    for row in scorecard.rows(entries):
        if not row.main:
            continue
        doubt = row.verdict == "no evidence"
        beside = (
            f"control: {row.control}"
            if row.control
            else (f"reference: {row.reference}" if row.reference else "")
        )
        tiles.append(
            f'<a class="tile {row.section}" href="#task-{row.task}"><span class="name">{row.task}</span>'
            f'<span class="score">{row.score}</span><span class="metric">{row.metric}</span>'
            f'<span class="beside">{html.escape(row.interval)}<br>{html.escape(beside)}</span>'
            + ('<span class="badge doubt">no evidence</span>' if doubt else "")
            + "</a>"
        )
    return "".join(tiles)


def table(entries: Sequence[Entry], rows: Sequence[Row] | None = None) -> str:
    """The scorecard as an HTML table."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in scorecard.COLUMNS)
    body, section = [], ""
    for row in scorecard.rows(entries) if rows is None else rows:
        if row.section != section:
            section = row.section
            body.append(
                f'<tr class="section {section}"><td colspan="{len(scorecard.COLUMNS)}">{section}</td></tr>'
            )
        cells = row.cells()
        badge = f'<span class="badge {badge_class(row.verdict)}">{row.verdict}</span>'
        shown = [html.escape(cell) for cell in cells[:-1]] + [badge if row.verdict else ""]
        body.append(
            f'<tr class="{"main" if row.main else "more"}">'
            + "".join(f"<td>{cell}</td>" for cell in shown)
            + "</tr>"
        )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def badge_class(verdict: str) -> str:
    """The look of a verdict."""
    return {"no evidence": "doubt", "gap": "bad", "no gap seen": "none"}.get(verdict, "good")


def _detail(entry: Entry, evaluation: Evaluation) -> str:
    """A task's section: facts, all its comparisons, and its figures."""
    facts = [
        f"{entry['n']:,} rows",
        html.escape(entry["interval"]),
        f"source: {html.escape(entry['provenance']['source'])}",
        f"licence: {html.escape(entry['provenance']['licence'])}",
        f"{entry['seconds']:.1f} s",
    ]
    facts += [f"{html.escape(name.replace('_', ' '))} {value:.3f}" for name, value in entry["extra"].items()]
    figures = []
    if entry["kinds"]:
        figures.append(("by kind of row", plots.by_kind(entry)))
    if "probability" in evaluation.rows[0]:
        probability = np.array([row["probability"] for row in evaluation.rows])
        label = np.array([row["label"] for row in evaluation.rows])
        figures.append(("precision and recall", plots.precision_recall(probability, label)))
        figures.append(("calibration", plots.reliability(probability, label)))
    drawn = "".join(f"<figure>{svg}<figcaption>{name}</figcaption></figure>" for name, svg in figures)
    return (
        f'<section class="task {entry["section"]}" id="task-{entry["task"]}"><h3>{entry["task"]}'
        f'<small>{html.escape(entry["title"])}</small></h3><p class="facts">{" · ".join(facts)}</p>'
        f"<div class=body>{_comparisons(entry)}<div class=figures>{drawn}</div></div></section>"
    )


def _comparisons(entry: Entry) -> str:
    """The score with every control and reference, all metrics."""
    names = list(entry["metrics"])
    head = "".join(f"<th>{scorecard.arrow(name)}</th>" for name in names)
    lines = [("the model", "score", entry["n"], entry["metrics"])]
    lines += [(name, c["role"], c["n"], c["metrics"]) for name, c in entry["controls"].items()]
    body = []
    for name, role, n, metrics in lines:
        cells = "".join(
            f"<td>{_with_interval(metric, metrics[metric]) if metric in metrics else ''}</td>"
            for metric in names
        )
        body.append(
            f'<tr class="{role}"><td>{html.escape(name)}</td><td>{role}</td><td>{n:,}</td>{cells}</tr>'
        )
    head = f"<thead><tr><th></th><th></th><th>rows</th>{head}</tr></thead>"
    return f"<table class=compare>{head}<tbody>{''.join(body)}</tbody></table>"


def _with_interval(metric: str, estimate: dict[str, Any]) -> str:
    low, high = estimate["ci95"]
    value = scorecard.number(metric, estimate["value"])
    if low is None or low == high:
        return value
    return f"{value} <i>{scorecard.number(metric, low)} – {scorecard.number(metric, high)}</i>"


def _provenance(entries: Sequence[Entry]) -> str:
    provenance = entries[0]["provenance"]
    shown = {
        "command": provenance["command"],
        "commit": provenance["commit"] or "not a git checkout",
        "seed": provenance["seed"],
        "hardware": provenance["hardware"],
        "python": provenance["python"],
        "versions": ", ".join(f"{name} {version}" for name, version in provenance["versions"].items()),
        "model files (SHA-256)": ", ".join(
            f"{kind} {value[:16]}…" for kind, value in provenance["model_sha256"].items()
        ),
    }
    return "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in shown.items())
