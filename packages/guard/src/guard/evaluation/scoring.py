"""Scores of a guard on rows, kept as they come."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core_llm.chat import Message
from core_llm.digests import code_digest, conversation_digest
from core_llm.files import read_json
from core_llm.journal import Journal
from guard.evaluation.rows import Row
from guard.verdict import Verdict

Judge = Callable[[Sequence[Sequence[Message]]], list[Verdict]]

# What a temperature or a threshold changes in the settings, it does not change in the scores.
_NOT_IN_THE_SCORES = ("temperature", "calibration", "threshold")


@dataclass(frozen=True)
class Score:
    """What the guard said of a row at temperature 1; see `guard.guard.Verdict`."""

    probability: float
    mass: float
    unsafe: bool


def fingerprint(folder: Path, policy: str) -> str:
    """SHA-256 of what decides a score: the guard's files, its policy and the code that runs them."""
    import core_llm

    digest = hashlib.sha256(policy.encode())
    for path in sorted(folder.iterdir()):
        if path.name == "guard.json":
            kept = {k: v for k, v in read_json(path).items() if k not in _NOT_IN_THE_SCORES}
            digest.update(json.dumps(kept, sort_keys=True).encode())
        elif path.name != "calibration.json" and path.suffix in (".json", ".safetensors", ".model", ".jinja"):
            digest.update(path.name.encode())
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    package = Path(__file__).parents[1]
    digest.update(code_digest(Path(core_llm.__file__).parent).encode())
    for name in ("guard.py", "prompt.py", "engine.py", "chat_template.py", "released.py"):
        if (package / name).exists():
            digest.update((package / name).read_bytes())
    return digest.hexdigest()


def score(
    rows: Sequence[Row], judge: Judge, identity: str, path: Path, batch_size: int, title: str
) -> list[Score]:
    """Scores of `rows`, in order; what `path` holds already is not asked again.

    identity: `fingerprint` of the guard. Progress goes to stderr.
    """
    from tqdm import tqdm

    keys = [
        hashlib.sha256(f"{identity}:{conversation_digest(row.messages)}".encode()).hexdigest() for row in rows
    ]
    with Journal(path, "--out") as journal:
        todo = {key: row for key, row in zip(keys, rows, strict=True) if not _known(journal.known.get(key))}
        # Longest first: memory runs out at once or never, and the time left is not underestimated.
        order = sorted(todo, key=lambda key: (-sum(len(m.text) for m in todo[key].messages), key))
        with tqdm(
            total=len(keys), initial=len(keys) - len(order), desc=title, unit="row", leave=False
        ) as bar:
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                verdicts = judge([todo[key].messages for key in batch])
                journal.append(
                    {"key": key, "output": {"probability": v.probability, "mass": v.mass, "unsafe": v.unsafe}}
                    for key, v in zip(batch, verdicts, strict=True)
                )
                bar.update(len(batch))
        return [Score(**journal.known[key]) for key in keys]


def _known(output: dict[str, Any] | None) -> bool:
    return output is not None and set(output) == {"probability", "mass", "unsafe"}
