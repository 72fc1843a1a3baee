"""Prompts from the command line or a JSONL file, answers to the screen or a JSONL file.

Resume-safe: every answer carries a key of all that it depends on; a second run with the same output file
does only what is missing, and refuses a file whose answers belong to something else.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from core_llm.adapters import Assistant
from core_llm.chat import Message, render
from core_llm.errors import UserError
from core_llm.generate import Completion, Event, TokenLogprob, check_room, collect, stream
from core_llm.sampling import Sampling
from core_llm.tokenizer import Tokenizer

BATCH = 8  # prompts that are answered together
_FIELDS = {"id", "prompt", "messages"}


@dataclass(frozen=True)
class Job:
    """All that an answer depends on, besides its prompt."""

    model: str
    dtype: str
    settings: Sampling
    system: str | None = None
    raw: bool = False
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class Prompt:
    """One thing to answer. `where` names it in error messages, `asked` is what the answer echoes."""

    where: str
    asked: dict[str, Any]
    ids: tuple[int, ...]


@dataclass
class Stopwatch:
    """Tokens and seconds of prefill (up to a batch's first token) and decode (from there on)."""

    prompt_tokens: int = 0
    decode_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def watch(self, events: Iterator[Event]) -> Iterator[Event]:
        """Pass a batch's events on and count them."""
        begin = time.perf_counter()
        first: float | None = None
        for event in events:
            first = first or time.perf_counter()
            if event.usage is not None:
                self.prompt_tokens += event.usage.prompt_tokens
                self.decode_tokens += event.usage.completion_tokens - 1
            yield event
        end = time.perf_counter()
        self.prefill_seconds += (first or end) - begin
        self.decode_seconds += end - (first or end)

    def __str__(self) -> str:
        parts = []
        for name, n, seconds in (
            ("prefill", self.prompt_tokens, self.prefill_seconds),
            ("decode", self.decode_tokens, self.decode_seconds),
        ):
            rate = f" ({n / seconds:.1f} tokens/s)" if n and seconds > 0 else ""
            parts.append(f"{name} {n} tokens in {seconds:.2f} s{rate}")
        return ", ".join(parts)


@dataclass
class Answerer:
    """A model and a job; answers prompts, singly or in batches."""

    assistant: Assistant
    job: Job
    watch: Stopwatch = field(default_factory=Stopwatch)

    def prompt(self, where: str, asked: dict[str, Any]) -> Prompt:
        """Token ids of `asked`, which has `prompt` or `messages`.

        Raises `UserError` that begins with `where` for an empty or too long one.
        """
        core, tokenizer = self.assistant.core, self.assistant.tokenizer
        try:
            messages = _messages(asked, self.job)
            if messages is not None:
                ids = render(messages, tokenizer, chat=self.assistant.chat).ids
            elif not asked["prompt"]:
                raise UserError("the prompt is empty: give some text")
            else:
                ids = [tokenizer.bos_id, *tokenizer.encode(asked["prompt"])]
            check_room(len(ids), self.job.settings.max_new_tokens, core.config.max_positions)
        except UserError as error:
            raise UserError(f"{where}: {error}" if where else str(error)) from None
        return Prompt(where, asked, tuple(ids))

    def pieces(self, prompt: Prompt) -> Iterator[str]:
        """The text of one answer as it comes."""
        for event in self._events([prompt]):
            if event.text:
                yield event.text

    def answers(self, prompts: Sequence[Prompt]) -> list[Completion]:
        """Answers to one batch, in order."""
        return collect(self._events(prompts))

    def _events(self, prompts: Sequence[Prompt]) -> Iterator[Event]:
        core, tokenizer, job = self.assistant.core, self.assistant.tokenizer, self.job
        ids = [prompt.ids for prompt in prompts]
        events = stream(core, ids, job.settings, tokenizer, stop=job.stop, logprobs=job.logprobs)
        return self.watch.watch(events)


def _messages(asked: dict[str, Any], job: Job) -> list[Message] | None:
    """The conversation to have; None for a raw prompt, which is text to continue."""
    unknown = sorted(set(asked) - _FIELDS)
    if unknown:
        raise UserError(f"unknown field '{unknown[0]}'; known: {', '.join(sorted(_FIELDS))}")
    if ("prompt" in asked) == ("messages" in asked):
        raise UserError("give either 'prompt' or 'messages'")
    system = [Message("system", job.system)] if job.system else []
    if "prompt" in asked:
        if not isinstance(asked["prompt"], str):
            raise UserError("'prompt' must be a string")
        return None if job.raw else [*system, Message("user", asked["prompt"])]
    if job.raw:
        raise UserError("--raw continues plain text: give 'prompt', not 'messages'")
    turns = asked["messages"]
    if not isinstance(turns, list) or not all(
        isinstance(t, dict) and set(t) == {"role", "content"} and isinstance(t["content"], str) for t in turns
    ):
        raise UserError("'messages' must be a list of objects with 'role' and a string 'content'")
    return [*system, *(Message(str(t["role"]), t["content"]) for t in turns)]


def read_jsonl(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """What each line asks, with the name of the line; blank lines are left out.

    Raises `UserError` for a missing file or a line that is no JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable ({error})") from None
    asked = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(values, dict):
            raise UserError(f"{path}, line {number}: not a JSON object")
        asked.append((f"{path}, line {number}", values))
    if not asked:
        raise UserError(f"{path}: holds no prompts")
    return asked


class Results:
    """Answers in a JSONL file, or on standard output without one."""

    def __init__(self, path: Path | None, keys: Sequence[str]) -> None:
        self.done: set[str] = set()
        self._file: TextIO = sys.stdout
        if path is None:
            return
        kept = self._read(path, set(keys))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._file.truncate(kept)  # what a killed run left of its last line

    def _read(self, path: Path, keys: set[str]) -> int:
        """Note what is done; the length in bytes of the whole lines."""
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                key = json.loads(line)["key"]
            except (ValueError, TypeError, KeyError):
                raise UserError(f"{path}, line {number}: not an answer of this program") from None
            if key not in keys:
                raise UserError(
                    f"{path}, line {number}: belongs to another input, model or setting; "
                    "choose another --out, or remove the file"
                )
            self.done.add(key)
        return len(whole)

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """Append a batch; after this it survives a crash."""
        for record in records:
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()
        if self._file is not sys.stdout:
            os.fsync(self._file.fileno())


def answer(
    job: Job, given: Sequence[str], source: Path | None, out: Path | None, verbose: bool = False
) -> None:
    """What `core-llm generate` does: load the model, answer what is asked, tell speeds on standard error.

    Raises `UserError` without a prompt, for a bad one, and for a model that does not load.
    """
    import torch

    from core_llm.checkpoint import load_core
    from core_llm.stored import DType

    asked = [("", {"prompt": sys.stdin.read() if text == "-" else text}) for text in given]
    if source is not None:
        asked += read_jsonl(source)
    if not asked:
        raise UserError("no prompt: give one, or - to read it from standard input, or --input with a file")
    if job.logprobs is not None and job.logprobs < 0:
        raise UserError(f"logprobs must be 0 or more, got {job.logprobs}")
    dtype: DType = "auto" if job.dtype == "auto" else getattr(torch, job.dtype)
    answerer = Answerer(Assistant(*load_core(job.model, dtype)), job)
    if len(asked) > 1 or source is not None or out is not None or job.logprobs is not None:
        answer_all(answerer, asked, out)
    else:
        for piece in answerer.pieces(answerer.prompt(*asked[0])):
            print(piece, end="", flush=True)
        print()
    if verbose:
        print(answerer.watch, file=sys.stderr)


def answer_all(answerer: Answerer, asked: Sequence[tuple[str, dict[str, Any]]], out: Path | None) -> None:
    """Answer everything in batches, with a progress bar, and write one JSON object per answer.

    All prompts are checked before the first is answered. Raises `UserError` that names a bad one.
    """
    from tqdm import tqdm

    prompts = [answerer.prompt(where, values) for where, values in asked]
    keys = [_key(answerer.job, index, prompt) for index, prompt in enumerate(prompts)]
    results = Results(out, keys)
    todo = [index for index, key in enumerate(keys) if key not in results.done]
    with tqdm(total=len(prompts), initial=len(prompts) - len(todo), unit="prompt", disable=None) as bar:
        for start in range(0, len(todo), BATCH):
            batch = todo[start : start + BATCH]
            answers = answerer.answers([prompts[index] for index in batch])
            results.write(
                [
                    _record(index, keys[index], prompts[index], answer, answerer.assistant.tokenizer)
                    for index, answer in zip(batch, answers, strict=True)
                ]
            )
            bar.update(len(batch))


def _key(job: Job, index: int, prompt: Prompt) -> str:
    content = json.dumps([asdict(job), index, prompt.asked], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _record(index: int, key: str, prompt: Prompt, answer: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    """An answer with the field names of the OpenAI API where it has them."""
    usage = asdict(answer.usage) | {"total_tokens": answer.usage.total_tokens}
    record = {
        "index": index,
        "key": key,
        **prompt.asked,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "usage": usage,
    }
    if answer.logprobs:
        record["logprobs"] = {"content": [_logprob(entry, tokenizer) for entry in answer.logprobs]}
    return record


def _logprob(entry: TokenLogprob, tokenizer: Tokenizer) -> dict[str, Any]:
    def named(token: int, logprob: float) -> dict[str, Any]:
        return {"token": tokenizer.decode([token], keep_special=True), "id": token, "logprob": logprob}

    top = [named(token, logprob) for token, logprob in entry.top_logprobs.items()]
    return {**named(entry.token, entry.logprob), "top_logprobs": top}
