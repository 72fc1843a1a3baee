"""The Adapter protocol, and the Assistant that composes a core with adapters.

Axes: B batch, T text positions, C model width, P media parts of one adapter in the batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from core_llm.cache import Prefix
from core_llm.chat import ChatFormat, Message, Part, Rendered, render
from core_llm.errors import UserError
from core_llm.generate import (
    Completion,
    Options,
    Request,
    compute_prefix,
    generate,
    hidden_states,
    stream,
)
from core_llm.model import Llama
from core_llm.sampling import Sampling
from core_llm.stepping import Interleaved
from core_llm.tokenizer import Tokenizer

_NEVER = torch.iinfo(torch.long).max


@dataclass(frozen=True, eq=False)
class Spans:
    """Where the parts of one adapter stand in a batch.

    rows, starts, ends [P]: the part's row, the position of its placeholder, and the first later
    position that belongs to another part's span. positions [B, T]: where the hidden states stand
    that the interleaved layers will be given.
    """

    rows: Tensor
    starts: Tensor
    ends: Tensor
    positions: Tensor

    def visible(self) -> Tensor:
        """Which position sees which part: bool [B, T, P]."""
        row = torch.arange(self.positions.shape[0], device=self.positions.device)[:, None, None]
        position = self.positions[:, :, None]
        return (row == self.rows) & (position >= self.starts) & (position < self.ends)


class Adapter(Protocol):
    """What gives a core a further sense. Image and audio adapters meet only in the core."""

    part: type

    def preprocess(self, parts: Sequence[Any]) -> Any:
        """Decode media on the CPU; raises `MediaError` that names the file."""
        ...

    def encode(self, inputs: Any) -> Any:
        """Run the encoder once per request, over all parts of all rows."""
        ...

    def place(self, memory: Any) -> list[Tensor] | None:
        """One [n, C] tensor per part: what stands in the token stream in place of its placeholder."""
        ...

    def interleave(self, memory: Any, spans: Spans) -> Mapping[int, Callable[[Tensor], Tensor]]:
        """Layers to call before the core's blocks; {} where the token stream is enough."""
        ...


@dataclass(frozen=True)
class _Placed:
    """A part with its place: row of the batch, index among the row's ids."""

    row: int
    index: int
    part: Part


class Assistant:
    """A core with adapters: answers conversations that mix text, images and audio.

    Without media in a request it calls the core exactly as the bare core would be called. `chat` is the
    format that the core was trained on, by default the one of the released model of its shape.
    """

    def __init__(
        self,
        core: Llama,
        tokenizer: Tokenizer,
        adapters: Sequence[Adapter] = (),
        chat: ChatFormat | None = None,
    ) -> None:
        if tokenizer.vocab_size > core.config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the core only {core.config.vocab_size}: "
                "they do not belong together"
            )
        self.core = core
        self.tokenizer = tokenizer
        self.adapters = tuple(adapters)
        self.chat = chat or ChatFormat.of(core.config)

    def prepare(self, conversations: Sequence[Sequence[Message]], generation_prompt: bool = True) -> Request:
        """Render, decode, encode and place a batch of conversations.

        Raises `UserError` for an empty prompt or a part that no adapter takes, `MediaError` for a bad file.
        """
        return self.prepare_rendered(
            [render(messages, self.tokenizer, generation_prompt, self.chat) for messages in conversations]
        )

    def prepare_rendered(self, rendered: Sequence[Rendered]) -> Request:
        """The same for conversations that are token ids already, in a format of the caller's own."""
        placed = [_Placed(row, index, part) for row, r in enumerate(rendered) for index, part in r.parts]
        self._check_parts(placed)
        encoded = []
        replacements: dict[tuple[int, int], Tensor] = {}
        for adapter in self.adapters:
            own = [p for p in placed if isinstance(p.part, adapter.part)]
            if not own:
                continue
            memory = adapter.encode(adapter.preprocess([p.part for p in own]))
            vectors = adapter.place(memory)
            encoded.append((adapter, memory, own))
            for p, vector in zip(own, vectors or [], strict=bool(vectors)):
                replacements[p.row, p.index] = vector
        return self._assemble(rendered, encoded, replacements)

    def _check_parts(self, placed: Sequence[_Placed]) -> None:
        known = tuple(adapter.part for adapter in self.adapters)
        for p in placed:
            if not isinstance(p.part, known):
                kind = type(p.part).__name__.lower()
                raise UserError(
                    f"this model has no adapter for {kind} parts: attach one, or leave the {kind} out"
                )

    def _assemble(
        self,
        rendered: Sequence[Rendered],
        encoded: Sequence[tuple[Adapter, Any, list[_Placed]]],
        replacements: Mapping[tuple[int, int], Tensor],
    ) -> Request:
        rows = [self._expand(row, r, replacements) for row, r in enumerate(rendered)]
        device = self.core.embed_tokens.weight.device
        lengths = torch.tensor([len(ids) for ids, _, _ in rows], device=device)
        width = int(lengths.max())
        pad = self.tokenizer.pad_id
        tokens = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _, _ in rows], device=device)
        loss_mask = torch.tensor([mask + [False] * (width - len(mask)) for _, mask, _ in rows], device=device)
        shift = [where for _, _, where in rows]
        starts = torch.tensor(
            [w[r.answer_start] for w, r in zip(shift, rendered, strict=True)], device=device
        )
        embeddings = self._embeddings(tokens, shift, replacements) if encoded else None
        return Request(
            tokens=None if encoded else tokens,
            embeddings=embeddings,
            lengths=lengths,
            targets=tokens,
            loss_mask=loss_mask,
            answer_starts=starts,
            interleave=_interleave(encoded, shift, device) if encoded else None,
        )

    def _expand(
        self, row: int, r: Rendered, replacements: Mapping[tuple[int, int], Tensor]
    ) -> tuple[list[int], list[bool], list[int]]:
        """Make room for what adapters place: ids, loss mask, and the new position of every old index."""
        ids: list[int] = []
        mask: list[bool] = []
        where: list[int] = []
        for index, (token, counts) in enumerate(zip(r.ids, r.loss_mask, strict=True)):
            where.append(len(ids))
            vectors = replacements.get((row, index))
            n = 1 if vectors is None else vectors.shape[0]
            ids += [token] * n
            mask += [counts] * n
        return ids, mask, where + [len(ids)]

    def _embeddings(
        self, tokens: Tensor, shift: list[list[int]], replacements: Mapping[tuple[int, int], Tensor]
    ) -> Tensor:
        base = self.core.embed(tokens)
        if not replacements:
            return base
        row_index: list[int] = []
        position: list[int] = []
        vectors: list[Tensor] = []
        for (row, index), vector in replacements.items():
            start = shift[row][index]
            row_index += [row] * vector.shape[0]
            position += range(start, start + vector.shape[0])
            vectors.append(vector)
        # An adapter may have nothing to say about its part: no index at all is still one of integers.
        where = tuple(torch.tensor(i, dtype=torch.long, device=base.device) for i in (row_index, position))
        return base.index_put(where, torch.cat(vectors).to(base.dtype))

    def loss(self, conversations: Sequence[Sequence[Message]]) -> Tensor:
        """Mean cross-entropy (nats per token) on what the assistant says; gradients reach the adapters."""
        request = self.prepare(conversations, generation_prompt=False)
        hidden, targets, _ = self._answer_states(request, request.loss_mask)
        return F.cross_entropy(self.core.logits(hidden).float(), targets)

    def _answer_states(self, request: Request, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states that predict the masked tokens [N, C], those tokens [N], and their rows [N]."""
        hidden = hidden_states(self.core, request)
        rows, positions = mask[:, 1:].nonzero(as_tuple=True)
        return hidden[rows, positions], request.targets[rows, positions + 1], rows

    @torch.inference_mode()
    def logits(self, conversations: Sequence[Sequence[Message]]) -> list[Tensor]:
        """Next-token logits [T, V] at every position of each conversation."""
        request = self.prepare(conversations)
        logits = self.core.logits(hidden_states(self.core, request))
        return [row[:n] for row, n in zip(logits, request.lengths.tolist(), strict=True)]

    @torch.inference_mode()
    def loglikelihood(
        self, conversations: Sequence[Sequence[Message]], answers: Sequence[str]
    ) -> list[float]:
        """log p(answer, end of turn | conversation) in nats, one per row."""
        closed = [
            [*messages, Message("assistant", answer)]
            for messages, answer in zip(conversations, answers, strict=True)
        ]
        request = self.prepare(closed, generation_prompt=False)
        position = torch.arange(request.width, device=request.lengths.device)
        mask = request.loss_mask & (position >= request.answer_starts[:, None])
        hidden, targets, rows = self._answer_states(request, mask)
        chosen = self.core.logits(hidden).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        return torch.zeros(len(closed), device=chosen.device).index_add(0, rows, chosen).tolist()

    def share(self, messages: Sequence[Message]) -> Prefix:
        """Keys and values of the messages that many conversations begin with, computed once.

        Raises `UserError` where they hold media: those belong to one request.
        """
        request = self.prepare([messages], generation_prompt=False)
        if request.tokens is None:
            raise UserError("a shared prefix holds text only: move images and audio into the conversations")
        return compute_prefix(self.core, request.tokens[0].tolist())

    def complete(
        self,
        conversations: Sequence[Sequence[Message]],
        settings: Sampling | Sequence[Sampling] | None = None,
        **options: Unpack[Options],
    ) -> list[Completion]:
        """Answers with finish reasons, usage and log-probabilities; options as in `generate.Options`.

        Raises `UserError` where a conversation does not begin with the messages of `prefix`.
        """
        return generate(self.core, self._request(conversations, options), settings, self.tokenizer, **options)

    def generate(
        self, conversations: Sequence[Sequence[Message]], settings: Sampling | None = None
    ) -> list[str]:
        """Answers to a batch of conversations."""
        return [answer.text.strip() for answer in self.complete(conversations, settings)]

    def stream(
        self,
        conversation: Sequence[Message],
        settings: Sampling | None = None,
        **options: Unpack[Options],
    ) -> Iterator[str]:
        """Yield the answer piece by piece; a piece never ends inside a character."""
        request = self._request([conversation], options)
        for event in stream(self.core, request, settings, self.tokenizer, **options):
            if event.text:
                yield event.text

    @torch.inference_mode()
    def _request(self, conversations: Sequence[Sequence[Message]], options: Options) -> Request:
        request, prefix = self.prepare(conversations), options.get("prefix")
        return request.after(prefix, self.core) if prefix else request


def _spans(placed: Sequence[_Placed], shift: list[list[int]]) -> tuple[list[int], list[int], list[int]]:
    """Rows, starts and ends: a part is seen until the next part that text separates from it begins."""
    rows = [p.row for p in placed]
    starts = [shift[p.row][p.index] for p in placed]
    ends: list[int] = []
    for i, p in enumerate(placed):
        end = _NEVER
        for previous, other in zip(placed[i:], placed[i + 1 :], strict=False):
            if other.row != p.row:
                break
            if other.index > previous.index + 1:
                end = shift[other.row][other.index]
                break
        ends.append(end)
    return rows, starts, ends


def _interleave(
    encoded: Sequence[tuple[Adapter, Any, list[_Placed]]], shift: list[list[int]], device: torch.device
) -> Callable[[Tensor], Interleaved]:
    """A function from the positions of a forward pass to all adapters' layers in it."""
    places = [
        (adapter, memory, [torch.tensor(values, device=device) for values in _spans(own, shift)])
        for adapter, memory, own in encoded
    ]

    def at(positions: Tensor) -> Interleaved:
        layers: dict[int, Callable[[Tensor], Tensor]] = {}
        for adapter, memory, (rows, starts, ends) in places:
            for index, layer in adapter.interleave(memory, Spans(rows, starts, ends, positions)).items():
                layers[index] = _chain(layers[index], layer) if index in layers else layer
        return layers

    return at


def _chain(
    first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    return lambda hidden: second(first(hidden))
