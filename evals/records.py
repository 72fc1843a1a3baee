"""What a model answered, kept as it comes: one JSON line per sample, found again by its key.

key = SHA-256 of (task and its version, sample id, digest of the conversation with the bytes of its
media, generation settings, hash of the checkpoint and of the code). The same command run again
asks the model only for what is not there yet; changed metrics need no model at all.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from core_llm.errors import UserError
from evals.digests import conversation_digest
from evals.tasks.base import Output, Sample, Task


def record_key(task: Task, sample: Sample, checkpoint: str) -> str:
    """What makes two answers the same answer."""
    settings = {"ask": task.ask, "max_new_tokens": task.max_new_tokens, "temperature": 0.0}
    answer = sample.target if task.ask == "loglikelihood" else ""
    fields = [
        task.name,
        task.version,
        sample.id,
        conversation_digest(sample.messages),
        answer,
        settings,
        checkpoint,
    ]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


class RecordStore:
    """One append-only file per task under `folder`. Use it as a context manager."""

    def __init__(self, folder: Path, task: str) -> None:
        self.path = folder / f"{task}.jsonl"
        self.known: dict[str, Output] = {}
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._load()
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"records cannot be written to {self.path} ({error.strerror}); use --records DIR"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _load(self) -> None:
        """Read what is there. A crash can leave one half line: it is cut off, its sample asked again."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self.path.open("r+b") as stream:
                stream.truncate(len(whole))
        for line in whole.splitlines():
            try:
                record = json.loads(line)
                self.known[record["key"]] = record["output"]
            except (ValueError, KeyError, TypeError):
                continue  # a damaged line costs one question, not the run

    def add(self, keys: Sequence[str], samples: Sequence[Sample], outputs: Sequence[Output]) -> None:
        """Append a batch and force it to the disk."""
        assert self._file is not None
        for key, sample, output in zip(keys, samples, outputs, strict=True):
            line = {
                "key": key,
                "id": sample.id,
                "group": sample.group,
                "target": sample.target,
                "output": output,
            }
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self.known[key] = output
        self._file.flush()
        os.fsync(self._file.fileno())
