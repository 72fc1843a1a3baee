"""Training of the guard: language of the safety sets first, verdicts second.

Axes: B conversations, T positions, C model width, V vocabulary.
"""

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer
from core_llm.train.fit import FitConfig, fit
from guard import examples
from guard.examples import Example
from guard.guard import Guard
from guard.policy import Policy
from guard.prompt import VerdictTokens, answer_ids, prompts
from guard.teacher import baseline_scores


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
    average_decay: float = 0.99  # of the exponential moving average of the weights
    seed: int = 0


@dataclass(frozen=True)
class EncodedRow:
    """One conversation: prompt and answer ids, length of the prompt, P(unsafe) to learn."""

    ids: list[int]
    n_prompt: int
    target: float


@dataclass(frozen=True, eq=False)
class Batch:
    """Right-padded rows. tokens [B, T], lengths [B], n_prompt [B], targets [B]."""

    tokens: Tensor
    lengths: Tensor
    n_prompt: Tensor
    targets: Tensor


def encode(example: Example, tokenizer: Tokenizer, policy: Policy) -> EncodedRow:
    """An example as the guard sees it; of a message longer than one window, the first window."""
    prompt = prompts(example.messages, tokenizer, policy)[0]
    known = example.code if example.code in policy.categories else None
    answer = answer_ids([known] if known else [], tokenizer)
    if example.unsafe and not known:
        answer = list(tokenizer.encode("unsafe"))
    return EncodedRow(prompt + answer, len(prompt), example.target)


def collate(rows: Sequence[EncodedRow], pad_id: int) -> Batch:
    """Rows of unequal length as one batch."""
    width = max(len(row.ids) for row in rows)
    return Batch(
        torch.tensor([row.ids + [pad_id] * (width - len(row.ids)) for row in rows]),
        torch.tensor([len(row.ids) for row in rows]),
        torch.tensor([row.n_prompt for row in rows]),
        torch.tensor([row.target for row in rows]),
    )


class Epochs:
    """Batches of rows of like length, in an order that is a pure function of the step.

    `parts` are (rows, how many of them per epoch); None takes all, more than there are repeats them.
    """

    def __init__(
        self, parts: Sequence[tuple[Sequence[EncodedRow], int | None]], size: int, seed: int
    ) -> None:
        self.parts, self.size, self.seed = parts, size, seed
        self.length = -(-sum(n or len(rows) for rows, n in parts) // size)
        self._epoch = -1
        self._batches: list[list[EncodedRow]] = []

    def __getitem__(self, step: int) -> list[EncodedRow]:
        epoch, index = divmod(step, self.length)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffled(epoch)
        return self._batches[index]

    def _shuffled(self, epoch: int) -> list[list[EncodedRow]]:
        rng = random.Random(f"{self.seed}-{epoch}")
        chosen: list[EncodedRow] = []
        for rows, n in self.parts:
            whole, rest = divmod(n or len(rows), len(rows))
            chosen += [*list(rows) * whole, *rng.sample(list(rows), rest)]
        # Noise in the key: the same conversations should not meet in every epoch.
        chosen.sort(key=lambda row: len(row.ids) * rng.uniform(0.85, 1.15))
        batches = [chosen[i : i + self.size] for i in range(0, len(chosen), self.size)]
        rng.shuffle(batches)
        return batches


class LanguageTask:
    """Next-token prediction on the conversations: what the verdict is later read from."""

    name = "guard-language"

    def __init__(self, core: Llama, tokenizer: Tokenizer, epochs: Epochs) -> None:
        self.core, self.tokenizer, self.epochs = core, tokenizer, epochs

    def modules(self) -> Mapping[str, nn.Module]:
        """The core."""
        return {"core": self.core}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All weights at one rate."""
        return [{"params": list(self.core.parameters())}]

    def batch(self, step: int) -> Batch:
        """Conversations of the step."""
        return collate(self.epochs[step], self.tokenizer.pad_id)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Mean cross-entropy in nats per token of the prompts."""
        return language_loss(self.core, self.core.hidden(batch.tokens), batch), {}

    def weight(self, batch: Batch) -> float:
        """What the mean of the loss is over: the tokens of the prompts that are predicted."""
        return float((batch.n_prompt - 1).sum())

    def evaluate(self) -> dict[str, float]:
        """No held-out figure: the verdicts are what counts."""
        return {}


def language_loss(core: Llama, hidden: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy in nats per token of predicting each prompt's next token; hidden [B, T, C]."""
    position = torch.arange(batch.tokens.shape[1] - 1)
    rows, at = (position < batch.n_prompt[:, None] - 1).nonzero(as_tuple=True)
    return F.cross_entropy(core.logits(hidden[rows, at]).float(), batch.tokens[rows, at + 1])


class VerdictTask:
    """Soft verdicts at the verdict position, the answer's grammar and category behind it.

    Keeps a moving average of the weights: that is the guard which is evaluated and saved.
    """

    name = "guard-verdict"

    def __init__(
        self, core: Llama, tokenizer: Tokenizer, epochs: Epochs, recipe: Recipe, policy: Policy,
        held_out: Mapping[str, Sequence[Example]],
    ) -> None:  # fmt: skip
        self.core, self.tokenizer, self.epochs, self.recipe = core, tokenizer, epochs, recipe
        self.average = copy.deepcopy(core).requires_grad_(False)
        self.tokens = VerdictTokens.of(tokenizer, list(policy.categories))
        self.policy, self.held_out = policy, held_out
        self._step = 0

    def modules(self) -> Mapping[str, nn.Module]:
        """The core and its moving average."""
        return {"core": self.core, "average": self.average}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All weights of the core at one rate."""
        return [{"params": list(self.core.parameters())}]

    def batch(self, step: int) -> Batch:
        """Conversations of the step."""
        self._step = step
        return collate(self.epochs[step], self.tokenizer.pad_id)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy of the verdict plus the weighted side losses, nats per conversation."""
        self._update_average()
        hidden = self.core.hidden(embeddings=self._embeddings(batch))
        rows = torch.arange(len(batch.lengths))
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
        blank = (torch.rand(batch.tokens.shape) < self.recipe.token_dropout) & word
        blank &= torch.arange(batch.tokens.shape[1]) < batch.n_prompt[:, None] - 1
        return F.dropout(embeddings.masked_fill(blank[..., None], 0.0), self.recipe.dropout)

    def _prefix_loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The verdict's cross-entropy read after every token of the prompt, averaged over tokens.

        One label per conversation is little to learn from; asking for it early and often (target
        replication, arXiv 1511.03677) tells each word how it moves the verdict.
        """
        direction = self.core.lm_head.weight[self.tokens.unsafe] - self.core.lm_head.weight[self.tokens.safe]
        inside = torch.arange(batch.tokens.shape[1]) < batch.n_prompt[:, None] - 1
        rows, at = inside.nonzero(as_tuple=True)
        return F.binary_cross_entropy_with_logits((hidden[rows, at] @ direction).float(), batch.targets[rows])

    def _answer_loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of the tokens behind the verdict token, summed over a row, averaged over rows."""
        position = torch.arange(batch.tokens.shape[1] - 1)
        behind = (position >= batch.n_prompt[:, None]) & (position < batch.lengths[:, None] - 1)
        rows, at = behind.nonzero(as_tuple=True)
        if not len(rows):
            return hidden.sum() * 0.0
        logits = self.core.logits(hidden[rows, at]).float()
        return F.cross_entropy(logits, batch.tokens[rows, at + 1], reduction="sum") / len(batch.lengths)

    @torch.no_grad()
    def _update_average(self) -> None:
        # Early on the average follows closely, or the untrained start would linger in it.
        decay = min(self.recipe.average_decay, (1 + self._step) / (10 + self._step))
        for kept, new in zip(self.average.parameters(), self.core.parameters(), strict=True):
            kept.lerp_(new, 1 - decay)

    def evaluate(self) -> dict[str, float]:
        """Area under the precision-recall curve of the averaged guard on each held-out set."""
        from sklearn.metrics import average_precision_score

        guard = Guard(self.average, self.tokenizer, self.policy)
        figures = {}
        for name, held_out in self.held_out.items():
            verdicts = guard.classify([e.messages for e in held_out], batch_size=64)
            labels = [int(e.unsafe) for e in held_out]
            if len(set(labels)) == 2:
                scores = [v.probability for v in verdicts]
                figures[f"auprc_{name}"] = float(average_precision_score(labels, scores))
        return figures


def fine_tune(
    core: Llama, tokenizer: Tokenizer, parts: Sequence[tuple[Sequence[Example], int | None]],
    held_out: Mapping[str, Sequence[Example]], config: FitConfig, recipe: Recipe, policy: Policy,
) -> tuple[Guard, dict[str, float]]:  # fmt: skip
    """Train a copy of `core` on (examples, how many per epoch) and return the guard with its figures.

    config.steps counts the verdict stage; the language stage before it has recipe.language_steps.
    """
    torch.manual_seed(recipe.seed)
    model = copy.deepcopy(core).requires_grad_(True)
    encoded = [([encode(e, tokenizer, policy) for e in part], n) for part, n in parts]
    if recipe.language_steps:
        # Reading needs no balance of verdicts: more of the large sets, nothing twice.
        amounts = [(rows, n and min(4 * n, len(rows))) for rows, n in encoded]
        everything = Epochs(amounts, recipe.batch, recipe.seed)
        stage = replace(config, steps=recipe.language_steps, lr=recipe.language_lr, eval_every=0)
        fit(LanguageTask(model, tokenizer, everything), stage)
    epochs = Epochs(encoded, recipe.batch, recipe.seed)
    task = VerdictTask(model, tokenizer, epochs, recipe, policy, held_out)
    figures = fit(task, config)
    return Guard(task.average.eval(), tokenizer, policy), figures


def train(
    core: Llama, tokenizer: Tokenizer, data_root: Path | None, config: FitConfig, recipe: Recipe
) -> tuple[Guard, dict[str, float]]:
    """The nano recipe on all safety sets, evaluated on the dev rows at the end only.

    The figures hold the baseline of the same rows too, see `baselines`.
    """
    loaded = {name: examples.load(name, data_root, recipe.teacher_weight) for name in examples.MIXTURE}
    parts = [(loaded[name], part.per_epoch) for name, part in examples.MIXTURE.items()]
    parts.append((examples.templates(examples.TEMPLATES, recipe.seed), examples.TEMPLATES_PER_EPOCH))
    dev = ("diasafety", "openai_moderation")
    held_out = {name: examples.load(name, data_root, split="dev") for name in dev}
    guard, figures = fine_tune(core, tokenizer, parts, held_out, config, recipe, Policy(brief=True))
    for name, rows in held_out.items():
        figures |= baselines(name, loaded[name], rows)
    return guard, figures


def baselines(name: str, rows: Sequence[Example], held_out: Sequence[Example]) -> dict[str, float]:
    """What a score must be compared with: number of held-out rows, share of unsafe ones, TF-IDF's AUPRC."""
    from sklearn.metrics import average_precision_score

    labels = [int(e.unsafe) for e in held_out]
    known = [int(e.unsafe) for e in rows]
    scores = baseline_scores([e.pair for e in rows], known, [e.pair for e in held_out])
    return {
        f"rows_{name}": float(len(labels)),
        f"base_rate_{name}": sum(labels) / len(labels),
        f"tfidf_{name}": float(average_precision_score(labels, scores)),
    }
