"""Training rows of the guard as token ids, and the order in which they are shown.

Axes: B conversations, T positions, K categories.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from core_llm.tokenizer import Tokenizer
from guard.examples import Example
from guard.policy import Policy
from guard.prompt import VerdictTokens, answer_ids, prompts


@dataclass(frozen=True)
class EncodedRow:
    """One conversation: prompt and answer ids, length of the prompt, P(unsafe) to learn.

    codes, opinion: the token and a teacher's probability of each category, where it was asked.
    """

    ids: list[int]
    n_prompt: int
    target: float
    example: Example | None = None
    codes: tuple[int, ...] = ()
    opinion: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class Batch:
    """Right-padded rows. tokens [B, T], lengths [B], n_prompt [B], targets [B].

    codes, opinions [B, K]: padded with -1 and 0; K is 0 where no teacher was asked.
    """

    tokens: Tensor
    lengths: Tensor
    n_prompt: Tensor
    targets: Tensor
    codes: Tensor
    opinions: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def encode(example: Example, tokenizer: Tokenizer, policy: Policy) -> EncodedRow:
    """An example as the guard sees it; of a message longer than one window, the first window.

    The answer is the verdict with its end of turn. A guard that reads no rules names one category, the others
    all that are known.
    """
    prompt = prompts(example.messages, tokenizer, policy)[0]
    shown = policy.shown
    known = [shown[code] for code in example.codes if code in shown]
    answer = answer_ids(known[:1] if policy.brief else known, tokenizer)
    if example.unsafe and not known:
        answer = list(tokenizer.encode("unsafe"))
    return EncodedRow(prompt + answer, len(prompt), example.target, example)


def encode_forced(example: Example, tokenizer: Tokenizer, policy: Policy) -> EncodedRow:
    """The prompt with the forced `unsafe\\nS` behind it, as verdicts are read, and the teacher's opinion."""
    prompt = prompts(example.messages, tokenizer, policy)[0]
    shown = policy.shown
    tokens = VerdictTokens.of(tokenizer, list(shown.values()))
    opinion = example.opinion
    if opinion is None:
        target, shares = (
            example.target,
            tuple(
                float(example.unsafe and bool(example.codes) and code == example.codes[0]) for code in shown
            ),
        )
    else:
        shares = tuple(opinion.get(code, 0.0) for code in shown)
        target = min(1.0, sum(shares))
    codes = tuple(tokens.codes[code] for code in shown.values())
    return EncodedRow([*prompt, *tokens.forced], len(prompt), target, example, codes, shares)


def collate(rows: Sequence[EncodedRow], pad_id: int) -> Batch:
    """Rows of unequal length as one batch."""
    width = max(len(row.ids) for row in rows)
    most = max(len(row.codes) for row in rows)
    return Batch(
        torch.tensor([row.ids + [pad_id] * (width - len(row.ids)) for row in rows]),
        torch.tensor([len(row.ids) for row in rows]),
        torch.tensor([row.n_prompt for row in rows]),
        torch.tensor([row.target for row in rows]),
        torch.tensor([[*row.codes, *[-1] * (most - len(row.codes))] for row in rows], dtype=torch.long),
        torch.tensor(
            [[*row.opinion, *[0.0] * (most - len(row.opinion))] for row in rows], dtype=torch.float32
        ),
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
