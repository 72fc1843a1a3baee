"""Labelled conversations to measure a guard on: public sets by name, or a file of one's own.

Held-out rows are halved once more, by a hash of what they share: validation rows, which a temperature is
fitted on, and test rows, which every figure is of. Rows of one context never part.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from core_llm.chat import Message
from core_llm.data import sources
from core_llm.data.rows import spread
from core_llm.errors import DataError, UserError
from guard import examples
from guard.conversations import conversation, numbered_json

DEFAULT_SETS = ("diasafety", "openai_moderation", "simple_safety_tests", "mitre_frr")
VALIDATION_SHARE = 0.3

Split = Literal["train", "validation", "test"]
_SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_LABELS = {"safe": 0, "unsafe": 1, "0": 0, "1": 1}


@dataclass(frozen=True)
class Row:
    """One conversation. group: rows that share a context; label: 1 where the last message is unsafe."""

    id: str
    group: str
    messages: tuple[Message, ...]
    label: int
    kind: str = ""


@dataclass
class EvalSet:
    """The rows of one set. train: what a baseline may learn from; may be empty."""

    name: str
    title: str
    train: list[Row] = field(default_factory=list)
    validation: list[Row] = field(default_factory=list)
    test: list[Row] = field(default_factory=list)

    @property
    def kinds(self) -> set[int]:
        """The labels among the test rows."""
        return {row.label for row in self.test}


def in_validation(name: str, group: str) -> bool:
    """Whether a held-out group is for the temperature: a hash that never changes."""
    digest = hashlib.sha256(f"guard validation {name}:{group}".encode(errors="replace")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < VALIDATION_SHARE


def named_set(name: str, data_root: Path | None, limit: int | None = None) -> EvalSet:
    """A public set with its train rows, where they are there.

    Raises `UserError` for a name that the guard knows no labels of, `DataError` where it cannot be read.
    """
    if name not in examples.MIXTURE:
        raise UserError(
            f"unknown set '{name}'; known: {', '.join(examples.MIXTURE)}, or your own by --data FILE"
        )
    made = EvalSet(name, sources.SOURCES[name].title)
    held_out = _rows(name, sources.load(name, data_root, "dev", limit))
    # Rows of one kind cannot tell a temperature: all of such a set are for the test.
    both = len({row.label for row in held_out}) == 2
    for row in held_out:
        (made.validation if both and in_validation(name, row.group) else made.test).append(row)
    try:
        made.train = _rows(name, sources.load(name, data_root, "train"))
    except DataError:
        made.train = []  # a copy without its train part: baselines then learn out of fold
    return _checked(made)


def _rows(name: str, loaded: Sequence[sources.Row]) -> list[Row]:
    rows = []
    for row in loaded:
        for example in examples.MIXTURE[name].read([row]):
            if example.messages[-1].text.strip():
                rows.append(Row(row.id, row.group, example.messages, int(example.unsafe), example.code or ""))
    return rows


def own_set(path: Path, limit: int | None = None) -> EvalSet:
    """The rows of a JSONL file; without "split" each is for validation or test by a hash of its group.

    Raises `UserError` that names the first bad line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable ({error})") from error
    made = EvalSet(path.stem, path.name)
    parts = {"train": made.train, "validation": made.validation, "test": made.test}
    splits: dict[str, str] = {}
    try:
        for number, value in numbered_json(text):
            row, split = _own_row(number, value)
            split = split or ("validation" if in_validation("", row.group) else "test")
            if splits.setdefault(row.group, split) != split:
                raise UserError(f"line {number} shares its group or context with a row of another split")
            parts[split].append(row)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if limit is not None:
        made.test = list(spread(made.test, limit))
    return _checked(made)


def _own_row(number: int, value: Any) -> tuple[Row, Split | None]:
    if not isinstance(value, dict) or "label" not in value:
        raise UserError(f'line {number} is no object with a "label"')
    label = value["label"]
    known = _LABELS.get(label if isinstance(label, str) else str(int(label)) if label in (0, 1) else "")
    if known is None:
        raise UserError(f'line {number}: "label" must be 0, 1, "safe" or "unsafe"')
    try:
        messages = tuple(conversation(value))
    except (KeyError, TypeError):
        raise UserError(f"line {number} has neither text, nor context and response, nor messages") from None
    except UserError as error:
        raise UserError(f"line {number}: {error}") from None
    if not messages or not messages[-1].text.strip():
        raise UserError(f"line {number} has no text to judge")
    split = value.get("split")
    if split not in (None, *_SPLITS):
        raise UserError(f'line {number}: "split" must be one of {", ".join(_SPLITS)}')
    before = "\n".join(message.text for message in messages[:-1])
    group = str(value.get("group") or before or messages[-1].text)
    return Row(f"{number}", group, messages, known, str(value.get("kind", ""))), split


def _checked(made: EvalSet) -> EvalSet:
    if not made.test:
        raise DataError(f"{made.name}: no row is left to test on; give more data")
    return made
