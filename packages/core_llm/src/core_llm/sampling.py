"""Logits → next token. Pure functions.

Axes: B batch, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core_llm.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token; temperature 0 takes the most probable one.

    Raises `UserError` for a value out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise UserError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0 or not 0 <= self.min_p <= 1:
            raise UserError("top_k must be 0 or more and min_p in [0, 1]")


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [B, V] with everything that top-k, min-p and top-p exclude set to -inf."""
    logits = logits.float() / sampling.temperature
    if sampling.top_k:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if sampling.min_p > 0:
        floor = logits.max(dim=-1, keepdim=True).values + torch.log(torch.tensor(sampling.min_p))
        logits = logits.masked_fill(logits < floor, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(dim=-1)
        # A token stays while the mass before it is below top_p: the first one always stays.
        beyond = probability.cumsum(dim=-1) - probability >= sampling.top_p
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))
    return logits


def next_tokens(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """Next token [B] of each row of logits [B, V]; every row draws from a generator of its own."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probability = filtered(logits, sampling).softmax(dim=-1)
    drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(probability, generators, strict=True)]
    return torch.cat(drawn)
