"""What a guard is trained by: the language of the conversations, and verdicts on them.

Axes: B conversations, T positions, C model width, V vocabulary.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core_llm.lora import LoRA
from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer
from guard.augmentation import Augmentation, augment, known_codes
from guard.average import MovingAverage
from guard.batches import Batch, EncodedRow, Epochs, collate, encode
from guard.examples import Example
from guard.guard import Guard
from guard.policy import Policy
from guard.prompt import VerdictTokens


@dataclass(frozen=True)
class Recipe:
    """How the guard is trained; the defaults are the nano guard's.

    Chosen on an inner split of the training data, not on the dev rows that are reported.
    """

    language_steps: int = 250
    language_lr: float = 2e-3
    batch: int = 32
    teacher_weight: float = 0.5  # share of the teacher's opinion in the soft targets
    dropout: float = 0.1  # on the embeddings, per value
    token_dropout: float = 0.1  # whole tokens of the conversation blanked
    prefix_weight: float = 0.5  # of the same verdict asked after every token of the conversation
    language_weight: float = 0.0  # of next-token prediction beside the verdict
    answer_weight: float = 0.2  # of the tokens behind the verdict: grammar and category
    average_decay: float = 0.99  # of the exponential moving average of the weights; 0: none
    augmentation: Augmentation | None = None  # of the rules, for a guard that reads them
    seed: int = 0

    @classmethod
    def for_rules(cls, **values: Any) -> "Recipe":
        """For a guard that reads its rules: nothing of the prompt is in the loss, the whole answer is."""
        plain: dict[str, Any] = {
            "language_steps": 0, "teacher_weight": 0.0, "dropout": 0.0, "token_dropout": 0.0,
            "prefix_weight": 0.0, "answer_weight": 1.0, "augmentation": Augmentation(),
        }  # fmt: skip
        return cls(**(plain | values))


class LanguageTask:
    """Next-token prediction on the conversations: what the verdict is later read from."""

    name = "guard-language"

    def __init__(self, core: Llama, tokenizer: Tokenizer, epochs: Epochs, lora: LoRA | None = None) -> None:
        self.core, self.tokenizer, self.epochs = core, tokenizer, epochs
        self.trained: nn.Module = lora or core

    def modules(self) -> Mapping[str, nn.Module]:
        """The core, or the updates beside it."""
        return {"core": self.trained}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All weights at one rate."""
        return [{"params": list(self.trained.parameters())}]

    def batch(self, step: int) -> Batch:
        """Conversations of the step."""
        return collate(self.epochs[step], self.tokenizer.pad_id).to(_device(self.core))

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Mean cross-entropy in nats per token of the prompts."""
        return language_loss(self.core, self.core.hidden(batch.tokens), batch), {}

    def weight(self, batch: Batch) -> float:
        """What the mean of the loss is over: the tokens of the prompts that are predicted."""
        return float((batch.n_prompt - 1).sum())

    def evaluate(self) -> dict[str, float]:
        """No held-out figure: the verdicts are what counts."""
        return {}


def _device(core: Llama) -> torch.device:
    return core.embed_tokens.weight.device


def language_loss(core: Llama, hidden: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy in nats per token of predicting each prompt's next token; hidden [B, T, C]."""
    position = torch.arange(batch.tokens.shape[1] - 1, device=batch.tokens.device)
    rows, at = (position < batch.n_prompt[:, None] - 1).nonzero(as_tuple=True)
    return F.cross_entropy(core.logits(hidden[rows, at]).float(), batch.tokens[rows, at + 1])


class VerdictTask:
    """Soft verdicts at the verdict position, the answer's grammar and category behind it.

    Keeps a moving average of the weights: that is the guard which is evaluated and saved.
    """

    name = "guard-verdict"

    def __init__(
        self, core: Llama, tokenizer: Tokenizer, epochs: Epochs, recipe: Recipe, policy: Policy,
        held_out: Mapping[str, Sequence[Example]], lora: LoRA | None = None,
    ) -> None:  # fmt: skip
        self.core, self.tokenizer, self.epochs, self.recipe = core, tokenizer, epochs, recipe
        self.trained: nn.Module = lora or core
        parameters = [p for p in self.trained.parameters() if p.requires_grad]
        self.average = MovingAverage(parameters, recipe.average_decay)
        self.tokens = VerdictTokens.of(tokenizer, list(policy.shown.values()))
        self.policy, self.held_out = policy, held_out
        self.codes = known_codes(tokenizer) if recipe.augmentation else []
        self._step = 0

    def modules(self) -> Mapping[str, nn.Module]:
        """What is trained, and its moving average."""
        return {"core": self.trained, "average": self.average}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All weights that are trained at one rate."""
        return [{"params": [p for p in self.trained.parameters() if p.requires_grad]}]

    def batch(self, step: int) -> Batch:
        """Conversations of the step, under rules of the step where they are varied."""
        self._step = step
        rows = self.epochs[step]
        if self.recipe.augmentation is not None:
            rng = random.Random(f"{self.recipe.seed}-{step}-rules")
            rows = [self._varied(row, self.recipe.augmentation, rng) for row in rows]
        return collate(rows, self.tokenizer.pad_id).to(_device(self.core))

    def encoded(self, example: Example, policy: Policy) -> EncodedRow:
        """A row of this task."""
        return encode(example, self.tokenizer, policy)

    def _varied(self, row: EncodedRow, settings: Augmentation, rng: random.Random) -> EncodedRow:
        assert row.example is not None
        return self.encoded(*augment(row.example, self.policy, settings, self.codes, rng))

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy of the verdict plus the weighted side losses, nats per conversation."""
        self.average.update(self._step)
        hidden = self.core.hidden(embeddings=self._embeddings(batch))
        rows = torch.arange(len(batch.lengths), device=hidden.device)
        logp = self.core.logits(hidden[rows, batch.n_prompt - 1]).float().log_softmax(-1)
        unsafe, safe = logp[:, self.tokens.unsafe], logp[:, self.tokens.safe]
        verdict = -(batch.targets * unsafe + (1 - batch.targets) * safe).mean()
        loss = verdict + self.recipe.answer_weight * self._answer_loss(hidden, batch)
        if self.recipe.prefix_weight:
            loss = loss + self.recipe.prefix_weight * self._prefix_loss(hidden, batch)
        if self.recipe.language_weight:
            loss = loss + self.recipe.language_weight * language_loss(self.core, hidden, batch)
        return loss, {"verdict": verdict.item()}

    def _embeddings(self, batch: Batch) -> Tensor:
        """Embeddings [B, T, C] with dropout; only words of the conversation are blanked whole."""
        embeddings = self.core.embed(batch.tokens)
        if not self.core.training:
            return embeddings
        word = batch.tokens < self.tokenizer.n_words
        blank = (torch.rand(batch.tokens.shape, device=word.device) < self.recipe.token_dropout) & word
        blank &= torch.arange(batch.tokens.shape[1], device=word.device) < batch.n_prompt[:, None] - 1
        return F.dropout(embeddings.masked_fill(blank[..., None], 0.0), self.recipe.dropout)

    def _prefix_loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The verdict's cross-entropy read after every token of the prompt, averaged over tokens.

        One label per conversation is little to learn from; asking for it early and often (target
        replication, arXiv 1511.03677) tells each word how it moves the verdict.
        """
        direction = self.core.lm_head.weight[self.tokens.unsafe] - self.core.lm_head.weight[self.tokens.safe]
        position = torch.arange(batch.tokens.shape[1], device=hidden.device)
        inside = position < batch.n_prompt[:, None] - 1
        rows, at = inside.nonzero(as_tuple=True)
        return F.binary_cross_entropy_with_logits((hidden[rows, at] @ direction).float(), batch.targets[rows])

    def _answer_loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of the tokens behind the verdict token, summed over a row, averaged over rows."""
        position = torch.arange(batch.tokens.shape[1] - 1, device=hidden.device)
        behind = (position >= batch.n_prompt[:, None]) & (position < batch.lengths[:, None] - 1)
        rows, at = behind.nonzero(as_tuple=True)
        if not len(rows):
            return hidden.sum() * 0.0
        logits = self.core.logits(hidden[rows, at]).float()
        return F.cross_entropy(logits, batch.tokens[rows, at + 1], reduction="sum") / len(batch.lengths)

    def evaluate(self) -> dict[str, float]:
        """Area under the precision-recall curve of the averaged guard on each held-out set."""
        from sklearn.metrics import average_precision_score

        figures = {}
        with self.average.in_place():
            guard = Guard(self.core, self.tokenizer, self.policy)
            for name, held_out in self.held_out.items():
                labels = [int(e.unsafe) for e in held_out]
                if len(set(labels)) == 2:
                    verdicts = guard.classify([e.messages for e in held_out], batch_size=64)
                    scores = [v.probability for v in verdicts]
                    figures[f"auprc_{name}"] = float(average_precision_score(labels, scores))
        return figures

    def finish(self) -> Guard:
        """The guard with the averaged weights; nothing is trained after this."""
        self.average.exchange()
        self.trained.requires_grad_(False)
        return Guard(self.core.eval(), self.tokenizer, self.policy)
