"""One HTML file that needs nothing else: scorecard, plots, and the samples behind them."""

import base64
import html
import io
import json
import random
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from core_llm.chat import Audio, Image, Text
from core_llm.files import write_text
from evals import plots, scorecard
from evals.results import Entry
from evals.runner import Evaluation
from evals.tasks.base import Output, Sample

# Failures and others that the browser of samples holds per task, so that the file stays small.
FAILURES_SHOWN, OTHERS_SHOWN = 80, 40
_IMAGE_SIDE = 320  # pixels; larger images are scaled down for the report
_AUDIO_TYPES = {".ogg": "audio/ogg", ".wav": "audio/wav", ".mp3": "audio/mpeg", ".flac": "audio/flac"}


def write(folder: Path, entries: Sequence[Entry], evaluations: Sequence[Evaluation]) -> Path:
    """Write DIR/index.html and return its path."""
    path = folder / "index.html"
    write_text(path, page(entries, evaluations))
    return path


def page(entries: Sequence[Entry], evaluations: Sequence[Evaluation]) -> str:
    """The whole report as HTML."""
    template = files("evals").joinpath("report.html").read_text(encoding="utf-8")
    media = _Media()
    samples = [row for evaluation in evaluations for row in _shown(evaluation, media)]
    fields = {
        "SUBTITLE": _subtitle(entries),
        "SUMMARY": _summary(entries),
        "SCORECARD": table(entries),
        "OVERVIEW": plots.overview(entries),
        "DETAILS": "".join(_detail(e, v) for e, v in zip(entries, evaluations, strict=True)),
        "PROVENANCE": _provenance(entries),
        "DATA": _script_json({"samples": samples, "media": media.uris}),
    }
    for name, value in fields.items():
        template = template.replace(f"<!--{name}-->", value)
    return template


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


def table(entries: Sequence[Entry]) -> str:
    """The scorecard as an HTML table."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in scorecard.COLUMNS)
    body, section = [], ""
    for row in scorecard.rows(entries):
        if row.section != section:
            section = row.section
            body.append(
                f'<tr class="section {section}"><td colspan="{len(scorecard.COLUMNS)}">{section}</td></tr>'
            )
        cells = row.cells()
        badge = (
            f'<span class="badge {"doubt" if row.verdict == "no evidence" else "good"}">{row.verdict}</span>'
        )
        shown = [html.escape(cell) for cell in cells[:-1]] + [badge if row.verdict else ""]
        body.append(
            f'<tr class="{"main" if row.main else "more"}">'
            + "".join(f"<td>{cell}</td>" for cell in shown)
            + "</tr>"
        )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


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
    if evaluation.task.ask == "score":
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


class _Media:
    """Data URIs, each stored once however many samples share it."""

    def __init__(self) -> None:
        self.uris: list[str] = []
        self._index: dict[int, int] = {}

    def add(self, part: Image | Audio) -> int:
        """Index of the part's data URI."""
        if id(part.data) not in self._index:
            self._index[id(part.data)] = len(self.uris)
            self.uris.append(image_uri(part) if isinstance(part, Image) else audio_uri(part))
        return self._index[id(part.data)]


def _shown(evaluation: Evaluation, media: _Media) -> list[dict[str, Any]]:
    """Rows of the sample browser: failures first, then others, each a fixed random choice."""
    right = [_is_right(row) for row in evaluation.rows]
    order = list(range(len(right)))
    random.Random(0).shuffle(order)
    failures = [i for i in order if right[i] is False][:FAILURES_SHOWN]
    others = [i for i in order if right[i] is not False][:OTHERS_SHOWN]
    return [
        _browser_row(evaluation.task.name, evaluation.samples[i], evaluation.outputs[i], right[i], media)
        for i in sorted(failures + others)
    ]


def _is_right(row: dict[str, float]) -> bool | None:
    """None for tasks that have no right or wrong, such as perplexity."""
    return bool(row["correct"]) if "correct" in row else None


def _browser_row(
    task: str, sample: Sample, output: Output, right: bool | None, media: _Media
) -> dict[str, Any]:
    asked: list[dict[str, Any]] = []
    for message in sample.messages:
        for part in message.parts:
            if isinstance(part, Text):
                asked.append({"role": message.role, "text": part.text})
            elif isinstance(part, Image | Audio):
                kind = "image" if isinstance(part, Image) else "audio"
                asked.append({"role": message.role, kind: media.add(part)})
    return {
        "task": task,
        "id": sample.id,
        "kind": sample.kind,
        "asked": asked,
        "note": sample.note,
        "target": sample.target,
        "answer": answer_text(output),
        "right": right,
    }


def answer_text(output: Output) -> str:
    """What a model gave, for people."""
    if "text" in output:
        return str(output["text"])
    if "probability" in output:
        return f"{'unsafe' if output['unsafe'] else 'safe'}, P(unsafe) = {output['probability']:.3f}"
    if "logprob" in output:
        return f"{-output['logprob'] / output['tokens']:.3f} nats per token over {output['tokens']} tokens"
    return "the same bits" if output["equal"] else f"differs by up to {output['max_difference']:.2e}"


def image_uri(part: Image) -> str:
    """A PNG data URI of at most `_IMAGE_SIDE` pixels a side."""
    import PIL.Image

    data: Any = part.data
    picture: PIL.Image.Image
    if isinstance(data, (str, Path)):
        picture = PIL.Image.open(data)
    elif isinstance(data, bytes):
        picture = PIL.Image.open(io.BytesIO(data))
    else:
        picture = data if isinstance(data, PIL.Image.Image) else PIL.Image.fromarray(data)
    picture = picture.convert("RGB")
    picture.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return _uri("image/png", buffer.getvalue())


def audio_uri(part: Audio) -> str:
    """The file as it is where browsers play it, else Ogg Vorbis."""
    data: Any = part.data
    if isinstance(data, (str, Path)) and Path(data).suffix.lower() in _AUDIO_TYPES:
        return _uri(_AUDIO_TYPES[Path(data).suffix.lower()], _read(str(data)))
    import soundfile

    rate = part.rate
    if not isinstance(data, np.ndarray):
        data, rate = soundfile.read(io.BytesIO(data) if isinstance(data, bytes) else data, dtype="float32")
    buffer = io.BytesIO()
    soundfile.write(buffer, data, rate or 16_000, format="OGG", subtype="VORBIS")
    return _uri("audio/ogg", buffer.getvalue())


@lru_cache(maxsize=512)
def _read(path: str) -> bytes:
    return Path(path).read_bytes()


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
