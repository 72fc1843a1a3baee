"""What a model answered, kept as it comes: one JSON line per sample, found again by its key.

key = SHA-256 of (task and its version, sample id, digest of the conversation with the bytes of its
media, generation settings, hash of the checkpoint and of the code). The same command run again
asks the model only for what is not there yet; changed metrics need no model at all.
"""

import glob
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from core_llm import processes
from core_llm.digests import conversation_digest
from core_llm.errors import UserError
from core_llm.files import write_text
from core_llm.journal import Journal
from evals.tasks.base import Output, Sample, Task


def record_key(task: Task, sample: Sample, checkpoint: str, digest: str | None = None) -> str:
    """What makes two answers the same answer. digest: of the sample's conversation, where it is known."""
    settings = {"ask": task.ask, "max_new_tokens": task.max_new_tokens, "temperature": 0.0}
    answer: str | list[str] = sample.target if task.ask == "loglikelihood" else ""
    if task.ask == "choices":
        answer = list(sample.choices)
    fields = [
        task.name,
        task.version,
        sample.id,
        digest or conversation_digest(sample.messages),
        answer,
        settings,
        checkpoint,
    ]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


class RecordStore(Journal):
    """One append-only file per task under `folder`. Use it as a context manager.

    Under torchrun each further process writes a file of its own, TASK.rankN.jsonl; `merge` puts all into the
    one of the first. What a killed run has left in such files is taken over at the next start.
    """

    def __init__(self, folder: Path, task: str) -> None:
        self.folder, self.task = folder, task
        self._fresh: list[dict[str, Any]] = []
        super().__init__(
            folder / (f"{task}.jsonl" if processes.is_writer() else _part(task, processes.rank()))
        )

    def __enter__(self) -> Self:
        with processes.writer_first():
            super().__enter__()
            if processes.is_writer():
                self._take_over()
        for known in processes.gathered(self.known) if processes.count() > 1 else []:
            self.known.update(known)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if error is None and not processes.is_writer():
            self.path.unlink(missing_ok=True)

    def add(self, keys: Sequence[str], samples: Sequence[Sample], outputs: Sequence[Output]) -> None:
        """Append a batch and force it to the disk."""
        records = [
            {"key": key, "id": sample.id, "group": sample.group, "target": sample.target, "output": output}
            for key, sample, output in zip(keys, samples, outputs, strict=True)
        ]
        self.append(records)
        if processes.count() > 1:
            self._fresh += records

    def merge(self, order: Sequence[str]) -> None:
        """Give every process what the others have got; the first one keeps it, in the order of keys."""
        if processes.count() == 1:
            return
        found = {record["key"]: record for part in processes.gathered(self._fresh) for record in part}
        if processes.is_writer():
            own = {record["key"] for record in self._fresh}
            self.append(found[key] for key in order if key in found and key not in own)
        self.known.update((key, record["output"]) for key, record in found.items())
        self._fresh = []
        processes.gathered(None)  # nobody removes a file before the first process has written what was in it

    def _take_over(self) -> None:
        """Append what other processes of a killed run had answered, and remove their files."""
        for path in sorted(self.folder.glob(_part(glob.escape(self.task), "*"))):
            lines = path.read_bytes().split(b"\n")[:-1]  # a half line at the end was never finished
            found = {record["key"]: record for line in lines if (record := _parsed(line)) is not None}
            self.append(record for key, record in found.items() if key not in self.known)
            path.unlink()


def _part(task: str, rank: int | str) -> str:
    return f"{task}.rank{rank}.jsonl"


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        return record if "output" in record and "key" in record else None
    except (ValueError, TypeError):
        return None


def claim(folder: Path, task: Task, rows: str, selection: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Write TASK.runs.json, which says where the answers of each run come from, beside the answers.

    rows: digest of the samples. selection: what chose them (split, limit, seed, model). run: provenance; its
    `harness_sha256` is the code that made the samples.
    Raises `UserError` where the same selection by the same code once gave other samples: the dataset has
    changed under a run that is to be continued.
    """
    if not processes.is_writer():
        return
    path = folder / f"{task.name}.runs.json"
    known = _runs(path)
    key = hashlib.sha256(
        json.dumps({**selection, "version": task.version}, sort_keys=True).encode()
    ).hexdigest()
    before = known.get(key, {})
    if before.get("harness_sha256") == run["harness_sha256"] and before["dataset_sha256"] != rows:
        raise UserError(
            f"the rows of task '{task.name}' have changed since {folder} was begun; give the old data back, "
            "or start anew with --records DIR"
        )
    known[key] = {**run, **selection, "task": task.name, "task_version": task.version, "dataset_sha256": rows}
    try:
        write_text(path, json.dumps(known, indent=1, sort_keys=True, default=str) + "\n")
    except OSError as error:
        raise UserError(
            f"records cannot be written to {path} ({error.strerror}); use --records DIR"
        ) from error


def _runs(path: Path) -> dict[str, dict[str, Any]]:
    """Runs by the digest of their selection; what is no such file counts as none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    runs = found if isinstance(found, dict) else {}
    return {k: v for k, v in runs.items() if isinstance(v, dict) and "dataset_sha256" in v}
