"""A run as logs of Inspect, one JSON file per task, which its viewer and `inspect_ai.log` open.

Follows the log schema (version 2) of inspect_ai 0.3.285, which is not needed to write it. What was asked is
not in results.json: the task's rows are loaded again, and taken where the digest of the conversation is the
recorded one. Two exports of one run are the same bytes under the same names.
"""

import hashlib
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from core_llm.digests import conversation_digest
from core_llm.errors import UserError
from core_llm.files import check_writable, write_text
from evals import answers, inspect_media, results
from evals.answers import Answered
from evals.report_samples import answer_text
from evals.results import Entry
from evals.tasks.base import Options, Sample, Task

SCHEMA = 2
NOT_LOADED = "(not in the results, and the rows that were asked are not there)"
# What a log has places for; all else of the provenance goes into its metadata.
_PLACED = ("date", "commit", "model", "versions", "task_version", "limit", "source")


def export(
    path: Path, out: Path, tasks: Sequence[str] = (), data_root: Path | None = None, media: bool = True
) -> list[Path]:
    """Write one log per task of results.json into `out`; returns their paths.

    data_root: where the tasks' rows are; rows that cannot be had there, or that are others than those of the
    run, are said on stderr, and their samples come without input. media: with pictures and sounds.
    Raises `UserError` for files that no run wrote, a task that they lack, a place that cannot be written.
    """
    entries, found = results.read(path), answers.read(path)
    chosen = [entry for entry in entries if not tasks or entry["task"] in tasks]
    for name in tasks:
        if name not in {entry["task"] for entry in entries}:
            known = ", ".join(str(entry["task"]) for entry in entries)
            raise UserError(f"{path} has no task '{name}'; it has {known}")
    if data_root is not None and not data_root.is_dir():
        raise UserError(f"--data-root {data_root}: no such folder")
    for entry in chosen:
        _check(entry, found.rows.get(entry["task"], {}), path)
    check_writable(out / "log.json")
    times = _times(entries)
    written = []
    for entry in chosen:
        name = entry["task"]
        task, samples, why = _loaded(entry, data_root)
        rows = list(found.rows[name].values())
        samples, why = _same(rows, samples, why)
        if why:
            print(
                f"{name}: {len(rows) - len(samples)} of {len(rows)} samples without input: {why}",
                file=sys.stderr,
            )
        log = _log(entry, task, rows, samples, times[name], media)
        place = out / f"{_clean(log['eval']['created'])}_{_clean(name)}_{log['eval']['task_id']}.json"
        write_text(place, json.dumps(log, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
        written.append(place)
    return written


def _check(entry: Entry, rows: Mapping[str, Answered], path: Path) -> None:
    """Results and answers must be of one run."""
    if not {"task", "n", "provenance"} <= entry.keys() or "date" not in entry["provenance"]:
        raise UserError(f"{path}: not what `evals run --output` wrote (a task without its provenance)")
    if len(rows) != entry["n"]:
        raise UserError(
            f"{answers.beside(path)} has {len(rows)} answers of task '{entry['task']}' and {path} tells of "
            f"{entry['n']}; both must be of one run"
        )


def _loaded(entry: Entry, data_root: Path | None) -> tuple[Task | None, dict[str, Sample], str]:
    """The task, its samples by id, and why there are none."""
    from evals.attacks import apply
    from evals.tasks import find

    made = entry["provenance"]
    name, *attacks = entry["task"].split("~")
    task = None
    try:
        (task,) = find([name])
        task = apply(task, attacks, made["seed"]) if attacks else task
        if task.name != entry["task"]:
            return None, {}, "its name does not tell all of its attacks"
        options = Options(data_root, made.get("split") or "dev", made.get("limit"), made["seed"])
        return task, {sample.id: sample for sample in task.load(options)}, ""
    except UserError as error:
        return task, {}, str(error)


def _same(rows: Sequence[Answered], samples: Mapping[str, Sample], why: str) -> tuple[dict[str, Sample], str]:
    """The samples that were asked as they are now."""
    if why:
        return {}, why
    same = {
        row.id: samples[row.id]
        for row in rows
        if row.id in samples and conversation_digest(samples[row.id].messages) == row.asked
    }
    return same, "" if len(same) == len(rows) else "the rows there are others than the run's"


def _times(entries: Sequence[Entry]) -> dict[str, tuple[str, str]]:
    """When each task began and ended, from the run's date and the tasks' seconds in their order."""
    times = {}
    passed = 0.0
    for entry in entries:
        begun = datetime.fromisoformat(entry["provenance"]["date"]).astimezone(UTC)
        start = begun + timedelta(seconds=passed)
        passed += float(entry.get("seconds", 0.0))
        end = begun + timedelta(seconds=passed)
        times[entry["task"]] = (start.isoformat(timespec="seconds"), end.isoformat(timespec="seconds"))
    return times


def _log(
    entry: Entry,
    task: Task | None,
    rows: Sequence[Answered],
    samples: Mapping[str, Sample],
    times: tuple[str, str],
    media: bool,
) -> dict[str, Any]:
    """One log. The order of its fields is the format's: readers of the head stop at the samples."""
    spec = _spec(entry, task, rows, times[0])
    scored = results_of(entry, rows)
    if scored["headline"]:
        spec["headline_metric"] = scored["headline"]
    settings = spec["model_generate_config"]
    how = task.ask if task else "unknown"
    return {
        "version": SCHEMA,
        "status": "success",
        "eval": spec,
        "plan": {
            "name": "plan",
            "steps": [{"solver": how, "params": settings, "params_passed": settings}],
            "config": settings,
        },
        "results": scored,
        "stats": {"started_at": times[0], "completed_at": times[1], "model_usage": {}, "role_usage": {}},
        "invalidated": False,
        "tags": [],
        "metadata": spec["metadata"],
        "samples": [
            _sample(row, samples.get(row.id), f"{spec['eval_id']}-{n}", spec["model"], media)
            for n, row in enumerate(rows)
        ],
    }


def _spec(entry: Entry, task: Task | None, rows: Sequence[Answered], started: str) -> dict[str, Any]:
    made = entry["provenance"]
    run = _digest(made["date"], made.get("command"), made["model"], made.get("model_sha256"))
    commit = made.get("commit") or ""
    scorer = {
        "name": _main_column(rows),
        "options": {},
        "metrics": [{"name": name} for name in entry["metrics"]],
    }
    spec = {
        "eval_id": _digest(run, entry["task"], "eval"),
        "run_id": run,
        "created": started,
        "task": entry["task"],
        "task_id": _digest(run, entry["task"]),
        "task_version": made.get("task_version", 0),
        "task_display_name": entry["task"],
        "task_description": entry.get("title"),
        "task_attribs": {},
        "task_args": {},
        "task_args_passed": {},
        "tags": [],
        "dataset": {"name": made.get("source"), "samples": len(rows), "sample_ids": [row.id for row in rows]},
        "model": made["model"],
        "model_generate_config": _settings(task),
        "model_args": {},
        "config": {"limit": made.get("limit"), "epochs": 1},
        "packages": made.get("versions", {}),
        "metadata": {
            **{name: value for name, value in made.items() if name not in _PLACED},
            "section": entry.get("section"),
            "interval": entry.get("interval"),
        },
        "scorers": [scorer],
    }
    if commit:
        dirty = commit.endswith("+changes")
        spec["revision"] = {
            "type": "git",
            "origin": "",
            "commit": commit.removesuffix("+changes"),
            "dirty": dirty,
        }
    return spec


def _settings(task: Task | None) -> dict[str, Any]:
    if task is None or task.ask != "generate":
        return {}
    return {"max_tokens": task.max_new_tokens, "temperature": 0.0}


def results_of(entry: Entry, rows: Sequence[Answered]) -> dict[str, Any]:
    """Metrics with our intervals as their metadata; what the rows leave undefined is only named."""
    column = _main_column(rows)
    defined = {name: found for name, found in entry["metrics"].items() if found["value"] is not None}
    metrics = {
        name: {"name": name, "value": found["value"], "params": {}, "metadata": {"ci95": found["ci95"]}}
        for name, found in defined.items()
    }
    beside = {
        name: entry.get(name) for name in ("interval", "controls", "no_evidence_against", "kinds", "extra")
    }
    return {
        "total_samples": len(rows),
        "completed_samples": len(rows),
        "scores": [
            {
                "name": column,
                "scorer": column,
                "reducer": None,
                "scored_samples": len(rows),
                "unscored_samples": 0,
                "params": {},
                "metrics": metrics,
                "metadata": {
                    **beside,
                    "undefined": [name for name in entry["metrics"] if name not in defined],
                },
            }
        ],
        "headline": {"scorer": column, "score": column, "metric": next(iter(defined))} if defined else None,
    }


def _main_column(rows: Sequence[Answered]) -> str:
    """The column of the rows' sums under which the metrics stand: right or wrong, where there is that."""
    return next((name for row in rows for name in row.row if name == "correct"), next(iter(rows[0].row)))


def _sample(row: Answered, sample: Sample | None, key: str, model: str, media: bool) -> dict[str, Any]:
    """One sample. Each sum of its row is a score of its own; what the model gave stands under the output."""
    attachments: dict[str, str] = {}
    asked = inspect_media.messages(sample.messages, key, attachments if media else None) if sample else None
    choices = sample.choices if sample else ()
    said = {
        "id": f"{key}-answer",
        "role": "assistant",
        "content": answer_text(dict(row.output), choices),
        "source": "generate",
        "model": model,
    }
    return {
        "id": row.id,
        "epoch": 1,
        "input": NOT_LOADED if asked is None else asked,
        "choices": list(choices) or None,
        "target": list(sample.answers) if sample and sample.answers else row.target,
        "messages": [*(asked or []), said],
        "output": {
            "model": model,
            "choices": [{"message": said, "stop_reason": "unknown"}],
            "completion": said["content"],
            "metadata": _finite(dict(row.output)),
        },
        "scores": {
            name: {"value": value, "answer": said["content"]}
            for name, value in row.row.items()
            if math.isfinite(value)
        },
        "metadata": {
            "group": row.group,
            "kind": row.kind,
            "asked_sha256": row.asked,
            "note": sample.note if sample else "",
        },
        "store": {},
        "events": [],
        "model_usage": {},
        "uuid": key,
        "attachments": attachments,
    }


def _finite(value: Any) -> Any:
    """What a model gave, with a log-likelihood of minus infinity as text: JSON has no such number."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _digest(*fields: Any) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:22]


def _clean(text: str) -> str:
    """As part of a name that Inspect lists: begins with the time, its parts joined by "_"."""
    return re.sub(r"[^\w.~-]|_", "-", text)
