"""What a model answered, kept as it comes: one JSON line per sample, found again by its key.

key = SHA-256 of (task and its version, sample id, digest of the conversation with the bytes of its
media, generation settings, hash of the checkpoint and of the code). The same command run again
asks the model only for what is not there yet; changed metrics need no model at all.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from core_llm.digests import conversation_digest
from core_llm.journal import Journal
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


class RecordStore(Journal):
    """One append-only file per task under `folder`. Use it as a context manager."""

    def __init__(self, folder: Path, task: str) -> None:
        super().__init__(folder / f"{task}.jsonl")

    def add(self, keys: Sequence[str], samples: Sequence[Sample], outputs: Sequence[Output]) -> None:
        """Append a batch and force it to the disk."""
        self.append(
            {"key": key, "id": sample.id, "group": sample.group, "target": sample.target, "output": output}
            for key, sample, output in zip(keys, samples, outputs, strict=True)
        )
