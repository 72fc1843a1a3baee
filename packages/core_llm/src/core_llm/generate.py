"""Prompts → answers: prefill, decode, batched and streamed.

Axes: B batch, T text positions, P positions of a shared prefix, C model width, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypedDict, Unpack

import torch
from torch import Tensor

from core_llm.cache import KVCache, Prefix
from core_llm.errors import UserError
from core_llm.model import Llama
from core_llm.sampling import Sampling, log_probabilities, next_tokens, uniforms
from core_llm.stepping import Engine, Interleaved, padded_capacity, stepper
from core_llm.text_stream import TextStream
from core_llm.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]

# Tokens of a prompt that pass through the core at once: bounds the memory of activations and masks.
PREFILL_CHUNK = 2048


@dataclass(frozen=True, eq=False)
class Request:
    """A batch of prompts, right-padded.

    Either tokens [B, T] or embeddings [B, T, C]; lengths [B]; `interleave` maps the positions [B, T]
    of a forward pass to the layers that run between the core's blocks in it (None: the bare core).
    loss_mask [B, T] is true on the tokens that the assistant says (see `chat.Rendered`), targets
    [B, T] holds the token ids themselves, answer_starts [B] the begin of each last message.
    """

    tokens: Tensor | None
    embeddings: Tensor | None
    lengths: Tensor
    targets: Tensor
    loss_mask: Tensor
    answer_starts: Tensor
    interleave: Callable[[Tensor], Interleaved] | None = None

    @property
    def width(self) -> int:
        """Padded length T."""
        return self.targets.shape[1]

    @classmethod
    def of_tokens(cls, prompts: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> "Request":
        """A request of bare token ids; raises `UserError` for an empty one."""
        if not prompts or not all(prompts):
            raise UserError("the prompt is empty: give at least one token")
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        width = max(map(len, prompts))
        # What stands behind a row's end is never seen: any id will do.
        tokens = torch.tensor([[*p, *[0] * (width - len(p))] for p in prompts], device=device)
        return cls(tokens, None, lengths, tokens, torch.zeros_like(tokens, dtype=torch.bool), lengths)

    def after(self, prefix: Prefix, core: Llama) -> "Request":
        """What follows the prefix in every row; raises `UserError` where a row does not begin with it."""
        n = len(prefix)
        head = torch.tensor(prefix.tokens, device=self.targets.device)
        fits = self.width > n and bool((self.lengths > n).all() and (self.targets[:, :n] == head).all())
        if fits and self.embeddings is not None:
            fits = bool((self.embeddings[:, :n] == core.embed(head)).all())
        if not fits:
            raise UserError(
                f"a prompt does not begin with the shared prefix of {n} tokens and go on behind it"
            )
        return replace(
            self,
            tokens=None if self.tokens is None else self.tokens[:, n:],
            embeddings=None if self.embeddings is None else self.embeddings[:, n:],
            lengths=self.lengths - n,
            targets=self.targets[:, n:],
            loss_mask=self.loss_mask[:, n:],
            answer_starts=self.answer_starts - n,
        )


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability (nats) of a chosen token, and the most probable tokens with theirs.

    From the model's own distribution: temperature and filters do not change it.
    """

    token: int
    logprob: float
    top_logprobs: dict[int, float]


@dataclass(frozen=True)
class Usage:
    """Tokens read and written; cached_tokens of the prompt came from a shared prefix.

    completion_tokens counts the stop token, which is generated but not shown.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Read and written together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Event:
    """One row's news in one step. `token` is None where the row stopped by a stop token.

    `text` is what has become certain ("" without a tokenizer). A row's last event has `usage` and
    `finish_reason`: "stop" for a stop token or string, "length" for max_new_tokens.
    """

    index: int
    token: int | None
    text: str = ""
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True)
class Completion:
    """A whole answer. `tokens` leave the stop token out; `text` leaves out a stop string and what follows."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()  # empty unless asked for


class Options(TypedDict, total=False):
    """What `stream` and `generate` take besides prompts and sampling, for the whole batch.

    stop_ids: ids that end an answer, default the tokenizer's. stop: strings that end one. logprobs:
    report this many alternatives per token (0: only the chosen one; default: none of it). prefix: text
    before all prompts, already computed. engine: see `stepping.stepper`. chunk: tokens of a prompt per
    forward pass.
    """

    stop_ids: Sequence[int]
    stop: Sequence[str]
    logprobs: int | None
    prefix: Prefix | None
    engine: Engine
    chunk: int


def hidden_states(
    core: Llama, request: Request, cache: KVCache | None = None, start: int = 0, end: int | None = None
) -> Tensor:
    """One pass of the core over columns start..end of a request, by default all: [B, T, C].

    Padding never reaches a real position.
    """
    part = slice(start, request.width if end is None else end)
    n = part.stop - part.start
    interleaved = None
    if request.interleave is not None:
        positions = torch.arange(part.start, part.stop, device=request.lengths.device)
        positions = positions.expand(len(request.lengths), -1) + (cache.start if cache else 0)
        interleaved = request.interleave(positions)
    whole = cache is not None and cache.level and bool((request.lengths >= part.stop).all())
    return core.hidden(
        None if request.tokens is None else request.tokens[:, part],
        embeddings=None if request.embeddings is None else request.embeddings[:, part],
        cache=cache,
        lengths=None if whole else (request.lengths - part.start).clamp(0, n),
        interleaved=interleaved,
    )


def prefill(core: Llama, request: Request, cache: KVCache, chunk: int = PREFILL_CHUNK) -> Tensor:
    """Fill the cache with a request, `chunk` tokens at a time; the last hidden state of every row [B, C]."""
    rows = torch.arange(len(request.lengths), device=request.lengths.device)
    last: Tensor | None = None
    for start in range(0, request.width, chunk):
        hidden = hidden_states(core, request, cache, start, min(start + chunk, request.width))
        at = request.lengths - 1 - start
        ends = hidden[rows, at.clamp(0, hidden.shape[1] - 1)]
        last = ends if last is None else torch.where((at >= 0)[:, None], ends, last)
    assert last is not None
    return last


@torch.inference_mode()
def compute_prefix(core: Llama, tokens: Sequence[int], chunk: int = PREFILL_CHUNK) -> Prefix:
    """Keys and values of text that many prompts begin with, computed once.

    Raises `UserError` for an empty prefix or one as long as the core's context.
    """
    weight = core.embed_tokens.weight
    request = Request.of_tokens([tokens], weight.device)
    check_room(len(tokens), 1, core.config.max_positions)
    cache = KVCache(core.config, 1, len(tokens), weight.dtype, weight.device)
    prefill(core, request, cache, chunk)
    return Prefix(tuple(tokens), cache.keys, cache.values)


Prompts = Request | Sequence[str | Sequence[int]]


def stream(
    core: Llama,
    prompts: Prompts,
    sampling: Sampling | Sequence[Sampling] | None = None,
    tokenizer: Tokenizer | None = None,
    **options: Unpack[Options],
) -> Iterator[Event]:
    """Continue a batch of prompts; in every step yields one event for each unfinished row.

    prompts: token ids, or strings, which begin a text (no chat format: see `Assistant` for that). With
    a `prefix` they are what follows it. sampling: one for all rows, or one per row; a row's draws
    depend on its own seed and prompt alone, not on its neighbours. tokenizer: needed for text in, text
    out and stop strings.

    Raises `UserError` where a prompt is empty, or too long for the context together with its answer.
    """
    return _Run(core, prompts, sampling or Sampling(), tokenizer, options).events()


def generate(
    core: Llama,
    prompts: Prompts,
    sampling: Sampling | Sequence[Sampling] | None = None,
    tokenizer: Tokenizer | None = None,
    **options: Unpack[Options],
) -> list[Completion]:
    """Continue a batch of prompts; takes what `stream` takes. Completions in the order of the prompts."""
    return collect(stream(core, prompts, sampling, tokenizer, **options))


def collect(events: Iterable[Event]) -> list[Completion]:
    """The completions that the events of `stream` add up to, in the order of the prompts."""
    rows: dict[int, list[Event]] = {}
    for event in events:
        rows.setdefault(event.index, []).append(event)
    return [_completion(rows[index]) for index in sorted(rows)]


def _completion(events: Sequence[Event]) -> Completion:
    last = events[-1]
    assert last.finish_reason is not None and last.usage is not None
    return Completion(
        text="".join(event.text for event in events),
        tokens=tuple(event.token for event in events if event.token is not None),
        finish_reason=last.finish_reason,
        usage=last.usage,
        logprobs=tuple(event.logprob for event in events if event.logprob is not None),
    )


class _Run:
    """One batch on its way from prompts to answers."""

    def __init__(
        self,
        core: Llama,
        prompts: Prompts,
        sampling: Sampling | Sequence[Sampling],
        tokenizer: Tokenizer | None,
        options: Options,
    ) -> None:
        self.core = core
        self.prefix = options.get("prefix")
        self.request = _as_request(core, prompts, tokenizer, begins=self.prefix is None)
        self.lengths: list[int] = self.request.lengths.tolist()
        batch = len(self.lengths)
        self.settings = [sampling] * batch if isinstance(sampling, Sampling) else list(sampling)
        if len(self.settings) != batch:
            raise ValueError(f"{batch} prompts but {len(self.settings)} samplings")
        self.cached = len(self.prefix) if self.prefix else 0
        for n, s in zip(self.lengths, self.settings, strict=True):
            check_room(self.cached + n, s.max_new_tokens, core.config.max_positions)
        stop = tuple(options.get("stop", ()))
        if stop and tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        self.texts = [TextStream(tokenizer, stop) if tokenizer else None for _ in self.settings]
        self.stop_ids = frozenset(options.get("stop_ids", tokenizer.stop_ids if tokenizer else ()))
        self.n_logprobs = options.get("logprobs")
        self.engine: Engine = options.get("engine", "eager")
        self.chunk = options.get("chunk", PREFILL_CHUNK)

    @torch.inference_mode()
    def events(self) -> Iterator[Event]:
        """Prefill, then step until every row has finished."""
        cache = self._cache()
        logits = self.core.logits(prefill(self.core, self.request, cache, self.chunk))
        advance = stepper(self.core, cache, self.engine, self.request.interleave)
        draws = uniforms(self.settings).to(logits.device)
        running = list(range(len(self.settings)))
        for step in range(draws.shape[1]):
            tokens = next_tokens(logits, self.settings, draws[:, step])
            scores = self._logprobs(logits, tokens)
            chosen = tokens.tolist()  # the one time per step that the host waits for the device
            events = [self._event(row, chosen[row], step, scores) for row in running]
            yield from events
            running = [event.index for event in events if event.finish_reason is None]
            if not running:
                return
            cache.forget_finished(max(self.lengths[row] for row in running) + step)
            logits = advance(tokens)

    def _cache(self) -> KVCache:
        weight = self.core.embed_tokens.weight
        needed = max(n + s.max_new_tokens for n, s in zip(self.lengths, self.settings, strict=True))
        room = self.core.config.max_positions - self.cached
        capacity = padded_capacity(needed, self.engine, room)
        return KVCache(
            self.core.config, len(self.lengths), capacity, weight.dtype, weight.device, self.prefix
        )

    def _logprobs(self, logits: Tensor, tokens: Tensor) -> list[TokenLogprob | None]:
        if self.n_logprobs is None:
            return [None] * len(tokens)
        chosen, values, ids = log_probabilities(logits, tokens, self.n_logprobs)
        return [
            TokenLogprob(token, logprob, dict(zip(top, best, strict=True)))
            for token, logprob, best, top in zip(
                tokens.tolist(), chosen.tolist(), values.tolist(), ids.tolist(), strict=True
            )
        ]

    def _event(self, row: int, token: int, step: int, scores: Sequence[TokenLogprob | None]) -> Event:
        text, watch = "", self.texts[row]
        reason: FinishReason | None = None
        stopped = token in self.stop_ids
        if watch is not None and not stopped:
            text = watch.push(token)
        if stopped or (watch is not None and watch.stopped):
            reason = "stop"
        elif step + 1 == self.settings[row].max_new_tokens:
            reason = "length"
        if reason is not None and watch is not None:
            text += watch.finish()
        usage = Usage(self.cached + self.lengths[row], step + 1, self.cached) if reason else None
        return Event(row, None if stopped else token, text, None if stopped else scores[row], reason, usage)


def _as_request(core: Llama, prompts: Prompts, tokenizer: Tokenizer | None, begins: bool) -> Request:
    if isinstance(prompts, Request):
        return prompts
    rows: list[Sequence[int]] = []
    for prompt in prompts:
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError("a prompt of text needs a tokenizer")
            if not prompt:
                raise UserError("the prompt is empty: give some text")
            rows.append([*([tokenizer.bos_id] if begins else []), *tokenizer.encode(prompt)])
        else:
            rows.append(prompt)
    return Request.of_tokens(rows, core.embed_tokens.weight.device)


def check_room(prompt_tokens: int, max_new_tokens: int, context: int) -> None:
    """Refuse what does not fit the context, before anything is computed.

    Raises `UserError` that says both lengths; shortening either in silence would change the answer.
    """
    if prompt_tokens >= context:
        raise UserError(
            f"the prompt is {prompt_tokens} tokens long, the model's context holds {context} and an answer "
            "needs room in it; shorten the prompt"
        )
    if prompt_tokens + max_new_tokens > context:
        raise UserError(
            f"the prompt is {prompt_tokens} tokens long and the answer may take {max_new_tokens}, together "
            f"{prompt_tokens + max_new_tokens}; the model's context holds {context}: shorten the prompt or "
            "ask for fewer new tokens"
        )
