"""Prefill and decode.

Axes: B batch, T text positions, C model width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core_llm.cache import KVCache
from core_llm.model import Llama
from core_llm.sampling import Sampling, next_tokens

Interleaved = Mapping[int, Callable[[Tensor], Tensor]]


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


def hidden_states(core: Llama, request: Request, cache: KVCache | None = None) -> Tensor:
    """One pass of the core over a whole request: [B, T, C]. Padding never reaches a real position."""
    interleaved = None
    if request.interleave is not None:
        positions = torch.arange(request.width, device=request.lengths.device).expand(
            len(request.lengths), -1
        )
        interleaved = request.interleave(positions)
    return core.hidden(
        request.tokens,
        embeddings=request.embeddings,
        cache=cache,
        lengths=request.lengths,
        interleaved=interleaved,
    )


@torch.inference_mode()
def decode(core: Llama, request: Request, sampling: Sampling, stop_ids: Sequence[int]) -> Iterator[Tensor]:
    """Yield the next token [B] of every row until all rows have stopped; -1 stands for "has stopped"."""
    batch = len(request.lengths)
    weight = core.embed_tokens.weight
    cache = KVCache(core.config, batch, request.width + sampling.max_new_tokens, weight.dtype, weight.device)
    generators = [torch.Generator(weight.device).manual_seed(sampling.seed) for _ in range(batch)]
    hidden = hidden_states(core, request, cache)
    last = hidden[torch.arange(batch, device=hidden.device), request.lengths - 1]
    stops = torch.tensor(stop_ids, device=hidden.device)
    running = torch.ones(batch, dtype=torch.bool, device=hidden.device)
    for step in range(sampling.max_new_tokens):
        tokens = next_tokens(core.logits(last), sampling, generators)
        running = running & ~torch.isin(tokens, stops)
        if not running.any():
            return
        yield torch.where(running, tokens, -1)
        if step + 1 == sampling.max_new_tokens:
            return
        interleaved = request.interleave(cache.positions(1)) if request.interleave else None
        last = core.hidden(tokens[:, None], cache=cache, interleaved=interleaved)[:, 0]
