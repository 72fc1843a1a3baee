"""What trainers of answers share: probabilities of what is said, the tokens to learn, examples in epochs.

Axes: N answer tokens, V vocabulary.
"""

import random
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from core_llm.adapters import Assistant
from core_llm.chat import Message, render
from core_llm.generate import hidden_states

Example = TypeVar("Example")


def answer_log_probabilities(
    assistant: Assistant, conversations: Sequence[Sequence[Message]], last_only: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """log p (nats) of what the assistant says [N], those tokens [N], and their rows [N].

    last_only: of the last message alone. Gradients reach the adapters.
    """
    logits, tokens, rows = answer_logits(assistant, conversations, last_only)
    return logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0], tokens, rows


def answer_logits(
    assistant: Assistant, conversations: Sequence[Sequence[Message]], last_only: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits fp32 [N, V] of the tokens that the assistant says, those tokens [N], and their rows [N]."""
    request = assistant.prepare(conversations, generation_prompt=False)
    mask = request.loss_mask
    if last_only:
        position = torch.arange(request.width, device=mask.device)
        mask = mask & (position >= request.answer_starts[:, None])
    rows, positions = mask[:, 1:].nonzero(as_tuple=True)
    hidden = hidden_states(assistant.core, request)[rows, positions]
    tokens = request.targets[rows, positions + 1]
    return assistant.core.logits(hidden).float(), tokens, rows


def n_answer_tokens(assistant: Assistant, conversations: Sequence[Sequence[Message]]) -> int:
    """How many tokens the assistant says in all, without running anything."""
    chat, tokenizer = assistant.chat, assistant.tokenizer
    return sum(sum(render(messages, tokenizer, False, chat).loss_mask) for messages in conversations)


def picked(examples: Sequence[Example], step: int, batch: int, seed: str) -> list[Example]:
    """The examples of a step: every epoch has each of them once, in an order of its own."""
    n = len(examples)
    found: list[Example] = []
    for index in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(index, n)
        found.append(examples[_order(n, f"{seed} {epoch}")[place]])
    return found


_orders: dict[tuple[int, str], list[int]] = {}


def _order(n: int, seed: str) -> list[int]:
    """A permutation; the last two are kept, for a step that spans two epochs."""
    if (n, seed) not in _orders:
        while len(_orders) > 1:
            _orders.pop(next(iter(_orders)))
        _orders[n, seed] = random.Random(seed).sample(range(n), n)
    return _orders[n, seed]
