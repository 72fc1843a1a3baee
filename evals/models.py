"""Models by name, folder or address, and the batched calls that the harness makes on them.

A model of the project's own is a folder with core/, and, where it has them, vision_adapter/,
speech_adapter/ and guard/; or a checkpoint of a Llama core, or of a guard, as it is.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from core_llm.chat import Message
from core_llm.digests import code_digest, folder_digest
from core_llm.errors import CheckpointError, UserError

if TYPE_CHECKING:
    import torch

    from core_llm.adapters import Assistant
    from guard import Guard, Verdict

NAMES = ("nano",)
# What a model may have besides the core: capability -> import package and sub-folder.
PARTS: Mapping[str, str] = {"image": "vision_adapter", "audio": "speech_adapter", "guard": "guard"}
_MISSING = {"image": "has no vision adapter", "audio": "has no speech adapter", "guard": "has no guard"}
# Among a task's needs: it is asked as plain text by token ids, so that a model needs no chat format.
PLAIN_TEXT = "plain text"
Device = Literal["auto", "cpu", "cuda"]


class Model(Protocol):
    """A model under test. Conversations come in batches; the answers stand in their order.

    name: as the user gave it. quantization: the scheme of `core_llm.quantize`, or None. A call that the model
    cannot answer is refused by `require` before any work.
    """

    name: str
    quantization: str | None

    @property
    def part_hashes(self) -> Mapping[str, str]:
        """SHA-256 of each part's files or weights; what a server hides is left out."""
        ...

    def require(self, needs: Sequence[str], task: str) -> None:
        """Raise `UserError`, one line that says what to do, unless the model has "core", "image", ...

        With `PLAIN_TEXT` among the needs the model is asked by token ids (`TokenModel`) where it has these.
        """
        ...

    def fingerprint(self, needs: Sequence[str]) -> str:
        """SHA-256 over all that decides the answers: weights, settings, code."""
        ...

    def generate(self, conversations: Sequence[Sequence[Message]], max_new_tokens: int) -> list[str]:
        """Greedy answers."""
        ...

    def loglikelihood(
        self, conversations: Sequence[Sequence[Message]], answers: Sequence[str]
    ) -> list[tuple[float, int]]:
        """log p(answer, end of turn | conversation) in nats, and the number of tokens it covers."""
        ...

    def score(self, conversations: Sequence[Sequence[Message]]) -> "list[Verdict]":
        """The guard's verdict on the last message of each conversation."""
        ...


class Speaks:
    """What a model that only answers in words says to the other two calls."""

    name: str

    def loglikelihood(
        self, conversations: Sequence[Sequence[Message]], answers: Sequence[str]
    ) -> list[tuple[float, int]]:
        """Refused with `UserError`."""
        raise UserError(f"model '{self.name}' tells no log-likelihoods; take a task that lets it answer")

    def score(self, conversations: Sequence[Sequence[Message]]) -> "list[Verdict]":
        """Refused with `UserError`."""
        raise UserError(f"model '{self.name}' is no guard; add one with --guard nano")


@runtime_checkable
class TokenModel(Protocol):
    """The raw side of a model that runs here: token ids, no chat format. For `lm_eval` and memorisation.

    begin: the id that opens a text, or None where the tokenizer puts none; end: the id that closes one.
    context: the number of positions.
    """

    @property
    def begin(self) -> int | None: ...

    @property
    def end(self) -> int: ...

    @property
    def context(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without `begin`."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        ...

    def continuations(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """log p(continuation | context) in nats of each (context, continuation), and whether greedy decoding
        would have said it. A context must hold one id at least."""
        ...

    def complete(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[str]:
        """Greedy continuations, cut before the first of the stop strings."""
        ...


def folders(where: str | Path) -> dict[str, Path]:
    """Existing weight folders by capability ("core", "image", "audio", "guard").

    A hub id is downloaded. Two capabilities in one folder are one checkpoint (a released vision model).
    Raises `UserError` for an unknown name and `CheckpointError` for a folder without any part of a model.
    """
    if str(where) in NAMES:
        import core_llm

        places = {"core": Path(core_llm.__file__).parent / "nano"}
        places |= {kind: _package_folder(name) for kind, name in PARTS.items()}
        return {kind: path for kind, path in places.items() if (path / "config.json").exists()}
    root = _root(where)
    places = {"core": root / "core"} | {kind: root / name for kind, name in PARTS.items()}
    found = {kind: path for kind, path in places.items() if (path / "config.json").exists()}
    found = found or _one_checkpoint(root)
    if not found:
        wanted = ", ".join(f"{path.name}/" for path in places.values())
        raise CheckpointError(
            f"{where}: no model here; expected sub-folders {wanted} with a config.json, or a checkpoint"
        )
    return found


def _root(where: str | Path) -> Path:
    from core_llm.hub import find_model

    try:
        return find_model(where, Path())
    except CheckpointError as error:
        if "unknown model" not in str(error):
            raise
        raise UserError(
            f"unknown model '{where}'; known: {', '.join(NAMES)}, a model's folder, a hub id such as "
            "meta-llama/Llama-3.2-1B, whisper:NAME, hf:ID and openai:URL"
        ) from None


def _one_checkpoint(root: Path) -> dict[str, Path]:
    """What a folder is that holds a checkpoint itself, in either layout."""
    if (root / "guard.json").is_file():
        return {"guard": root}
    if (root / "config.json").is_file():
        from core_llm.checkpoint import read_config

        kinds = ["core"]
        if read_config(root).get("model_type") == "mllama":
            kinds.append("image")
        if _asks_for_verdicts(root):
            kinds.append("guard")
        return dict.fromkeys(kinds, root)
    original = any((place / "params.json").is_file() for place in (root, root / "original"))
    return {"core": root} if original else {}


def _asks_for_verdicts(root: Path) -> bool:
    """Whether a checkpoint's chat template is a released guard's: it says how to answer."""
    from guard.released import find_template

    template = find_template(root)
    return template is not None and "unsafe" in template[0]


def _package_folder(package: str) -> Path:
    from importlib.util import find_spec

    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "nano"


def open_model(
    spec: str | Path,
    *,
    quantization: str | None = None,
    guard: str | None = None,
    guard_on: Sequence[str] = (),
    device: Device = "auto",
) -> Model:
    """A model under test, its weights not yet read.

    spec: nano, a folder, a hub id of a Llama, hf:ID, openai:URL[#NAME], or whisper:NAME. guard: "nano", a
    folder or a hub id; what is asked and said then passes through it, on the sides that `guard_on` names
    ("input", "output"; both where it names none). device: where models that run here stand.
    Raises `UserError` for an unknown name, and `CheckpointError` for a folder without a model.
    """
    from evals.models_hf import HF, HfModel
    from evals.models_openai import OPENAI, OpenAIModel
    from evals.peers import WHISPER, WhisperSubject

    if guard_on and guard is None:
        raise UserError("--guard-on says where a guard checks, and there is none; add --guard nano")
    model: Model
    if str(spec).startswith(WHISPER):
        model = WhisperSubject(str(spec), quantization)
    elif str(spec).startswith(HF):
        model = HfModel(str(spec), quantization, device)
    elif str(spec).startswith(OPENAI):
        model = OpenAIModel(str(spec), quantization)
    else:
        model = Subject(spec, quantization, device)
    if guard is None:
        return model
    from evals.models_guarded import GuardedModel

    return GuardedModel(model, guard, guard_on)


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

    def __init__(
        self, where: str | Path = "nano", quantization: str | None = None, device: Device = "auto"
    ) -> None:
        self.name = str(where)
        self.quantization, self.device = quantization, device
        self._folders = folders(where)

    def require(self, needs: Sequence[str], task: str) -> None:
        """Raise `UserError` when the model lacks the core, an adapter or the guard that a task needs."""
        for kind in needs:
            if kind not in self._folders and kind != PLAIN_TEXT:
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
        adapters: list[Any] = []
        if self._folders["core"] == self._folders.get("image"):
            from vision_adapter.mllama_checkpoint import load_fused

            core, tokenizer, adapter = load_fused(self._folders["core"], self._dtype)
            adapters.append(adapter.to(self._place))
        else:
            core, tokenizer = load_core(self._folders["core"], self._dtype)
        core.to(self._place)
        if "image" in self._folders and not adapters:
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

    @cached_property
    def _place(self) -> "torch.device":
        from core_llm.devices import chosen_device

        return chosen_device(self.device)

    @property
    def _dtype(self) -> Any:
        """fp32 on a CPU, where it is what the results of the bundled model were measured in."""
        import torch

        return torch.float32 if self._place.type == "cpu" else "auto"

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

            core, _ = load_core(self._folders["core"], self._dtype)
            self._quantize(core.to(self._place))
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
        digest = hashlib.sha256(code_of_models().encode())
        for kind in kinds:
            digest.update(f"{kind}:{self.part_hashes[kind]}".encode())
        if self.quantization:
            digest.update(f"quantization:{self.quantization}".encode())
        return digest.hexdigest()

    @cached_property
    def part_hashes(self) -> dict[str, str]:
        """SHA-256 of each part's files (weights, configuration, tokenizer)."""
        return {kind: folder_digest(path) for kind, path in self._folders.items()}

    # The raw side: `TokenModel`.

    @property
    def begin(self) -> int | None:
        return self.assistant.tokenizer.bos_id

    @property
    def end(self) -> int:
        return self.assistant.tokenizer.end_of_text_id

    @property
    def context(self) -> int:
        return self.assistant.core.config.max_positions

    def encode(self, text: str) -> list[int]:
        return self.assistant.tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.assistant.tokenizer.decode(ids)

    def continuations(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """log p(continuation | context) in nats of each, and whether greedy decoding would have said it."""
        import torch

        from core_llm.generate import Request, hidden_states

        core = self.assistant.core
        rows = [[*context, *continuation] for context, continuation in pairs]
        request = Request.of_tokens(rows, core.embed_tokens.weight.device)
        found = []
        with torch.inference_mode():
            hidden = hidden_states(core, request)
            for row, (context, continuation) in enumerate(pairs):
                span = slice(len(context), len(context) + len(continuation))
                logits = core.logits(hidden[row, span.start - 1 : span.stop - 1]).float()
                ids = request.targets[row, span]
                chosen = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
                found.append((float(chosen.sum()), bool((logits.argmax(-1) == ids).all())))
        return found

    def complete(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[str]:
        """Greedy continuations, cut before the first of the stop strings."""
        from core_llm.generate import generate
        from core_llm.sampling import Sampling

        settings = Sampling(max_new_tokens=max_new_tokens)
        core, tokenizer = self.assistant.core, self.assistant.tokenizer
        done = generate(core, [list(p) for p in prompts], settings, tokenizer, stop=list(stop))
        return [answer.text for answer in done]


def _updates(adapters: Sequence[Any]) -> list[Any]:
    """Low-rank updates of the core that came with adapters."""
    return [a.lora for a in adapters if getattr(a, "lora", None) is not None]


@lru_cache(maxsize=1)
def code_of_models() -> str:
    """SHA-256 of the packages that turn weights into answers: a record made by other code is not reused."""
    import core_llm

    packages = (_package_folder(name).parent for name in PARTS.values())
    return code_digest(Path(core_llm.__file__).parent, *packages)
