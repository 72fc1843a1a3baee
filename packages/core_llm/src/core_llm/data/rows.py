"""What the dataset registry is made of: rows, and sources that read them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
