"""Teaching a core to look facts up in long texts: the training side of the needle test.

Axes: B conversations, T positions.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core_llm.chat import render
from core_llm.data.needle import lookup_conversation
from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer
from core_llm.train.fit import FitConfig, fit


@dataclass(frozen=True)
class NeedleConfig:
    """Sizes of the run. The text length grows: a core that was trained on short texts follows step by step.

    tokens: per step, so that a short text comes in larger batches. stages: (share of the steps, text length).
    """

    tokens: int = 4096
    stages: tuple[tuple[float, int], ...] = ((0.25, 256), (0.25, 512), (0.5, 1024))
    held_out: int = 16
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Lookups:
    """Right-padded conversations: tokens and which of them the assistant says, both [B, T]."""

    tokens: Tensor
    said: Tensor


class NeedleTask:
    """Questions about facts in a haystack; only the answers are targets."""

    name = "needle"

    def __init__(self, model: Llama, tokenizer: Tokenizer, config: NeedleConfig, steps: int) -> None:
        self.model, self.tokenizer, self.config, self.steps = model, tokenizer, config, steps
        self.count = lru_cache(maxsize=100_000)(lambda text: len(tokenizer.encode(text)))

    def modules(self) -> Mapping[str, nn.Module]:
        """The core."""
        return {"core": self.model}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All weights at one rate."""
        return [{"params": list(self.model.parameters())}]

    def length(self, step: int) -> int:
        """Longest text of a step, in tokens."""
        ends = accumulate(share for share, _ in self.config.stages)
        lengths = [length for _, length in self.config.stages]
        now = next((n for end, n in zip(ends, lengths, strict=True) if step < end * self.steps), lengths[-1])
        return min(now, self.model.config.max_positions)

    def batch(self, step: int) -> Lookups:
        """Conversations of the step."""
        length = self.length(step)
        rng = random.Random(f"needle-{self.config.seed}-{step}")
        return self._lookups(rng, length, max(1, self.config.tokens // length))

    def _lookups(self, rng: random.Random, length: int, rows: int) -> Lookups:
        # A third of the texts are shorter than the stage allows: what was learned before is not to be lost.
        lengths = [length if rng.random() < 0.67 else rng.randint(length // 2, length) for _ in range(rows)]
        rendered = [
            render(lookup_conversation(rng, n, self.count), self.tokenizer, generation_prompt=False)
            for n in lengths
        ]
        width = min(max(len(r.ids) for r in rendered), self.model.config.max_positions)
        tokens = torch.full((rows, width), self.tokenizer.pad_id)
        said = torch.zeros((rows, width), dtype=torch.bool)
        for row, r in enumerate(rendered):
            n = min(len(r.ids), width)
            tokens[row, :n] = torch.tensor(r.ids[:n])
            said[row, :n] = torch.tensor(r.loss_mask[:n])
        return Lookups(tokens, said)

    def _answers(self, batch: Lookups) -> tuple[Tensor, Tensor]:
        """Logits [N, V] of the tokens that the assistant says, and those tokens [N]."""
        hidden = self.model.hidden(batch.tokens)  # causal: padding on the right reaches no real position
        rows, at = batch.said[:, 1:].nonzero(as_tuple=True)
        return self.model.logits(hidden[rows, at]).float(), batch.tokens[rows, at + 1]

    def loss(self, batch: Lookups) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy of the answers, nats per token."""
        logits, targets = self._answers(batch)
        # An answer is right when every token of it is; each ends with its end of turn.
        ends = targets == self.tokenizer.eot_id
        number = ends.cumsum(0) - ends.long()
        wrong = torch.bincount(number, weights=(logits.argmax(-1) != targets).float())
        right = (wrong == 0).float().mean().item()
        return F.cross_entropy(logits, targets), {"right": right, "length": float(batch.tokens.shape[1])}

    def weight(self, batch: Lookups) -> float:
        """What the mean of the loss is over: the answers' tokens."""
        return float(batch.said[:, 1:].sum())

    def evaluate(self) -> dict[str, float]:
        """Loss and share of right answers (each told the ones before) on texts of the full length."""
        rng = random.Random("needle held-out")
        figures: list[tuple[float, float]] = []
        for _ in range(self.config.held_out):
            loss, more = self.loss(self._lookups(rng, self.length(self.steps - 1), 1))
            figures.append((loss.item(), more["right"]))
        losses, right = zip(*figures, strict=True)
        return {"held_out_loss": sum(losses) / len(losses), "held_out_right": sum(right) / len(right)}


def train_needle(
    model: Llama, tokenizer: Tokenizer, fit_config: FitConfig, run: NeedleConfig
) -> dict[str, float]:
    """Train a core in place on lookups; a second call with the same folder resumes."""
    model.requires_grad_(True)
    figures = fit(NeedleTask(model, tokenizer, run, fit_config.steps), fit_config)
    model.eval().requires_grad_(False)
    return figures
