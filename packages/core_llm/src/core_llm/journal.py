"""Work that is kept as it is done: one JSON line per finished item, found again by its key.

The same work begun again asks only for what is not there yet. Lines are forced to the disk; a crash can
leave one half line, which is cut off, so that its item is done again.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from core_llm.errors import UserError


class Journal:
    """An append-only file of {"key", ..., "output"} lines. Use it as a context manager.

    known: what the file holds, key → output. flag: the command line's option that names its place, for the
    error message. Raises `UserError` where the file cannot be read or written.
    """

    def __init__(self, path: Path, flag: str = "--records") -> None:
        self.path, self.flag = path, flag
        self.known: dict[str, dict[str, Any]] = {}
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._load()
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"records cannot be written to {self.path} ({error.strerror}); use {self.flag} DIR"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _load(self) -> None:
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self.path.open("r+b") as stream:
                stream.truncate(len(whole))
        for line in whole.splitlines():
            try:
                record = json.loads(line)
                self.known[record["key"]] = record["output"]
            except (ValueError, KeyError, TypeError):
                continue  # a damaged line costs one item, not the run

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write records with a "key" and an "output" each, and force them to the disk."""
        assert self._file is not None, "use the journal as a context manager"
        for record in records:
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self.known[record["key"]] = record["output"]
        self._file.flush()
        os.fsync(self._file.fileno())
