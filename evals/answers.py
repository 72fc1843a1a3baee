"""Every answer of a run with its score, beside results.json: one JSON line per sample, in the tasks' order.

The first line says where they come from; it holds no date, so that two runs with one seed give equal files.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core_llm.digests import conversation_digest
from core_llm.errors import UserError
from core_llm.files import write_text
from evals.results import Entry

if TYPE_CHECKING:
    from evals.runner import Evaluation

# What differs between two runs of one command although nothing of the result does.
_OF_THE_MOMENT = ("date", "rows_answered_before")
_FIELDS = ("task", "id", "group", "kind", "target", "asked")


@dataclass(frozen=True)
class Answered:
    """One sample of one task. asked: digest of the conversation. row: what metrics are computed from."""

    task: str
    id: str
    group: str
    kind: str
    target: str
    asked: str
    output: Mapping[str, Any]
    row: Mapping[str, float]


@dataclass(frozen=True)
class Answers:
    """A file of answers. metrics: of each task, the headline first."""

    header: Mapping[str, Any]
    metrics: Mapping[str, tuple[str, ...]]
    rows: Mapping[str, Mapping[str, Answered]]


def beside(results: Path) -> Path:
    """The file of answers that belongs to a file of results."""
    return results.with_suffix(".samples.jsonl")


def write(path: Path, entries: Sequence[Entry], evaluations: "Sequence[Evaluation]") -> None:
    """Write the whole file or nothing."""
    origins = {entry["task"]: _lasting(entry["provenance"]) for entry in entries}
    lines: list[dict[str, Any]] = [
        {"answers_of": origins, "metrics": {e.task.name: list(e.task.metrics) for e in evaluations}}
    ]
    for done in evaluations:
        for sample, output, row in zip(done.samples, done.outputs, done.rows, strict=True):
            lines.append(
                {
                    "task": done.task.name,
                    "id": sample.id,
                    "group": sample.group,
                    "kind": sample.kind,
                    "target": sample.target,
                    "asked": conversation_digest(sample.messages),
                    "output": output,
                    "row": {name: float(value) for name, value in row.items()},
                }
            )
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _lasting(provenance: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in provenance.items() if name not in _OF_THE_MOMENT}


def read(path: Path) -> Answers:
    """The answers of a run, by its results.json or by their own file.

    Raises `UserError` for a file that is missing or damaged, with the command that makes one.
    """
    place = path if path.name.endswith(".samples.jsonl") else beside(path)
    try:
        header, *lines = [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines()]
        metrics = {task: tuple(names) for task, names in header["metrics"].items()}
        rows: dict[str, dict[str, Answered]] = {task: {} for task in metrics}
        for line in lines:
            fields = {name: str(line[name]) for name in _FIELDS}
            row = {name: float(value) for name, value in line["row"].items()}
            rows[fields["task"]][fields["id"]] = Answered(**fields, output=dict(line["output"]), row=row)
        return Answers(header["answers_of"], metrics, rows)
    except FileNotFoundError:
        raise UserError(
            f"{place}: no such file; `evals run TASKS --model MODEL --output RESULTS.json` writes it beside "
            "its results"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{place}: not a file of answers that `evals run --output` wrote ({error})"
        ) from error
