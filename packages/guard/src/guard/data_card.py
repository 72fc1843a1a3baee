"""What a guard was trained on, counted: for people (`data.md`) and programs (`data.json`)."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from core_llm.data.sources import SOURCES
from guard.decontaminate import Dropped
from guard.examples import Example

_OWN = "the user's own file"


@dataclass(frozen=True)
class SetCard:
    """Rows of one set. categories: rows per code, a row of two codes in both; "unknown" where none is known.

    per_epoch: how many of the rows an epoch shows, None for all of them.
    """

    name: str
    title: str
    licence: str
    source: str
    rows: int
    unsafe: int
    categories: Mapping[str, int] = field(default_factory=dict)
    per_epoch: int | None = None
    dropped: Dropped = Dropped()
    held_out: int = 0


def set_card(
    name: str,
    examples: Sequence[Example],
    dropped: Dropped | None = None,
    held_out: Sequence[Example] = (),
    per_epoch: int | None = None,
) -> SetCard:
    """The card of a named set, of the generated requests ("templates"), or of a user's own file."""
    counts: Counter[str] = Counter()
    for example in examples:
        counts.update(example.codes or (["unknown"] if example.unsafe else []))
    if name in SOURCES:
        origin = SOURCES[name].title, SOURCES[name].licence, SOURCES[name].homepage
    elif name == "templates":
        origin = "requests that the project generates", "that of the project", "guard.templates"
    else:
        origin = name, "as its owner says", _OWN
    ordered = dict(sorted(counts.items(), key=lambda pair: (len(pair[0]), pair[0])))
    unsafe = sum(example.unsafe for example in examples)
    return SetCard(
        name, *origin, len(examples), unsafe, ordered, per_epoch, dropped or Dropped(), len(held_out)
    )


_HEAD = """# What this guard was trained on

Rows after near-duplicates were dropped: of held-out conversations and their contexts ("held out"), and of
rows of the same set and verdict ("repeated"). {threshold}

| set | licence | rows | safe | unsafe | per epoch | held out: rows | dropped: held out | dropped: repeated |
|---|---|---|---|---|---|---|---|---|
"""


def as_markdown(cards: Sequence[SetCard], threshold: float | None) -> str:
    """The card for people."""
    told = (
        f"Near-duplicates: the sets of letter 5-grams of two texts overlap by {threshold:g} (Jaccard)."
        if threshold
        else "No near-duplicates were looked for."
    )
    rows = [
        f"| {c.title} ({c.source}) | {c.licence} | {c.rows} | {c.rows - c.unsafe} | {c.unsafe} "
        f"| {c.per_epoch or 'all'} | {c.held_out} | {c.dropped.held_out} | {c.dropped.repeated} |"
        for c in cards
    ]
    codes = sorted({code for c in cards for code in c.categories}, key=lambda code: (len(code), code))
    lines = [
        f"| {code} | " + " | ".join(str(c.categories.get(code, 0)) for c in cards) + " |" for code in codes
    ]
    table = [f"| category | {' | '.join(c.name for c in cards)} |", "|---" * (len(cards) + 1) + "|", *lines]
    return (
        _HEAD.format(threshold=told)
        + "\n".join(rows)
        + "\n\n## Unsafe rows per category\n\n"
        + "\n".join(table)
        + "\n"
    )


def write(folder: Path, cards: Sequence[SetCard], threshold: float | None) -> None:
    """Write data.md and data.json beside a checkpoint."""
    values = {"near_duplicate_threshold": threshold, "sets": [asdict(card) for card in cards]}
    for name, text in (
        ("data.json", json.dumps(values, indent=2) + "\n"),
        ("data.md", as_markdown(cards, threshold)),
    ):
        temporary = folder / f"{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, folder / name)
