"""Models by name or folder, and the three batched calls that the harness makes on them.

A model folder holds core/, and, where the model has them, vision_adapter/, speech_adapter/ and guard/.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from core_llm.chat import Message
from core_llm.digests import code_digest, folder_digest
from core_llm.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from core_llm.adapters import Assistant
    from guard import Guard, Verdict

NAMES = ("nano",)
# What a model may have besides the core: capability -> import package and sub-folder.
PARTS: Mapping[str, str] = {"image": "vision_adapter", "audio": "speech_adapter", "guard": "guard"}
_MISSING = {"image": "has no vision adapter", "audio": "has no speech adapter", "guard": "has no guard"}


def folders(where: str | Path) -> dict[str, Path]:
    """Existing weight folders by capability ("core", "image", "audio", "guard").

    Raises `UserError` for an unknown name and `CheckpointError` for a folder without any part of a model.
    """
    if str(where) in NAMES:
        import core_llm

        places = {"core": Path(core_llm.__file__).parent / "nano"}
        places |= {kind: _package_folder(name) for kind, name in PARTS.items()}
    else:
        root = Path(where)
        if not root.is_dir():
            raise UserError(
                f"unknown model '{where}'; known: {', '.join(NAMES)}, a model's folder, or whisper:NAME"
            )
        places = {"core": root / "core"} | {kind: root / name for kind, name in PARTS.items()}
    found = {kind: path for kind, path in places.items() if (path / "config.json").exists()}
    if not found:
        wanted = ", ".join(f"{path.name}/" for path in places.values())
        raise CheckpointError(f"{where}: no model here; expected sub-folders {wanted} with a config.json")
    return found


def _package_folder(package: str) -> Path:
    from importlib.util import find_spec

    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "nano"


def open_subject(where: str | Path, quantization: str | None = None) -> "Subject":
    """A model under test: the project's own by name or folder, or a peer such as "whisper:tiny.en"."""
    from evals.peers import WHISPER, WhisperSubject

    if str(where).startswith(WHISPER):
        # It has what the tasks that it takes call; `require` refuses the others.
        return cast("Subject", WhisperSubject(str(where), quantization))
    return Subject(where, quantization)


def load_assistant(where: str | Path = "nano") -> "Assistant":
    """The core with every adapter that the model has."""
    return Subject(where).assistant


def load_guard(where: str | Path = "nano") -> "Guard":
    """The model's guard; raises `UserError` when it has none."""
    return Subject(where).guard


class Subject:
    """A model under test. Its parts load on first use, so a text task never waits for an encoder.

    `quantization` names a scheme of `core_llm.quantize`, into which the core is brought after the adapters
    have checked that it is theirs. The guard has a core of its own, which stays as it is.
    """

    def __init__(self, where: str | Path = "nano", quantization: str | None = None) -> None:
        self.name = str(where)
        self.quantization = quantization
        self._folders = folders(where)

    def require(self, needs: Sequence[str], task: str) -> None:
        """Raise `UserError` when the model lacks the core, an adapter or the guard that a task needs."""
        for kind in needs:
            if kind not in self._folders:
                lack = _MISSING.get(kind, "has no core")
                raise UserError(f"model '{self.name}' {lack}, which task '{task}' needs")
        if self.quantization and "guard" in needs:
            raise UserError(f"task '{task}' asks the guard, and --quantize is for the core; leave one out")

    @cached_property
    def assistant(self) -> "Assistant":
        from core_llm.adapters import Assistant
        from core_llm.checkpoint import load_core

        if "core" not in self._folders:
            raise UserError(f"model '{self.name}' has no core")
        core, tokenizer = load_core(self._folders["core"])
        adapters: list[Any] = []
        if "image" in self._folders:
            import vision_adapter

            adapters.append(vision_adapter.load(self._folders["image"], core))
        if "audio" in self._folders:
            import speech_adapter

            adapters.append(speech_adapter.load(self._folders["audio"], core))
        if self.quantization:
            for lora in _updates(adapters):
                lora.merge()  # quantised layers take none
            self._quantize(core)
        return Assistant(core, tokenizer, adapters)

    def _quantize(self, core: Any) -> None:
        from core_llm.quantize import pack, quantize

        if self.quantization:
            quantize(core, self.quantization)
            pack(core)

    @cached_property
    def guard(self) -> "Guard":
        from guard import Guard

        if "guard" not in self._folders:
            raise UserError(f"model '{self.name}' has no guard")
        return Guard.load(self._folders["guard"])

    @cached_property
    def bare(self) -> "Assistant":
        """The same core without any adapter."""
        from core_llm.adapters import Assistant

        core = self.assistant.core
        if _updates(self.assistant.adapters):
            from core_llm.checkpoint import load_core

            core, _ = load_core(self._folders["core"])
            self._quantize(core)
        return Assistant(core, self.assistant.tokenizer)

    def generate(self, conversations: Sequence[Sequence[Message]], max_new_tokens: int) -> list[str]:
        """Greedy answers."""
        from core_llm.sampling import Sampling

        return self.assistant.generate(conversations, Sampling(max_new_tokens=max_new_tokens))

    def loglikelihood(
        self, conversations: Sequence[Sequence[Message]], answers: Sequence[str]
    ) -> list[tuple[float, int]]:
        """log p(answer, end of turn | conversation) in nats, and the number of tokens it covers."""
        logprobs = self.assistant.loglikelihood(conversations, answers)
        lengths = [len(self.assistant.tokenizer.encode(answer)) + 1 for answer in answers]
        return list(zip(logprobs, lengths, strict=True))

    def score(self, conversations: Sequence[Sequence[Message]]) -> "list[Verdict]":
        """The guard's verdict on each conversation."""
        return self.guard.classify(conversations, batch_size=len(conversations))

    def fingerprint(self, needs: Sequence[str]) -> str:
        """SHA-256 over the files of the parts in use, the quantisation, and the code that runs them."""
        kinds = [kind for kind in ("core", *PARTS) if kind in needs and kind in self._folders]
        digest = hashlib.sha256(_code_digest().encode())
        for kind in kinds:
            digest.update(f"{kind}:{self.part_hashes[kind]}".encode())
        if self.quantization:
            digest.update(f"quantization:{self.quantization}".encode())
        return digest.hexdigest()

    @cached_property
    def part_hashes(self) -> dict[str, str]:
        """SHA-256 of each part's files (weights, configuration, tokenizer)."""
        return {kind: folder_digest(path) for kind, path in self._folders.items()}


def _updates(adapters: Sequence[Any]) -> list[Any]:
    """Low-rank updates of the core that came with adapters."""
    return [a.lora for a in adapters if getattr(a, "lora", None) is not None]


def _code_digest() -> str:
    """Of the packages that turn weights into answers: a record made by other code is not reused."""
    import core_llm

    packages = (_package_folder(name).parent for name in PARTS.values())
    return code_digest(Path(core_llm.__file__).parent, *packages)
