"""What may not be trained on: near-duplicates of held-out conversations and contexts, and repetitions."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core_llm import processes
from core_llm.data import near_duplicates
from core_llm.data.near_duplicates import THRESHOLD, NearDuplicates, repeated
from guard.examples import Example

Progress = Callable[[Sequence[Example]], Iterable[Example]]


@dataclass(frozen=True)
class Dropped:
    """Rows of one set that were left out. held_out: near-duplicates of held-out rows or of their contexts;
    repeated: near-duplicates of a row of the same set and verdict.
    """

    held_out: int = 0
    repeated: int = 0


@dataclass(frozen=True)
class Found:
    """Numbers of the rows that `Dropped` counts."""

    held_out: tuple[int, ...] = ()
    repeated: tuple[int, ...] = ()


def text_of(example: Example) -> str:
    """All that was said."""
    return "\n".join(message.text for message in example.messages)


class HeldOut:
    """The conversations that figures are of."""

    def __init__(self, examples: Iterable[Example], threshold: float = THRESHOLD) -> None:
        held_out = list(examples)
        self.examples = held_out
        self._texts = NearDuplicates(map(text_of, held_out), threshold)
        self._contexts = NearDuplicates(dict.fromkeys(e.context for e in held_out), threshold)

    def holds(self, example: Example) -> bool:
        """Whether this conversation, or the context that it shares with others, is among them."""
        return bool(self._contexts.find(example.context) or self._texts.find(text_of(example)))


def decontaminated(
    examples: Sequence[Example],
    held_out: HeldOut,
    threshold: float = THRESHOLD,
    once: bool = False,
    progress: Progress = iter,
    cache: Path | None = None,
) -> tuple[list[Example], Dropped]:
    """The rows that may be trained on, in order, and how many were dropped why.

    once: drop repetitions too. Of rows that repeat each other with the same verdict the first is kept; with
    another verdict, both. cache: a file that keeps what was found, under a hash of all the texts.
    """
    kept = {} if cache is None else _read(cache)
    key = "" if cache is None else _key(examples, held_out, threshold, once)
    found = kept.get(key)
    if found is None:
        found = _search(examples, held_out, threshold, once, progress)
        if cache is not None and processes.is_writer():
            _write(cache, kept | {key: found})
    gone = {*found.held_out, *found.repeated}
    rows = [example for i, example in enumerate(examples) if i not in gone]
    return rows, Dropped(len(found.held_out), len(found.repeated))


def _search(
    examples: Sequence[Example], held_out: HeldOut, threshold: float, once: bool, progress: Progress
) -> Found:
    known = [i for i, example in enumerate(progress(examples)) if held_out.holds(example)]
    again: list[int] = []
    left = sorted(set(range(len(examples))) - set(known))
    for verdict in (False, True) if once else ():
        part = [i for i in left if examples[i].unsafe == verdict]
        flags = repeated([text_of(examples[i]) for i in part], threshold)
        again += [i for i, flag in zip(part, flags, strict=True) if flag]
    return Found(tuple(known), tuple(sorted(again)))


def _key(examples: Sequence[Example], held_out: HeldOut, threshold: float, once: bool) -> str:
    """Hash of all that the search depends on."""
    said = hashlib.sha256(json.dumps([near_duplicates.LETTERS, threshold, once]).encode())
    for part in (held_out.examples, examples):
        for e in part:
            said.update(json.dumps([[m.text for m in e.messages], e.unsafe]).encode())
        said.update(b"\0")
    return said.hexdigest()


def _read(path: Path) -> dict[str, Found]:
    """What the file keeps; {} where there is none or it is damaged, for then all is searched again."""
    try:
        values: Any = json.loads(path.read_text())
        return {
            key: Found(tuple(map(int, held_out)), tuple(map(int, again)))
            for key, (held_out, again) in values.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(path: Path, values: dict[str, Found]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps({key: [f.held_out, f.repeated] for key, f in values.items()}))
    os.replace(temporary, path)
