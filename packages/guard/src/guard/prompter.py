"""How one guard is asked: its prompt format, its policy, and how its answers are read. No model in here."""

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from core_llm.chat import Message
from core_llm.errors import CheckpointError, UserError
from core_llm.tokenizer import Tokenizer
from guard.policy import Policy
from guard.prompt import Row, VerdictTokens, rows
from guard.verdict import Reading

SETTINGS = "guard.json"


class Format(Protocol):
    """What prompts of a guard look like."""

    def rows(self, messages: Sequence[Message], policy: Policy) -> list[Row]:
        """The prompts that judge the last message, each up to where the verdict begins.

        Raises `UserError` for a conversation that cannot be judged.
        """
        ...


class OwnFormat:
    """The project's own wording, see `prompt`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def rows(self, messages: Sequence[Message], policy: Policy) -> list[Row]:
        """See `Format.rows`."""
        return rows(messages, self.tokenizer, policy)


class Prompter:
    """Prompts and readings of one guard.

    policy: what the guard judges by of itself. threshold: P(unsafe) that is unsafe where a policy names none.
    temperature: from a calibration; 1 changes nothing. form: by default the project's own format.
    """

    def __init__(
        self, tokenizer: Tokenizer, policy: Policy | None = None, threshold: float = 0.5,
        temperature: float = 1.0, form: Format | None = None,
    ) -> None:  # fmt: skip
        if not 0 < threshold < 1:
            raise UserError(f"the threshold must be between 0 and 1, got {threshold}")
        if not 0 < temperature < float("inf"):
            raise UserError(f"the temperature must be greater than 0, got {temperature}")
        self.tokenizer, self.policy = tokenizer, policy or Policy()
        self.threshold, self.temperature = threshold, temperature
        self.form = form or OwnFormat(tokenizer)
        self._lock = threading.Lock()
        self._readings: dict[Policy, Reading] = {}
        self._own_tokens = VerdictTokens.of(tokenizer, list(self.policy.shown.values()))

    def rows(self, messages: Sequence[Message], reading: Reading) -> list[Row]:
        """The prompts that judge the last message."""
        return self.form.rows(messages, reading.policy)

    def reading(self, policy: Policy | None = None) -> Reading:
        """How to ask and read under a policy, by default the guard's own.

        Raises `UserError` where this guard cannot judge by it.
        """
        policy = policy or self.policy
        with self._lock:
            known = self._readings.get(policy)
        if known is None:
            known = self._new_reading(policy)
            with self._lock:
                if len(self._readings) >= 64:  # policies come and go in a long-lived service
                    self._readings.clear()
                self._readings[policy] = known
        return known

    def _new_reading(self, policy: Policy) -> Reading:
        if self.policy.brief:
            tokens, columns = self._own_tokens, self._trained_columns(policy)
        else:
            shown = policy.shown
            columns = tuple(shown)
            try:
                tokens = VerdictTokens.of(self.tokenizer, list(shown.values()))
            except CheckpointError as error:
                raise UserError(
                    f"the policy has more categories than this guard can name: {error}"
                ) from error
        threshold = self.threshold if policy.threshold is None else policy.threshold
        # How prompts are worded is the guard's, whatever the policy says.
        written = replace(policy, brief=self.policy.brief)
        return Reading(written, tokens, columns, threshold, self.temperature, policy.digest)

    def _trained_columns(self, policy: Policy) -> tuple[str | None, ...]:
        """For a guard that reads no rules: which category of the policy each trained code stands for."""
        found: dict[str, str] = {}
        for category in policy.enabled:
            trained = category.code if category.code in self.policy.categories else category.hazard
            if trained is None or trained not in self.policy.categories:
                raise UserError(
                    f"this guard reads no rules and knows only {', '.join(self.policy.categories)}: category "
                    f"{category.code} needs a `hazard` among them, or a guard that reads its policy"
                )
            if trained in found:
                raise UserError(
                    f"categories {found[trained]} and {category.code} are one and the same to this guard"
                )
            found[trained] = category.code
        return tuple(found.get(code) for code in self.policy.shown)

    def settings(self) -> dict[str, Any]:
        """What `guard.json` holds."""
        values = {
            "categories": {code: category.name for code, category in self.policy.categories.items()},
            "brief": self.policy.brief,
            "window": self.policy.window,
            "context": self.policy.context,
            "threshold": self.threshold,
        }
        return values | ({} if self.temperature == 1.0 else {"temperature": self.temperature})

    @classmethod
    def of_folder(cls, folder: Path, tokenizer: Tokenizer | None = None) -> "Prompter":
        """The one of a guard's folder: our own settings, or a released checkpoint's chat template.

        Reads no weights. Raises `CheckpointError` where the folder holds neither, or a damaged one.
        """
        if (folder / SETTINGS).is_file():
            values = _read_settings(folder / SETTINGS)
            tokenizer = tokenizer or Tokenizer.load(folder)
            try:
                policy = Policy(values["categories"], values["brief"], values["window"], values["context"])
                return cls(tokenizer, policy, values["threshold"], values.get("temperature", 1.0))
            except (KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{folder / SETTINGS}: {error} is missing or malformed") from error
        from guard.released import released_prompter  # which builds on this module

        return released_prompter(folder, tokenizer)


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a guard's settings")
    return values
