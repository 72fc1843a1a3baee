"""Pre-training of the nano core: the project's own scenes and phrases, and grade-school maths.

Axes: B windows, T positions in a window.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core_llm import processes
from core_llm.chat import Message, render
from core_llm.config import LlamaConfig
from core_llm.data import sources
from core_llm.data.packing import Document, Packed, pack
from core_llm.data.phrases import (
    checklist_conversation,
    command_conversation,
    presence_conversation,
    sample_conversation,
    sample_texts,
)
from core_llm.kernels import Mask
from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer
from core_llm.train.fit import FitConfig, fit

# Every token that the assistant says is a target; of all other text only this share, drawn at random,
# because the head over the vocabulary is a third of the work.
CONTEXT_SHARE = 0.2


@dataclass(frozen=True)
class PretrainConfig:
    """Sizes of the run: tokens per step = windows × width."""

    windows: int = 32
    width: int = 144
    pool: int = 40_000  # distinct conversations of the project's own world, easy ones and all kinds each
    easy_steps: int = 400  # first steps on scenes of one shape alone: short texts, many answers
    easy_share: float = 0.35  # of such conversations afterwards
    checklist_from: int = 750  # step from which lists of what is there are among the texts
    checklist_share: float = 0.4
    maths_share: float = 0.04  # share of documents that are grade-school maths
    presence_steps: int = 800  # of the second stage
    presence_windows: int = 16
    presence_lr: float = 2e-3
    blend_steps: int = 450  # of the third stage
    blend_windows: int = 24
    blend_lr: float = 1.5e-3
    command_share: float = 0.3  # of that stage, for each whole of the rest: short documents
    seed: int = 0


def document(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    rng: random.Random,
    context_share: float = CONTEXT_SHARE,
) -> Document:
    """A conversation as a packed document."""
    rendered = render(messages, tokenizer, generation_prompt=False)
    weights = [float(said or rng.random() < context_share) for said in rendered.loss_mask]
    return Document(rendered.ids, weights)


def maths_conversations(data_root: Path | None, split: str) -> list[list[Message]]:
    """GSM8K as question and worked answer; the dataset's <<calculator>> marks are left out."""
    import re

    rows = sources.load("gsm8k", data_root, split)
    marks = re.compile(r"<<.*?>>")
    return [
        [Message("user", row.fields["question"]), Message("assistant", marks.sub("", row.fields["answer"]))]
        for row in rows
    ]


def tokenizer_texts(data_root: Path | None) -> list[str]:
    """What the nano vocabulary is trained on: own texts, maths, and training text of the dialogue sets."""
    texts = list(sample_texts(seed=0, n=8000))
    texts += [message.text for messages in maths_conversations(data_root, "train") for message in messages]
    for row in sources.load("diasafety", data_root, "train"):
        texts += [row.fields["context"], row.fields["response"]]
    texts += [row.fields["prompt"] for row in sources.load("openai_moderation", data_root, "train")]
    texts += [row.fields["prompt"] for row in sources.load("mitre_frr", data_root, "train")]
    return texts


class PretrainTask:
    """Next-token prediction over packed conversations with document masks."""

    name = "pretrain"

    def __init__(
        self, model: Llama, tokenizer: Tokenizer, config: PretrainConfig, data_root: Path | None
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        rng = random.Random(f"pretrain-{config.seed}")
        self.easy, self.own = (
            [document(sample_conversation(rng, several), tokenizer, rng) for _ in range(config.pool)]
            for several in (False, True)
        )
        self.maths = [document(m, tokenizer, rng) for m in maths_conversations(data_root, "train")]
        self.lists = [document(checklist_conversation(rng), tokenizer, rng) for _ in range(config.pool // 2)]
        held_out = random.Random("held-out")  # a seed that no training run uses
        self.held_out = [document(sample_conversation(held_out), tokenizer, held_out) for _ in range(400)]

    def modules(self) -> Mapping[str, nn.Module]:
        """The core."""
        return {"core": self.model}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All weights at one rate."""
        return [{"params": list(self.model.parameters())}]

    def batch(self, step: int) -> Packed:
        """Windows of the step, drawn from the pools."""
        rng = random.Random(f"{self.config.seed}-{step}")
        config = self.config
        easy = 1.0 if step < config.easy_steps else config.easy_share
        pools, shares = (
            [self.maths, self.easy, self.own],
            [config.maths_share, (1 - config.maths_share) * easy, (1 - config.maths_share) * (1 - easy)],
        )
        if step >= config.checklist_from:
            pools, shares = [*pools, self.lists], [*shares, config.checklist_share]

        def stream() -> Iterator[Document]:
            while True:
                yield rng.choice(rng.choices(pools, shares)[0])

        return pack(stream(), self.config.width, self.config.windows, self.tokenizer.pad_id)

    def loss(self, batch: Packed) -> tuple[Tensor, dict[str, float]]:
        """Weighted cross-entropy, nats per token."""
        return packed_loss(self.model, batch), {}

    def weight(self, batch: Packed) -> float:
        """What the mean of the loss is over: the weights of the targets."""
        return batch.weights[:, 1:].sum().item()

    def evaluate(self) -> dict[str, float]:
        """Loss on conversations that were not trained on."""
        windows = pack(self.held_out, self.config.width, 64, self.tokenizer.pad_id)
        return {"held_out_loss": packed_loss(self.model, windows).item()}


class PresenceTask(PretrainTask):
    """The second stage: is something there? First asked plainly, then in the negative too.

    In the general mix this never takes off: the answer is the parity of two comparisons, and its gradient
    drowns in that of the rest. Asked alone, without negation, it is learned in a few hundred steps; negation
    then only has to flip it, and the general mix comes back last.
    """

    name = "pretrain-presence"

    def __init__(
        self, model: Llama, tokenizer: Tokenizer, config: PretrainConfig, data_root: Path | None
    ) -> None:
        super().__init__(model, tokenizer, config, data_root)
        rng = random.Random(f"presence-{config.seed}")
        self.plain, self.negated = (
            [
                document(presence_conversation(rng, share), tokenizer, rng, 0.0)
                for _ in range(config.pool // 4)
            ]
            for share in (0.0, 0.5)
        )

    def batch(self, step: int) -> Packed:
        """Windows of the step: plain questions, then negated ones, then ever more of the general mix."""
        rng = random.Random(f"presence-{self.config.seed}-{step}")
        progress = step / self.config.presence_steps
        pools = [self.plain, self.negated, self.own, self.lists, self.maths]
        if progress < 0.45:
            shares = [1.0, 0.0, 0.0, 0.0, 0.0]
        elif progress < 0.7:
            shares = [0.2, 0.6, 0.2, 0.0, 0.0]
        else:
            shares = [0.05, 0.35, 0.5, 0.05, 0.05]

        def stream() -> Iterator[Document]:
            while True:
                yield rng.choice(rng.choices(pools, shares)[0])

        return pack(stream(), self.config.width, self.config.presence_windows, self.tokenizer.pad_id)


class BlendTask(PresenceTask):
    """The last stage: everything together, so that what the second stage pushed aside comes back.

    Here the core also learns to repeat the wider vocabulary of spoken commands.
    """

    name = "pretrain-blend"

    def __init__(
        self, model: Llama, tokenizer: Tokenizer, config: PretrainConfig, data_root: Path | None
    ) -> None:
        super().__init__(model, tokenizer, config, data_root)
        rng = random.Random(f"repeat-{config.seed}")
        self.commands = [
            document(command_conversation(rng), tokenizer, rng, 0.0) for _ in range(config.pool // 2)
        ]

    def batch(self, step: int) -> Packed:
        """Windows of the step, drawn from all pools."""
        rng = random.Random(f"blend-{self.config.seed}-{step}")
        pools = [self.easy, self.own, self.negated, self.lists, self.maths, self.commands]
        shares = [0.3, 0.4, 0.2, 0.06, 0.04, self.config.command_share]

        def stream() -> Iterator[Document]:
            while True:
                yield rng.choice(rng.choices(pools, shares)[0])

        return pack(stream(), self.config.width, self.config.blend_windows, self.tokenizer.pad_id)


def packed_loss(model: Llama, batch: Packed) -> Tensor:
    """Cross-entropy in nats per token of packed windows, weighted per target."""
    hidden = model.hidden(batch.tokens, mask=Mask.packed(batch.documents))
    weights = batch.weights[:, 1:]
    # Only positions that predict something go through the head.
    rows, at = weights.nonzero(as_tuple=True)
    losses = F.cross_entropy(
        model.logits(hidden[rows, at]).float(), batch.tokens[rows, at + 1], reduction="none"
    )
    chosen = weights[rows, at]
    return (losses * chosen).sum() / chosen.sum()


def pretrain(
    config: LlamaConfig, data_root: Path | None, fit_config: FitConfig, run: PretrainConfig
) -> tuple[Llama, Tokenizer, dict[str, float]]:
    """Train tokenizer and core from scratch; a second call with the same folder resumes."""
    saved = fit_config.out / "tokenizer.json"
    with processes.writer_first():
        if saved.exists():
            tokenizer = Tokenizer.load(saved)
        else:
            tokenizer = Tokenizer.train(tokenizer_texts(data_root), config.vocab_size)
            fit_config.out.mkdir(parents=True, exist_ok=True)
            tokenizer.save(saved)
    model = Llama(config).initialise(run.seed)
    torch.manual_seed(run.seed)
    figures = fit(PretrainTask(model, tokenizer, run, data_root), fit_config)
    if run.presence_steps:
        stage = replace(fit_config, steps=run.presence_steps, lr=run.presence_lr, warmup=20)
        fit(PresenceTask(model, tokenizer, run, data_root), stage)
        stage = replace(fit_config, steps=run.blend_steps, lr=run.blend_lr, warmup=20)
        figures = fit(BlendTask(model, tokenizer, run, data_root), stage)
    return model, tokenizer, figures
