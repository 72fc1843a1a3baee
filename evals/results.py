"""results.json: one object per task, written atomically, read strictly."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core_llm.errors import UserError
from core_llm.files import write_text

if TYPE_CHECKING:
    from evals.runner import Evaluation

Entry = dict[str, Any]


def entry(evaluation: "Evaluation", provenance: dict[str, Any]) -> Entry:
    """One task's object of results.json."""
    from evals.runner import metrics_json

    task = evaluation.task
    return {
        "task": task.name,
        "n": evaluation.scored.n,
        "metrics": metrics_json(evaluation.scored.estimates),
        "controls": {control.name: control.as_json() for control in evaluation.controls},
        "no_evidence_against": evaluation.without_evidence,
        "kinds": {kind.name: kind.as_json() for kind in evaluation.kinds},
        "extra": evaluation.extra,
        "title": task.title,
        "section": task.section,
        "interval": evaluation.interval,
        "seconds": round(evaluation.seconds, 2),
        "model_seconds": round(evaluation.model_seconds, 2),
        "provenance": {
            **provenance,
            "source": task.source,
            "licence": task.licence,
            "task_version": task.version,
            "dataset_sha256": evaluation.fingerprint,
            "rows_answered_before": evaluation.reused,
        },
    }


def write(path: Path, entries: Sequence[Entry]) -> None:
    """Write results.json."""
    write_text(path, json.dumps(list(entries), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read(path: Path) -> list[Entry]:
    """Read results.json, or the tasks of a scorecard.json; raises `UserError` for a file that is neither."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a results file ({error})") from error
    if isinstance(entries, dict) and "scorecard" in entries:
        entries = entries.get("tasks")
    if not isinstance(entries, list) or not all(isinstance(e, dict) and "metrics" in e for e in entries):
        raise UserError(f"{path}: not a results file (expected a list of tasks with metrics)")
    return entries
