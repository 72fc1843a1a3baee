"""API keys: only their SHA-256 is kept, every comparison takes the same time.

A key is 32 random bytes, so a plain hash is enough: there is nothing to guess that a slow hash would protect.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from core_llm.errors import UserError

PREFIX = "guard-"
MIN_LENGTH = 20
_LINE = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,64})\s*[:=]\s*sha256:(?P<digest>[0-9a-fA-F]{64})")


def new_key(name: str) -> tuple[str, str]:
    """A new key, shown once, and its line for the key file."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise UserError("a key's name has 1 to 64 letters, digits, dots, dashes or underscores")
    key = PREFIX + secrets.token_urlsafe(32)
    return key, f"{name}: sha256:{digest(key).hex()}"


def digest(key: str) -> bytes:
    """SHA-256 of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class KeyRing:
    """Who may ask. Several keys may share a name: the old and the new one while they are exchanged."""

    def __init__(self, keys: Iterable[tuple[str, bytes]]) -> None:
        self._keys = tuple(keys)
        if not self._keys:
            raise UserError("no API keys: add a line from `guard key NAME`, or leave --api-keys out")

    @classmethod
    def read(cls, path: Path) -> "KeyRing":
        """Keys of a file with lines `name: sha256:HEX`; raises `UserError` that names the first bad line."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: API keys are not readable ({error})") from error
        found = []
        for number, line in enumerate(lines, start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            match = _LINE.fullmatch(line.strip())
            if match is None:  # the line may hold a key in plain text: it is not repeated
                raise UserError(
                    f"{path}, line {number}: expected 'name: sha256:HEX'; `guard key NAME` makes one"
                )
            found.append((match["name"], bytes.fromhex(match["digest"])))
        return cls(found)

    @classmethod
    def of(cls, text: str) -> "KeyRing":
        """Keys of an environment variable: plain keys, or `name=key`, with commas between them."""
        found = []
        for number, item in enumerate(filter(None, (part.strip() for part in text.split(","))), start=1):
            name, _, key = item.rpartition("=") if "=" in item.rstrip("=") else (f"key-{number}", "", item)
            if len(key) < MIN_LENGTH:
                raise UserError(f"API key {number} is shorter than {MIN_LENGTH} characters: `guard key NAME`")
            found.append((name, digest(key)))
        return cls(found)

    def name_of(self, header: str | None) -> str | None:
        """The name behind an Authorization header, or None. Looks at every key, whichever one fits."""
        scheme, _, key = (header or "").partition(" ")
        asked = digest(key.strip())
        found: str | None = None
        for name, known in self._keys:
            if hmac.compare_digest(asked, known):
                found = name
        return found if scheme.lower() == "bearer" and key.strip() else None
