"""Work that is kept as it is done: one JSON line per finished item, found again by its key.

The same work begun again asks only for what is not there yet. Lines are forced to the disk; a crash can
leave one half line, which is cut off, so that its item is done again. One program at a time writes a file.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from core_llm.errors import UserError
from core_llm.files import lock


class Journal:
    """An append-only file of {"key", ..., "output"} lines. Use it as a context manager.

    known: what the file holds, key → output. flag: the command line's option that names its place, for the
    error message. Raises `UserError` where the file cannot be read or written, or another program writes it.
    """

    def __init__(self, path: Path, flag: str = "--records") -> None:
        self.path, self.flag = path, flag
        self.known: dict[str, dict[str, Any]] = {}
        self._file: int | None = None

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._lock()
            self._load()
        except OSError as error:
            self._close()
            raise UserError(
                f"records cannot be written to {self.path} ({error.strerror}); use {self.flag} DIR"
            ) from error
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)  # which gives the lock back
            self._file = None

    def _lock(self) -> None:
        assert self._file is not None
        if not lock(self._file):
            raise UserError(f"{self.path}: another run is writing there; wait for it, or use {self.flag} DIR")

    def _load(self) -> None:
        assert self._file is not None
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.ftruncate(self._file, len(whole))
        for line in whole.splitlines():
            try:
                record = json.loads(line)
                self.known[record["key"]] = record["output"]
            except (ValueError, KeyError, TypeError):
                continue  # a damaged line costs one item, not the run

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write records with a "key" and an "output" each, in one piece, and force them to the disk."""
        assert self._file is not None, "use the journal as a context manager"
        records = list(records)
        # Lines go out by one call, so that a process that is killed leaves all of them or none.
        left = memoryview("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode())
        while left:
            left = left[os.write(self._file, left) :]
        os.fsync(self._file)
        self.known.update((record["key"], record["output"]) for record in records)
