"""What the dataset registry is made of: rows, and sources that read them."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar


@dataclass(frozen=True)
class Row:
    """One example. `group` ties rows together that must stay in one split."""

    id: str
    group: str
    fields: dict[str, Any]
    split: str | None = None  # set where the dataset itself says so


@dataclass(frozen=True)
class Source:
    """A dataset: where it comes from and how its rows are read.

    hub is (repository, configuration or None), or None where no hub copy is known; dev_fraction is the
    share of groups that the hash puts into "dev". revision: the branch of the hub copy, where it is not the
    main one. subset_fields: for datasets in parts, such as one per language: rows have a field "subset",
    "name:subset" reads that part alone, and this gives the fields that all rows of a part share. On the hub
    a part is a configuration.
    """

    name: str
    title: str
    licence: str
    homepage: str
    hub: tuple[str, str | None] | None
    dev_fraction: float
    read_local: Callable[[Path], Iterator[Row]]
    read_hub: Callable[[Iterable[dict[str, Any]], str], Iterator[Row]]
    revision: str | None = None
    subset_fields: Callable[[str], dict[str, str]] | None = None


def declared_split(stem: str) -> str | None:
    """A split that the file name states; test and validation files are never trained on."""
    return {"train": "train", "dev": "dev", "validation": "dev", "val": "dev", "test": "dev"}.get(stem)


_T = TypeVar("_T")


def spread(rows: Sequence[_T], n: int) -> Sequence[_T]:
    """At most n of the rows, evenly over all: datasets are sorted, and their first rows are of one kind."""
    return [rows[i * len(rows) // n] for i in range(n)] if n < len(rows) else rows


# group (rows that must stay together) and fields of a row.
Fields = Callable[[dict[str, Any]], tuple[str, dict[str, Any]]]


def jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file with one per line."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def numbered(
    prefix: str, rows: Iterable[tuple[str, dict[str, Any]]], split: str | None = None
) -> Iterator[Row]:
    """Rows whose ids are their places."""
    for i, (group, fields) in enumerate(rows):
        yield Row(f"{prefix}-{i}", group, fields, split)


def from_csv(name: str, file: str, fields: Fields) -> Callable[[Path], Iterator[Row]]:
    """Reads one CSV file of a folder."""

    def read(folder: Path) -> Iterator[Row]:
        with open(folder / file, encoding="utf-8", newline="") as opened:
            yield from numbered(name, map(fields, csv.DictReader(opened)))

    return read


def from_hub(
    name: str, fields: Fields, one_part: bool = False
) -> Callable[[Iterable[dict[str, Any]], str], Iterator[Row]]:
    """Reads the rows of a hub copy.

    one_part: the dataset is undivided, whatever the hub copy calls its one part; the group's hash splits.
    """

    def read(rows: Iterable[dict[str, Any]], split: str) -> Iterator[Row]:
        prefix, declared = (name, None) if one_part else (f"{name}-{split}", declared_split(split))
        yield from numbered(prefix, map(fields, rows), declared)

    return read
