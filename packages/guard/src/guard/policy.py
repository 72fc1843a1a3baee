"""What a guard is to judge by: categories, thresholds, how much text at once; as a file and in a program.

A policy never changes: a new one replaces it whole, so whoever reads `PolicyStore.current` once judges a
request by one policy from beginning to end.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core_llm.errors import UserError
from guard.taxonomy import CATEGORIES

# Policies are written by people; what is longer is something else.
MAX_BYTES = 1_000_000


@dataclass(frozen=True)
class Category:
    """One kind of harm.

    code: what results call it. name, description: what a guard that reads rules is told. threshold: score
    from which this category alone makes a message unsafe; None leaves it to the overall threshold.
    enabled: a category that is off is not shown to the guard, and what falls under it passes. hazard: the
    code of the guard's own taxonomy (`taxonomy.CATEGORIES`) that it stands for, by default the same code if
    there is one: what the keys of the moderation API are derived from.
    """

    code: str
    name: str
    description: str = ""
    threshold: float | None = None
    enabled: bool = True
    hazard: str | None = None


class Categories(Mapping[str, Category]):
    """Categories by their code, in order; immutable and hashable."""

    def __init__(self, categories: Iterable[Category]) -> None:
        self._all = tuple(categories)
        self._by_code = {category.code: category for category in self._all}

    def __getitem__(self, code: str) -> Category:
        return self._by_code[code]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_code)

    def __len__(self) -> int:
        return len(self._by_code)

    def __hash__(self) -> int:
        return hash(self._all)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Categories) and self._all == other._all

    def __repr__(self) -> str:
        return f"Categories({', '.join(self)})"


def _standard() -> Categories:
    return Categories(Category(code, name) for code, name in CATEGORIES.items())


@dataclass(frozen=True)
class Policy:
    """What the guard is told, and how much text it is shown at once.

    categories: by code; a mapping of codes to names, or an iterable of `Category`, is taken too. brief: the
    guard is shown the bare conversation without any wording, as one is that was trained on exactly these
    categories and is too small to read rules; a property of the guard, and not part of a policy's file.
    window: tokens of the judged message in one prompt; a longer message is judged in overlapping windows.
    context: tokens of the turns before it, counted from their end. threshold: P(unsafe) from which a message
    is unsafe, None for the guard's own. name, version: for people, and for the audit log.
    """

    categories: Categories = field(default_factory=_standard)
    brief: bool = False
    window: int = 256
    context: int = 256
    threshold: float | None = None
    name: str = "standard"
    version: str = "1"

    def __post_init__(self) -> None:
        given: Any = self.categories
        if not isinstance(given, Categories):
            items = given.items() if isinstance(given, Mapping) else ((c.code, c) for c in given)
            made = [c if isinstance(c, Category) else Category(code, c) for code, c in items]
            object.__setattr__(self, "categories", Categories(made))
            if len(made) != len(self.categories):
                raise UserError("the policy names a category code twice")
        if not self.enabled:
            raise UserError("the policy has no categories" + (" that are on" if self.categories else ""))
        if self.window < 8 or self.context < 0:
            raise UserError("the policy's window must be at least 8 tokens and its context not negative")
        for what, threshold in self._thresholds():
            if threshold is not None and not 0 < threshold < 1:
                raise UserError(f"the threshold of {what} must be between 0 and 1, got {threshold}")

    def _thresholds(self) -> list[tuple[str, float | None]]:
        own = [(code, category.threshold) for code, category in self.categories.items()]
        return [("the policy", self.threshold), *own]

    @property
    def enabled(self) -> tuple[Category, ...]:
        """The categories that are on."""
        return tuple(category for category in self.categories.values() if category.enabled)

    @property
    def shown(self) -> dict[str, str]:
        """Code → the code that a guard which reads rules is shown: `S` and a number, as it was trained.

        A code of that form stays; another gets the next number that is free.
        """
        codes = [category.code for category in self.enabled]
        kept = {code for code in codes if re.fullmatch(r"S[1-9]\d{0,2}", code)}
        free = (f"S{n}" for n in range(1, len(codes) + len(kept) + 1) if f"S{n}" not in kept)
        return {code: code if code in kept else next(free) for code in codes}

    @property
    def digest(self) -> str:
        """SHA-256 of what it says, `brief` left out: the same for two policies that judge alike."""
        text = json.dumps(self._content(), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def hazards(self, scores: Mapping[str, float]) -> dict[str, float]:
        """Scores per code of `taxonomy.CATEGORIES` from scores per code of this policy (the highest counts).

        Codes that stand for no known hazard are left out.
        """
        found: dict[str, float] = {}
        for code, score in scores.items():
            category = self.categories.get(code)
            hazard = (category.hazard if category else None) or code
            if hazard in CATEGORIES:
                found[hazard] = max(score, found.get(hazard, 0.0))
        return found

    def _content(self) -> dict[str, Any]:
        """The policy's file: what differs from a default is written, and every category."""
        plain = {"description": "", "threshold": None, "enabled": True, "hazard": None}
        rows = []
        for category in self.categories.values():
            values = {key: getattr(category, key) for key in plain}
            told = {key: value for key, value in values.items() if value != plain[key]}
            rows.append({"code": category.code, "name": category.name, **told})
        values = {"name": self.name, "version": self.version}
        if self.threshold is not None:
            values["threshold"] = self.threshold
        return {**values, "window": self.window, "context": self.context, "categories": rows}

    @classmethod
    def read(cls, path: str | Path) -> "Policy":
        """The policy in a YAML file; raises `UserError` that names the file, the key and what is allowed."""
        from guard.policy_file import parse

        return parse(_content_of(Path(path)), str(path))

    def write(self, path: str | Path) -> None:
        """Write it as YAML; a reader sees the old file or the new one."""
        path = Path(path)
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(self.as_yaml(), encoding="utf-8")
        os.replace(temporary, path)

    def as_yaml(self) -> str:
        """The text of its file."""
        import yaml

        return str(yaml.safe_dump(self._content(), sort_keys=False, allow_unicode=True, width=100))


def _content_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror or error})") from error
    if len(content) > MAX_BYTES:
        raise UserError(f"{path}: longer than {MAX_BYTES} bytes, this is no policy")
    return content


class PolicyStore:
    """The policy of a running service, replaced whole when its file changes.

    Readers take `current` once per request. A file that is not valid changes nothing: `reload` raises, and
    `watch` reports it and keeps the old policy. `check` may refuse a policy that the guard cannot follow.
    """

    def __init__(self, path: str | Path, check: Callable[[Policy], object] | None = None) -> None:
        self.path = Path(path)
        self._check = check
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._watcher: threading.Thread | None = None
        self._seen = b""
        self._current = self._read()

    @property
    def current(self) -> Policy:
        """The policy that is valid now."""
        return self._current

    def _read(self) -> Policy:
        content = _content_of(self.path)
        from guard.policy_file import parse

        self._seen = hashlib.sha256(content).digest()
        policy = parse(content, str(self.path))
        if self._check is not None:
            self._check(policy)
        return policy

    def reload(self) -> Policy:
        """Read the file again; raises `UserError` for an invalid one and keeps the old policy."""
        with self._lock:
            policy = self._read()
            self._current = policy
            return policy

    def watch(
        self,
        seconds: float = 1.0,
        changed: Callable[[Policy], object] | None = None,
        failed: Callable[[UserError], object] | None = None,
    ) -> None:
        """Look at the file's content every so often, in a thread, until `close`."""
        if self._watcher is not None:
            raise RuntimeError("this policy is watched already")

        def run() -> None:
            unreadable = False
            while not self._stop.wait(seconds):
                try:
                    new = hashlib.sha256(_content_of(self.path)).digest() != self._seen
                    unreadable = False
                    if new:
                        policy = self.reload()
                        if changed is not None:
                            changed(policy)
                except UserError as error:
                    # The same bad file is told once: `_seen` holds it, and a missing file is remembered here.
                    if not unreadable and failed is not None:
                        failed(error)
                    unreadable = True

        self._watcher = threading.Thread(target=run, name="policy-watch", daemon=True)
        self._watcher.start()

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join()
