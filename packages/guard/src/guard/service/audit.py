"""The audit log: what was judged, by which policy, with which scores; the text itself only on request.

SQLite in WAL mode, so that it can be read while it is written and shared by services of one machine. One
thread writes; entries that come while it commits go into the next transaction together.
"""

import hashlib
import hmac
import json
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from core_llm.errors import UserError

SCHEMA = """
CREATE TABLE IF NOT EXISTS audit (
    id INTEGER PRIMARY KEY,
    time TEXT NOT NULL,              -- UTC, ISO 8601
    request TEXT NOT NULL,           -- request id, as in X-Request-Id
    item INTEGER NOT NULL,           -- place of the input in its request
    client TEXT NOT NULL,            -- name of the API key, never the key
    endpoint TEXT NOT NULL,
    model TEXT NOT NULL,
    policy TEXT NOT NULL,            -- name
    policy_version TEXT NOT NULL,
    policy_digest TEXT NOT NULL,     -- SHA-256 of the policy's content
    hash TEXT NOT NULL,              -- of the input: see `fingerprint`
    flagged INTEGER NOT NULL,
    probability REAL NOT NULL,
    mass REAL NOT NULL,
    named TEXT NOT NULL,             -- codes of the categories named, comma-separated
    scores TEXT NOT NULL,            -- JSON: code -> probability
    text TEXT                        -- NULL unless asked for
);
CREATE INDEX IF NOT EXISTS audit_request ON audit (request);
CREATE INDEX IF NOT EXISTS audit_time ON audit (time);
"""
_INSERT = (
    "INSERT INTO audit (time, request, item, client, endpoint, model, policy, policy_version, policy_digest,"
    " hash, flagged, probability, mass, named, scores, text)"
    f" VALUES ({', '.join('?' * 16)})"
)
# Entries of requests that wait for their commit; beyond it the disk is too slow for the load.
MAX_WAITING = 10_000
_LOCK_SECONDS = 1.0


class AuditError(Exception):
    """An entry could not be written."""


@dataclass(frozen=True)
class Entry:
    """One verdict. content: what was judged, images included, as bytes to hash; text: its words."""

    time: str
    request: str
    item: int
    client: str
    endpoint: str
    model: str
    policy: str
    policy_version: str
    policy_digest: str
    content: bytes
    flagged: bool
    probability: float
    mass: float
    named: Sequence[str]
    scores: dict[str, float]
    text: str


_Job = tuple[Sequence[Entry], "Future[None]"]


class AuditLog:
    """Writes entries; `write` gives a future that is done when they are on disk.

    secret: makes the hash of an input an HMAC, so that nobody without it can find out by trial whether a
    known text was judged. keep_text: store the words too. Raises `UserError` where the file cannot be used.
    """

    def __init__(self, path: Path, keep_text: bool = False, secret: str | None = None) -> None:
        self.path, self.keep_text = path, keep_text
        self._secret = secret.encode() if secret else None
        try:
            connection = self._connect()
            connection.close()
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"{path}: the audit log cannot be written ({error})") from error
        self._jobs: queue.Queue[_Job | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    def fingerprint(self, content: bytes) -> str:
        """SHA-256 of the content, or its HMAC under the secret; hexadecimal."""
        if self._secret is not None:
            return hmac.new(self._secret, content, hashlib.sha256).hexdigest()
        return hashlib.sha256(content).hexdigest()

    def write(self, entries: Sequence[Entry]) -> "Future[None]":
        """Have entries written, all or none; the future raises `AuditError` where they were not."""
        done: Future[None] = Future()
        try:
            self._jobs.put_nowait((entries, done))
        except queue.Full:
            done.set_exception(AuditError("the audit log is too slow"))
        return done

    def close(self) -> None:
        """Write what waits, then stop."""
        self._jobs.put(None)
        self._thread.join()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=_LOCK_SECONDS, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")  # a verdict that was given survives a power cut
            connection.executescript(SCHEMA)
            # Takes the lock a writer needs: a read-only file is found out now.
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
        except BaseException:
            connection.close()
            raise
        return connection

    def _run(self) -> None:
        connection: sqlite3.Connection | None = None
        stopping = False
        while not stopping:
            jobs = [self._jobs.get()]
            while len(jobs) < 256:
                try:
                    jobs.append(self._jobs.get_nowait())
                except queue.Empty:
                    break
            stopping = None in jobs
            work = [job for job in jobs if job is not None]
            connection = self._commit(connection, work)
        if connection is not None:
            connection.close()

    def _commit(self, connection: sqlite3.Connection | None, work: list[_Job]) -> sqlite3.Connection | None:
        """Write jobs in one transaction; after a failure the database is opened anew next time."""
        if not work:
            return connection
        failed: str | None = None
        try:
            connection = connection or self._connect()
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(_INSERT, [self._row(e) for entries, _ in work for e in entries])
            connection.execute("COMMIT")
        except Exception as error:  # the thread must live on, whatever one entry or the disk holds
            failed = type(error).__name__
            _quietly(connection)
            connection = None
        for _, done in work:
            if failed is None:
                done.set_result(None)
            else:
                done.set_exception(AuditError(failed))
        return connection

    def _row(self, entry: Entry) -> tuple[object, ...]:
        # Lone surrogates have no UTF-8 form: they are stored as "?".
        text = entry.text.encode("utf-8", "replace").decode() if self.keep_text else None
        return (
            entry.time, entry.request, entry.item, entry.client, entry.endpoint, entry.model, entry.policy,
            entry.policy_version, entry.policy_digest, self.fingerprint(entry.content), int(entry.flagged),
            entry.probability, entry.mass, ",".join(entry.named), json.dumps(entry.scores), text,
        )  # fmt: skip


def _quietly(connection: sqlite3.Connection | None) -> None:
    """Give up a connection that failed; closing it undoes its transaction."""
    close: Callable[[], None] | None = getattr(connection, "close", None)
    try:
        if close is not None:
            close()
    except sqlite3.Error:
        pass  # it is given up either way
