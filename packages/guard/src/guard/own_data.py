"""Training conversations out of a user's own JSON lines, and a split that keeps contexts together."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core_llm.data import near_duplicates
from core_llm.errors import DataError, UserError
from guard.conversations import conversation, numbered_json
from guard.examples import Example

_VERDICTS = {"safe": False, "unsafe": True, 0: False, 1: True}
_KEYS = {"conversation", "text", "context", "response", "messages", "verdict", "label", "categories"}
_IGNORED = {"id", "group", "split"}  # what `guard evaluate` reads in the same file
_SHOWN = 5


_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class OwnRow:
    """A line of the file. group: lines with the same one share a context; split: where the line says so."""

    example: Example
    group: str | None = None
    split: str | None = None


def load(path: Path, codes: Sequence[str], share: float = 0.1) -> tuple[list[Example], list[Example]]:
    """Rows to train on and rows held out, see `read` and `split_by_context`.

    Where lines name a "split", theirs counts, and the others are trained on.
    """
    rows = read(path, codes)
    if not any(row.split for row in rows):
        return split_by_context(rows, share)
    held_out = [row.example for row in rows if row.split in ("validation", "test")]
    return [row.example for row in rows if row.split in ("train", None)], held_out


def read(path: Path, codes: Sequence[str]) -> list[OwnRow]:
    """Conversations of a JSONL file, each line such as

        {"conversation": TEXT, "verdict": "unsafe", "categories": ["S1"]}

    where TEXT may be a list of messages, {"role": ..., "content": ...}.

    `categories` may be left out; an unsafe line without them teaches the verdict alone. `codes` are those
    that the policy knows. Raises `DataError` that names the first bad lines and what is wrong with each.
    """
    try:
        text = path.read_text(encoding="utf-8")
        lines = list(numbered_json(text))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable ({error})") from error
    except UserError as error:
        raise DataError(f"{path}: {error}") from None
    found: list[OwnRow] = []
    wrong: list[str] = []
    for number, value in lines:
        try:
            found.append(_row(value, codes))
        except (KeyError, TypeError, ValueError) as error:
            wrong.append(f"line {number}: {error.args[0] if error.args else error}")
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise DataError(f"{path}: {'; '.join(wrong[:_SHOWN])}{more}")
    if not found:
        raise DataError(f"{path}: holds no conversation")
    return found


def _row(value: Any, codes: Sequence[str]) -> OwnRow:
    if not isinstance(value, dict):
        raise TypeError("not an object")
    group, split = value.get("group"), value.get("split")
    if split is not None and split not in _SPLITS:
        raise ValueError(f"split is {split!r}; known: {', '.join(_SPLITS)}")
    return OwnRow(_example(value, codes), None if group is None else str(group), split)


def _example(value: dict[str, Any], codes: Sequence[str]) -> Example:
    unknown = sorted(set(value) - _KEYS - _IGNORED)
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}; known: {', '.join(sorted(_KEYS | _IGNORED))}")
    said = value.get("conversation", value)
    try:
        messages = tuple(conversation({"messages": said} if isinstance(said, list) else said))
    except (KeyError, TypeError):
        raise ValueError(
            "conversation is neither a text nor a list of objects with role and content"
        ) from None
    except UserError as error:
        raise ValueError(str(error)) from None
    if not messages or not messages[-1].text.strip():
        raise ValueError("the conversation or its last message is empty")
    verdict = value.get("verdict", value.get("label"))
    if isinstance(verdict, bool) or not isinstance(verdict, str | int) or verdict not in _VERDICTS:
        raise ValueError(f"verdict is {verdict!r}, not safe or unsafe")
    unsafe = _VERDICTS[verdict]
    named = value.get("categories", [])
    if not isinstance(named, list) or not all(isinstance(code, str) for code in named):
        raise ValueError("categories is not a list of codes")
    strange = [code for code in named if code not in codes]
    if strange:
        raise ValueError(f"category {strange[0]!r} is not in the policy; known: {', '.join(codes)}")
    if named and not unsafe:
        raise ValueError("a safe message has no categories")
    known = list(dict.fromkeys(named))
    return Example(messages, unsafe, float(unsafe), known[0] if known else None, tuple(known[1:]))


def split_by_context(rows: Sequence[OwnRow], share: float) -> tuple[list[Example], list[Example]]:
    """Train and held-out rows; about `share` are held out.

    Rows of one group, and rows whose contexts are the same or near-duplicates, never part: a hash of the
    first context of all that is so connected decides, so that more rows behind the present ones move few.
    """
    first = near_duplicates.groups([row.example.context for row in rows])
    named: dict[str, int] = {}
    for number, row in enumerate(rows):
        if row.group is not None:
            near_duplicates.join(first, number, named.setdefault(row.group, number))
    train: list[Example] = []
    held_out: list[Example] = []
    for number, row in enumerate(rows):
        context = rows[near_duplicates.root(first, number)].example.context
        digest = hashlib.sha256(near_duplicates.folded(context).encode(errors="replace")).digest()
        chosen = held_out if int.from_bytes(digest[:8], "big") / 2**64 < share else train
        chosen.append(row.example)
    return train, held_out
