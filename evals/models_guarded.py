"""A model behind a guard: the same calls, and what is asked or said passes through the guard."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from core_llm.chat import Message
from core_llm.digests import folder_digest
from core_llm.errors import UserError
from core_llm.sampling import Sampling
from evals.models import PLAIN_TEXT, Model, code_of_models, folders

if TYPE_CHECKING:
    from guard import Guard, GuardedAssistant, Verdict

SIDES = ("input", "output")


class GuardedModel:
    """`generate` answers through `guard.GuardedAssistant`; `score` is the guard's own verdict.

    Log-likelihoods are the bare model's: a guard lets pass or refuses, it makes nothing more likely.
    where: "nano", a model's folder with guard/, a guard's own folder, or a hub id.
    """

    def __init__(self, model: Model, where: str, on: Sequence[str] = ()) -> None:
        unknown = [side for side in on if side not in SIDES]
        if unknown:
            raise UserError(f"--guard-on takes {' and '.join(SIDES)}, not '{unknown[0]}'")
        self.model, self.where = model, where
        self.on = tuple(side for side in SIDES if not on or side in on)
        self.quantization = model.quantization
        self.name = f"{model.name} + guard {where} ({', '.join(self.on)})"
        self._folder = _guard_folder(where)

    @cached_property
    def guard(self) -> "Guard":
        """The guard that checks."""
        from guard import Guard

        return Guard.load(self._folder)

    @cached_property
    def assistant(self) -> "GuardedAssistant":
        """Model and guard as one."""
        from guard import GuardedAssistant

        return GuardedAssistant(_Speaker(self.model), self.guard, self.on)

    @cached_property
    def part_hashes(self) -> Mapping[str, str]:
        """The model's parts; "guard" is the guard that checks."""
        return {**self.model.part_hashes, "guard": folder_digest(self._folder)}

    def require(self, needs: Sequence[str], task: str) -> None:
        """As the model's own; a guard is there, and all that passes through it is a conversation."""
        self.model.require([kind for kind in needs if kind not in ("guard", PLAIN_TEXT)], task)

    def fingerprint(self, needs: Sequence[str]) -> str:
        """Of the model, the guard, the sides it checks, and the code of both."""
        inner = self.model.fingerprint([kind for kind in needs if kind != "guard"])
        parts = [inner, self.part_hashes["guard"], *self.on, code_of_models()]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def generate(self, conversations: Sequence[Sequence[Message]], max_new_tokens: int) -> list[str]:
        """Greedy answers, or the refusal."""
        return self.assistant.generate(conversations, Sampling(max_new_tokens=max_new_tokens))

    def loglikelihood(
        self, conversations: Sequence[Sequence[Message]], answers: Sequence[str]
    ) -> list[tuple[float, int]]:
        """The bare model's."""
        return self.model.loglikelihood(conversations, answers)

    def score(self, conversations: Sequence[Sequence[Message]]) -> "list[Verdict]":
        """The verdict of the guard that checks."""
        return self.guard.classify(conversations, batch_size=len(conversations))


class _Speaker:
    """A `Model` as what `GuardedAssistant` guards."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def generate(
        self, conversations: Sequence[Sequence[Message]], settings: Sampling | None = None
    ) -> list[str]:
        return self.model.generate(conversations, (settings or Sampling()).max_new_tokens)

    def stream(self, conversation: Sequence[Message], settings: Sampling | None = None) -> Iterator[str]:
        yield from self.generate([conversation], settings)


def _guard_folder(where: str) -> Path:
    """Where the guard's files are; raises `UserError` where there is none."""
    try:
        found = folders(where)
    except UserError as error:
        raise UserError(f"--guard {where}: {error}") from error
    # A released guard is a checkpoint like a core's: what it is, its chat template says when it is loaded.
    folder = found.get("guard", found.get("core"))
    if folder is None or (folder.name == "core" and "guard" not in found):
        raise UserError(f"--guard {where}: no guard there; give nano, a guard's folder or a hub id")
    return folder
