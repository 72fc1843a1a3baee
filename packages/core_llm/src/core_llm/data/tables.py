"""Pictures or sounds with text from a table in a folder, a folder of `datasets`, or any hub repository.

For data that no one registered; what has a name is in `core_llm.data.sources`. Media stay undecoded.
"""

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core_llm.data.rows import declared_split
from core_llm.errors import DataError


@dataclass(frozen=True)
class Entry:
    """A row of someone's table. `place` is what an error message calls it.

    Where a dataset says of which split a row is, the field "split" is "train" or "dev".
    """

    id: str
    fields: Mapping[str, Any]
    place: str


def entries(where: str, column: str, tables: Sequence[str]) -> Iterator[Entry] | None:
    """Rows in a fixed order, or None where `where` is neither a folder nor a hub id such as "org/name".

    column: what holds the media, "image" or "audio"; a table may say "file_name" instead, and its paths are
    relative to it. A row of a .jsonl table may have "images", a list, of which `image` is then the first.
    tables: names of the table, the first one found is read. Raises `DataError` that names
    the file and row which cannot be read.
    """
    folder = Path(where)
    if folder.is_dir():
        table = next((folder / name for name in tables if (folder / name).is_file()), None)
        if table is not None:
            return _from_table(table, column)
        return _from_datasets(folder, column, tables)
    if not folder.exists() and where.count("/") == 1 and not where.startswith((".", "/")):
        return _from_hub(where, column)
    return None


def held_out(group: str) -> bool:
    """One in twenty, by a hash that never changes."""
    return hashlib.sha256(group.encode()).digest()[0] < 13


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a .csv or .jsonl file; raises `DataError` that names the file."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                yield from csv.DictReader(file)
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise DataError(f"{path}: line {number} is not a JSON object")
                    yield row
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error


def _from_table(path: Path, column: str) -> Iterator[Entry]:
    for i, row in enumerate(read_rows(path)):
        several = row.get("images") if column == "image" else None
        names = several or [row.get(column) or row.get("file_name")]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            media = "picture" if column == "image" else "audio file"
            raise DataError(f"{path}: row {i + 1} names no {media} in '{column}' or 'file_name'")
        identity = str(row.get("id") or f"{i}-{names[0]}")
        files = [path.parent / name for name in names]
        lists = {"images": files} if several else {}
        yield Entry(identity, {**row, column: files[0], **lists}, f"{path}: row {i + 1}")


def _from_datasets(folder: Path, column: str, tables: Sequence[str]) -> Iterator[Entry]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (FileNotFoundError, ValueError, OSError) as error:
        raise DataError(
            f"{folder}: holds neither a table ({', '.join(tables)}) nor a dataset of save_to_disk"
        ) from error
    yield from _rows_of(loaded, str(folder), column)


def _from_hub(name: str, column: str) -> Iterator[Entry]:
    import datasets

    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # the library raises many kinds; all mean that the hub copy is out of reach
        raise DataError(
            f"{name}: no such folder, and not readable from the hub ({type(error).__name__}); "
            "check the spelling and the network"
        ) from error
    yield from _rows_of(loaded, name, column)


def _rows_of(loaded: Any, where: str, column: str) -> Iterator[Entry]:
    import datasets

    feature = datasets.Image if column == "image" else datasets.Audio
    tables: list[tuple[str, Any]] = [("all", loaded)]
    if isinstance(loaded, datasets.DatasetDict):
        tables = [(str(split), table) for split, table in loaded.items()]
    for split, table in tables:
        if column not in table.column_names:
            raise DataError(f"{where}: has no column '{column}' (only {', '.join(table.column_names)})")
        # "train.clean", "validation" or "test"; a single part is split by whoever reads it.
        declared = declared_split(split.replace("-", ".").partition(".")[0]) if len(tables) > 1 else None
        for i, row in enumerate(table.cast_column(column, feature(decode=False))):
            media = row[column] and (row[column]["bytes"] or row[column]["path"])
            if not media:
                raise DataError(f"{where}: row {i} of {split} has nothing in '{column}'")
            own = {"split": declared} if declared and "split" not in row else {}
            yield Entry(f"{split}-{i}", {**own, **row, column: media}, f"{where}: row {i} of {split}")
