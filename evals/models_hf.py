"""Models of others through transformers: `hf:ID` or `hf:DIR`; text, images, sound.

One without a chat template takes the tasks that ask plain text.

Axes: B batch, T positions of the padded batch, K positions whose logits are kept, V vocabulary.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from core_llm.chat import Audio, Image, Message, Text
from core_llm.digests import code_digest, folder_digest
from core_llm.errors import CheckpointError, UserError
from evals.models import PLAIN_TEXT, Device, Speaks

if TYPE_CHECKING:
    from torch import Tensor

HF = "hf:"
_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*")
_CELLS = 1 << 27  # fp32 logits at a time: 512 MiB
T = TypeVar("T")
R = TypeVar("R")


class HfModel(Speaks):
    """A model under test behind transformers' own classes: its processor, its chat template, greedy decoding.

    Code that a repository brings along is never run, and only safetensors are read. fp32 on a CPU, the stored
    dtype on a GPU. Raises `CheckpointError` for what is no such model.
    """

    def __init__(self, where: str, quantization: str | None = None, device: Device = "auto") -> None:
        if quantization:
            raise UserError("--quantize is for the core of the project's own models; leave it out")
        self.name, self.device_name = where, device
        self.quantization: str | None = None
        self._folder = _folder(where.removeprefix(HF))

    @cached_property
    def processor(self) -> Any:
        """What makes inputs of conversations: a tokenizer, or a processor that holds one."""
        from transformers import AutoProcessor

        try:
            found = AutoProcessor.from_pretrained(self._folder, local_files_only=True)
        except Exception as error:  # whatever a foreign configuration provokes
            raise CheckpointError(
                f"{self.name}: transformers cannot read its processor ({_line(error)})"
            ) from error
        tokenizer = getattr(found, "tokenizer", found)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return found

    @property
    def tokenizer(self) -> Any:
        """The tokenizer alone."""
        return getattr(self.processor, "tokenizer", self.processor)

    @cached_property
    def model(self) -> Any:
        """The weights, in evaluation mode."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

        from core_llm.devices import chosen_device

        place = chosen_device(self.device_name)
        dtype: Any = torch.float32 if place.type == "cpu" else "auto"
        config = AutoConfig.from_pretrained(self._folder, local_files_only=True)
        senses = self._has("image") or self._has("audio")
        many = type(config) in AutoModelForMultimodalLM._model_mapping
        auto = AutoModelForMultimodalLM if senses and many else AutoModelForCausalLM
        try:
            loaded: Any = auto.from_pretrained(
                self._folder, dtype=dtype, use_safetensors=True, local_files_only=True
            )
        except Exception as error:
            raise CheckpointError(f"{self.name}: transformers cannot load it ({_line(error)})") from error
        return loaded.to(place).eval().requires_grad_(False)

    def _has(self, kind: str) -> bool:
        names = {"image": ("image_processor",), "audio": ("feature_extractor", "audio_processor")}[kind]
        return any(getattr(self.processor, name, None) is not None for name in names)

    def require(self, needs: Sequence[str], task: str) -> None:
        """Raise `UserError` when it lacks a sense that the task needs, or a chat template where it talks."""
        if "guard" in needs:
            raise UserError(
                f"model '{self.name}' is no guard, which task '{task}' needs; add one with --guard nano"
            )
        for kind, what in (("image", "images"), ("audio", "sound")):
            if kind in needs and not self._has(kind):
                raise UserError(f"model '{self.name}' takes no {what}, which task '{task}' needs")
        if PLAIN_TEXT not in needs:
            self._require_template(f", which task '{task}' needs")

    def _require_template(self, why: str = "") -> None:
        if not (getattr(self.processor, "chat_template", None) or self.tokenizer.chat_template):
            raise UserError(
                f"model '{self.name}' has no chat template{why}; take an instruction-tuned model, or tasks "
                "that ask plain text, such as mmlu"
            )

    @cached_property
    def part_hashes(self) -> Mapping[str, str]:
        """SHA-256 of its files."""
        return {"model": folder_digest(self._folder)}

    def fingerprint(self, needs: Sequence[str]) -> str:
        """SHA-256 over files, the versions of what runs them, and this code."""
        versions = [f"{name} {version(name)}" for name in ("transformers", "torch")]
        code = code_digest(Path(__file__).parent / "models_hf.py") + _own_code()
        return hashlib.sha256("\0".join([self.part_hashes["model"], *versions, code]).encode()).hexdigest()

    def generate(self, conversations: Sequence[Sequence[Message]], max_new_tokens: int) -> list[str]:
        """Greedy answers."""
        return _in_parts(lambda rows: self._generate(rows, max_new_tokens), conversations)

    def _generate(self, conversations: Sequence[Sequence[Message]], max_new_tokens: int) -> list[str]:
        inputs = self._inputs([self._spoken(c) for c in conversations], "left", generation_prompt=True)
        return [text.strip() for text in self._continue(inputs, max_new_tokens)]

    def _continue(self, inputs: Any, max_new_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        import torch

        more: dict[str, Any] = {"stop_strings": list(stop), "tokenizer": self.tokenizer} if stop else {}
        with torch.inference_mode():
            ids = self.model.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, temperature=None,
                top_p=None, top_k=None, pad_token_id=self.tokenizer.pad_token_id, **more,
            )  # fmt: skip
        said = ids if self.model.config.is_encoder_decoder else ids[:, inputs["input_ids"].shape[1] :]
        return list(self.tokenizer.batch_decode(said, skip_special_tokens=True))

    def loglikelihood(
        self, conversations: Sequence[Sequence[Message]], answers: Sequence[str]
    ) -> list[tuple[float, int]]:
        """log p(answer, end of turn | conversation) in nats, and the number of tokens it covers."""
        return _in_parts(
            self._loglikelihood, list(zip(conversations, answers, strict=True)), self._rows_at_once
        )

    def _rows_at_once(self, rows: Sequence[tuple[Sequence[Message], str]]) -> int:
        longest = max(len(answer) + sum(len(m.text) for m in messages) for messages, answer in rows)
        return max(1, _CELLS // (max(1, len(self.tokenizer)) * (longest // 3 + 32)))

    def _loglikelihood(self, rows: Sequence[tuple[Sequence[Message], str]]) -> list[tuple[float, int]]:
        asked = [self._spoken(messages) for messages, _ in rows]
        closed = [[*c, self._turn("assistant", [Text(a)])] for c, (_, a) in zip(asked, rows, strict=True)]
        inputs = self._inputs(closed, "right", generation_prompt=False)
        lengths = inputs["attention_mask"].sum(-1).tolist()
        spans = []
        for i, (before, whole) in enumerate(zip(asked, closed, strict=True)):
            n, counted = self._answer_tokens(before, whole, inputs["input_ids"][i, : lengths[i]].tolist())
            spans.append((lengths[i] - n, lengths[i] - n + counted))
        found = self._logprobs(inputs, spans)
        return [(logprob, stop - start) for (logprob, _), (start, stop) in zip(found, spans, strict=True)]

    def _answer_tokens(self, before: list[Any], whole: list[Any], ids: list[int]) -> tuple[int, int]:
        """How many ids at the end follow the prompt, and how many of these are the answer and its end."""
        prompt, text = (
            self.processor.apply_chat_template(c, tokenize=False, add_generation_prompt=c is before)
            for c in (before, whole)
        )
        if not text.startswith(prompt):
            raise UserError(
                f"model '{self.name}': its chat template writes a conversation with an answer in another way "
                "than one without, so an answer has no likelihood; take tasks that let it answer"
            )
        rest = self.tokenizer.encode(text[len(prompt) :], add_special_tokens=False)
        if ids[len(ids) - len(rest) :] != rest:
            raise UserError(f"model '{self.name}': its tokenizer joins prompt and answer in one token")
        ends = [i for i, token in enumerate(rest) if token in self._ends]
        return len(rest), ends[0] + 1 if ends else len(rest)

    @cached_property
    def _ends(self) -> frozenset[int]:
        """Ids that close an answer."""
        configured = self.model.generation_config.eos_token_id
        listed = configured if isinstance(configured, list) else [configured]
        return frozenset(i for i in [*listed, self.tokenizer.eos_token_id] if i is not None)

    def _logprobs(self, inputs: Any, spans: Sequence[tuple[int, int]]) -> list[tuple[float, bool]]:
        """log p of the ids in each row's span [start, stop), and whether each was the most probable."""
        import torch

        width = inputs["input_ids"].shape[1]
        first = max(0, min(start for start, _ in spans) - 1)
        keep = {"logits_to_keep": width - first} if self._keeps else {}
        with torch.inference_mode():
            logits = self.model(**inputs, **keep, use_cache=False).logits
            logits = logits[:, logits.shape[1] - (width - first) :]
            found = []
            for row, (start, stop) in enumerate(spans):
                own = logits[row, start - 1 - first : stop - 1 - first].float()
                ids = inputs["input_ids"][row, start:stop]
                chosen = own.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
                found.append((float(chosen.sum()), bool((own.argmax(-1) == ids).all())))
        return found

    @cached_property
    def _keeps(self) -> bool:
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def _inputs(self, conversations: list[list[Any]], side: str, generation_prompt: bool) -> Any:
        """Tensors of a padded batch, on the model's device."""
        self._require_template()
        self.tokenizer.padding_side = side
        settings: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
        if self.processor is not self.tokenizer:
            settings = {"processor_kwargs": settings}
        try:
            inputs = self.processor.apply_chat_template(
                conversations,
                add_generation_prompt=generation_prompt,
                tokenize=True,
                return_dict=True,
                **settings,
            )
        except Exception as error:
            raise UserError(f"model '{self.name}' cannot take this conversation ({_line(error)})") from error
        inputs = inputs.to(self.model.device)
        for name, value in inputs.items():
            if value.is_floating_point():
                inputs[name] = value.to(self.model.dtype)
        return inputs

    def _spoken(self, messages: Sequence[Message]) -> list[Any]:
        return [self._turn(message.role, message.parts) for message in messages]

    def _turn(self, role: str, parts: Sequence[Any]) -> dict[str, Any]:
        """A message as chat templates read it; a text model's templates want a string."""
        if self.processor is self.tokenizer:
            if not all(isinstance(part, Text) for part in parts):
                raise UserError(f"model '{self.name}' reads text only; leave out tasks with images or sound")
            return {"role": role, "content": "".join(part.text for part in parts)}
        return {"role": role, "content": [self._part(part) for part in parts]}

    def _part(self, part: Any) -> dict[str, Any]:
        if isinstance(part, Text):
            return {"type": "text", "text": part.text}
        if isinstance(part, Image) and self._has("image"):
            from vision_adapter.images import decode, to_rgb

            return {"type": "image", "image": to_rgb(decode(part.data))}
        if isinstance(part, Audio) and self._has("audio"):
            return {"type": "audio", "audio": self._samples(part)}
        raise UserError(
            f"model '{self.name}' takes no {type(part).__name__.lower()} parts; leave out such tasks"
        )

    def _samples(self, part: Audio) -> Any:
        """Mono samples at the rate that its feature extractor wants."""
        import soxr

        from speech_adapter.audio import SAMPLE_RATE, decode

        samples = decode(part.data, part.rate)
        extractor = getattr(self.processor, "feature_extractor", None) or self.processor.audio_processor
        rate = getattr(extractor, "sampling_rate", SAMPLE_RATE)
        return samples if rate == SAMPLE_RATE else soxr.resample(samples, SAMPLE_RATE, rate)

    # The raw side: `evals.models.TokenModel`.

    @property
    def begin(self) -> int | None:
        """The id that its tokenizer puts before a text."""
        ids = self.tokenizer("a").input_ids
        first = self.tokenizer.bos_token_id
        return first if first is not None and ids[:1] == [first] else None

    @property
    def end(self) -> int:
        if self.tokenizer.eos_token_id is not None:
            return int(self.tokenizer.eos_token_id)
        if not self._ends:
            raise UserError(
                f"model '{self.name}': neither tokenizer_config.json nor config.json names an end token"
            )
        return min(self._ends)  # of a Llama's list the end of a text, not that of a turn

    @property
    def context(self) -> int:
        text = self.model.config.get_text_config()
        found: Any = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
        return int(found or 2048)

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def continuations(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """log p(continuation | context) in nats of each, and whether greedy decoding would have said it."""
        return _in_parts(self._continuations, pairs, self._pairs_at_once)

    def _pairs_at_once(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> int:
        longest = max(len(context) + len(continuation) for context, continuation in pairs)
        return max(1, _CELLS // (max(1, len(self.tokenizer)) * longest))

    def _continuations(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        inputs = self._padded([[*context, *continuation] for context, continuation in pairs], "right")
        return self._logprobs(inputs, [(len(a), len(a) + len(b)) for a, b in pairs])

    def complete(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[str]:
        """Greedy continuations, cut before the first of the stop strings."""
        texts = _in_parts(lambda p: self._continue(self._padded(p, "left"), max_new_tokens, stop), prompts)
        ends = [[at for mark in stop if (at := text.find(mark)) >= 0] for text in texts]
        return [text[: min(end)] if end else text for text, end in zip(texts, ends, strict=True)]

    def _padded(self, rows: Sequence[Sequence[int]], side: str) -> "dict[str, Tensor]":
        import torch

        width, pad = max(map(len, rows)), self.tokenizer.pad_token_id or 0
        fill = [[pad] * (width - len(row)) for row in rows]
        left = side == "left"
        ids = [[*f, *row] if left else [*row, *f] for row, f in zip(rows, fill, strict=True)]
        ones = [[1] * len(row) for row in rows]
        zeros = [[0] * len(f) for f in fill]
        mask = [z + o if left else o + z for o, z in zip(ones, zeros, strict=True)]
        place = self.model.device
        return {
            "input_ids": torch.tensor(ids, device=place),
            "attention_mask": torch.tensor(mask, device=place),
        }


def _in_parts(
    call: Callable[[Sequence[T]], list[R]], rows: Sequence[T], at_once: Callable[[Sequence[T]], int] = len
) -> list[R]:
    """`call` over parts of the rows; where a GPU's memory is too small for a part, over its halves."""
    import torch

    def halved(part: Sequence[T]) -> Iterator[R]:
        try:
            yield from call(part)
            return
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise UserError(
                    "one sample alone does not fit into the GPU's memory; take --device cpu"
                ) from None
        torch.cuda.empty_cache()
        half = len(part) // 2
        yield from halved(part[:half])
        yield from halved(part[half:])

    size = at_once(rows) if rows else 1
    return [answer for i in range(0, len(rows), size) for answer in halved(rows[i : i + size])]


def _folder(where: str) -> Path:
    """Where the files are; a hub id is downloaded. Raises `CheckpointError` where there is nothing."""
    from core_llm.hub import download

    folder = Path(where)
    if not where or (not folder.is_dir() and where.count("/") != 1):
        raise CheckpointError(f"hf:{where}: neither a folder nor a hub id such as Qwen/Qwen2.5-0.5B-Instruct")
    folder = folder if folder.is_dir() else download(where, _FILES)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"hf:{where}: no config.json there; give the folder of a transformers checkpoint"
        )
    return folder


def _own_code() -> str:
    from core_llm import chat

    return hashlib.sha256(Path(chat.__file__).read_bytes()).hexdigest()


def _line(error: Exception) -> str:
    """The first line of an error's text, which may be a page long."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
