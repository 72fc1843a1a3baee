"""Local copies of hub repositories as they are downloaded: parquet files by part and split.

A file is called SPLIT-00000-of-00002.parquet and lies in the folder of its part ("DocVQA", "main", "german"),
or in "data" where the dataset has no parts. Media are structs of bytes and path, as on the hub, undecoded.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

_NO_PART = "data"


def has_parquet(folder: Path) -> bool:
    """Whether a folder holds a copy of a hub repository."""
    return next(folder.rglob("*.parquet"), None) is not None


def parts(folder: Path) -> Iterator[tuple[str, str, Iterator[dict[str, Any]]]]:
    """(part or "", split, rows) of each file, in a fixed order."""
    for path in sorted(folder.rglob("*.parquet")):
        part = "" if path.parent in (folder, folder / _NO_PART) else path.parent.name
        yield part, path.stem.partition("-")[0], _rows(path)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=64):  # rows hold pictures: few at a time
            yield from batch.to_pylist()
