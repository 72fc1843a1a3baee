"""Logits → next token. Pure functions.

Axes: B batch, N draws, V vocabulary, K alternatives.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core_llm.errors import UserError

# Below this the distribution is one token to within fp32, and the division could overflow.
_COLDEST = 1e-6


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token; temperature 0 takes the most probable one.

    The filters apply in the order of transformers: temperature, top-k, top-p, min-p.
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
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0 or not 0 <= self.min_p <= 1:
            raise UserError("top_k must be 0 or more and min_p in [0, 1]")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be in [0, 2^63), got {self.seed}")


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [B, V] at the temperature, with all that top-k, top-p and min-p exclude set to -inf."""
    # The greatest becomes 0 before the division, so that a low temperature cannot overflow.
    logits = logits.float() - logits.amax(dim=-1, keepdim=True).float()
    logits = logits / max(sampling.temperature, _COLDEST)
    limited = 0 < sampling.top_k < logits.shape[-1]
    if limited or sampling.top_p < 1:
        ordered, order = logits.topk(sampling.top_k) if limited else logits.sort(dim=-1, descending=True)
        if sampling.top_p < 1:
            probability = ordered.softmax(dim=-1)
            # A token stays while the mass before it is below top_p: the first one always stays.
            beyond = probability.cumsum(dim=-1) - probability >= sampling.top_p
            ordered = ordered.masked_fill(beyond, float("-inf"))
        logits = torch.full_like(logits, float("-inf")).scatter(-1, order, ordered)
    if sampling.min_p > 0:
        logits = logits.masked_fill(logits < math.log(sampling.min_p), float("-inf"))
    return logits


def uniforms(settings: Sequence[Sampling]) -> Tensor:
    """Numbers in [0, 1) for every row and step, float64 [B, N] on the CPU, N the largest max_new_tokens.

    A row's numbers follow from its own seed alone: neither neighbours nor the device change them. All
    are drawn before the first step, so that a step needs no generator and can be captured.
    """
    draws = torch.zeros(len(settings), max(s.max_new_tokens for s in settings), dtype=torch.float64)
    for row, s in zip(draws, settings, strict=True):
        generator = torch.Generator().manual_seed(s.seed)
        row[: s.max_new_tokens] = torch.rand(s.max_new_tokens, generator=generator, dtype=torch.float64)
    return draws


def next_tokens(logits: Tensor, settings: Sequence[Sampling], draws: Tensor) -> Tensor:
    """Next token [B] of each row of logits [B, V] by its own settings, given `draws` [B] in [0, 1)."""
    tokens = logits.argmax(dim=-1)
    groups: dict[tuple[float, float, int, float], list[int]] = {}
    for row, s in enumerate(settings):
        if s.temperature > 0:
            groups.setdefault((s.temperature, s.top_p, s.top_k, s.min_p), []).append(row)
    for rows in groups.values():
        if len(rows) == len(settings):
            return _drawn(filtered(logits, settings[0]), draws)
        where = torch.tensor(rows, device=logits.device)
        tokens[where] = _drawn(filtered(logits[where], settings[rows[0]]), draws[where])
    return tokens


def _drawn(logits: Tensor, draws: Tensor) -> Tensor:
    """Inverse of the cumulative distribution, in the order of the vocabulary.

    In that order a rounding difference moves each boundary by as much; sorted by probability it
    could swap two tokens.
    """
    cumulative = logits.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    total = cumulative[:, -1:]
    target = torch.minimum(draws[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def log_probabilities(logits: Tensor, tokens: Tensor, n_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities in nats from the model's own distribution: no temperature, nothing filtered.

    Returns those of `tokens` [B], and values and ids [B, K] of the `n_top` most probable ones.
    """
    log_p = logits.float().log_softmax(dim=-1)
    top = log_p.topk(min(n_top, log_p.shape[-1]), dim=-1)
    return log_p.gather(-1, tokens[:, None])[:, 0], top.values, top.indices
