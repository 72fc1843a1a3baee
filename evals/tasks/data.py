"""The one door of the tasks to datasets: rows, a reproducible subset, and the dataset's fingerprint."""

import hashlib
import random
from collections.abc import Sequence
from typing import Any

from core_llm.errors import DataError
from evals.tasks.base import Options


def rows(name: str, options: Options) -> list[Any]:
    """Rows (id, group, fields) of a dataset's split; a limit takes a fixed random subset."""
    from core_llm.data import sources

    loaded = sources.load(name, options.data_root, options.split)
    if not loaded:
        where = f" in {options.data_root}" if options.data_root else ""
        raise DataError(f"dataset '{name}'{where} has no row in split '{options.split}'")
    return subset(loaded, options)


def subset(items: Sequence[Any], options: Options) -> list[Any]:
    """At most `limit` items, the same for every run with this seed, in their first order."""
    if options.limit is None or options.limit >= len(items):
        return list(items)
    kept = random.Random(f"limit {options.seed}").sample(range(len(items)), options.limit)
    return [items[i] for i in sorted(kept)]


def train_rows(name: str, options: Options) -> list[Any] | None:
    """The train split, or None where the data root does not have it."""
    from core_llm.data import sources

    try:
        return sources.load(name, options.data_root, "train") or None
    except DataError:
        return None


def fingerprint(ids_and_digests: Sequence[tuple[str, str]]) -> str:
    """SHA-256 over the sample ids and the digests of what was asked."""
    digest = hashlib.sha256()
    for sample_id, content in sorted(ids_and_digests):
        digest.update(f"{sample_id}\0{content}\n".encode())
    return digest.hexdigest()
