"""Direct preference optimisation of the adapter: the better of two answers about a picture becomes likelier.

Source: arXiv 2305.18290, equation 7, with the additions of arXiv 2407.21783, sections 4.1.4 and 7.5.
Axes: B pairs, N answer tokens.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core_llm.adapters import Assistant
from core_llm.chat import Message
from core_llm.errors import DataError
from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer
from core_llm.train.accumulate import accumulated, split
from core_llm.train.answers import answer_log_probabilities, picked
from vision_adapter.examples import Example
from vision_adapter.stages.answers import AnswerTask
from vision_adapter.stages.presets import StageConfig

if TYPE_CHECKING:
    from vision_adapter.adapter import ImageAdapter


def preference_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
) -> Tensor:
    """-log sigmoid(beta · margin) per pair, from log-probabilities of whole answers, all [B] in nats."""
    margin = (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)
    return -F.logsigmoid(beta * margin)


class DPOTask(AnswerTask):
    """DPO with an NLL term on the chosen answer; special tokens count in neither.

    An end token that both answers share would be pushed up and down at once (section 4.1.4). The reference is
    the adapter as it was at the start, or follows it slowly (`reference_every`, section 7.5).
    """

    def __init__(
        self,
        name: str,
        core: Llama,
        tokenizer: Tokenizer,
        adapter: "ImageAdapter",
        examples: Sequence[Example],
        held_out: Sequence[Example],
        config: StageConfig,
        seed: int = 0,
    ) -> None:
        lacking = next((e.id for e in (*examples, *held_out) if e.rejected is None), None)
        if lacking is not None:
            raise DataError(f"{lacking}: DPO needs a 'rejected' answer beside each chosen one")
        super().__init__(name, core, tokenizer, adapter, examples, held_out, config, seed)
        self.reference = copy.deepcopy(adapter).requires_grad_(False)
        self.frozen = Assistant(core, tokenizer, [self.reference])
        self.step = -1

    def modules(self) -> Mapping[str, nn.Module]:
        """The adapter, and the reference that a resume must find again."""
        return {"adapter": self.adapter, "reference": self.reference}

    def batch(self, step: int) -> list[Example]:
        """Pairs of the step."""
        self.step = step
        return picked(self.examples, step, self.config.batch, f"{self.seed} {self.name}")

    def loss(self, batch: Sequence[Example]) -> tuple[Tensor, dict[str, float]]:
        """Mean over pairs of the preference loss plus `nll_weight` · NLL per token of the chosen answer."""
        every = self.config.reference_every
        if torch.is_grad_enabled() and every and self.step > 0 and self.step % every == 0:
            self._move_reference()
        found: list[tuple[Tensor, Tensor]] = []

        def losses() -> Iterator[Tensor]:
            for part in split(batch, self.config.micro_batch):
                terms, margins = self._terms(part)
                found.append((terms.detach(), margins.detach()))
                yield terms.sum() / len(batch)

        total = accumulated(losses(), self.parameters())
        margins = torch.cat([margin for _, margin in found])
        figures = {"margin": margins.mean().item(), "preferred": (margins > 0).float().mean().item()}
        return total, figures | self.adapter.gates()

    def weight(self, batch: Sequence[Example]) -> float:
        """What the mean of the loss is over: pairs."""
        return float(len(batch))

    def _terms(self, pairs: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Loss and margin of each pair [B]."""
        conversations = [e.conversation() for e in pairs] + [e.conversation(e.rejected) for e in pairs]
        n = len(pairs)
        policy, lengths = self._answers(self.assistant, conversations)
        with torch.no_grad():
            reference, _ = self._answers(self.frozen, conversations)
        loss = preference_loss(policy[:n], policy[n:], reference[:n], reference[n:], self.config.beta)
        nll = -policy[:n] / lengths[:n].clamp(min=1)
        margin = (policy[:n] - policy[n:]) - (reference[:n] - reference[n:])
        return loss + self.config.nll_weight * nll, margin

    @staticmethod
    def _answers(assistant: Assistant, conversations: Sequence[Sequence[Message]]) -> tuple[Tensor, Tensor]:
        """log p of each last answer without its special tokens [B], and how many tokens that is [B]."""
        chosen, tokens, rows = answer_log_probabilities(assistant, conversations, last_only=True)
        said = (tokens < assistant.tokenizer.n_words).float()
        zero = torch.zeros(len(conversations), device=chosen.device)
        return zero.index_add(0, rows, chosen * said), zero.index_add(0, rows, said)

    @torch.no_grad()
    def _move_reference(self) -> None:
        """Exponential moving average of the policy."""
        own = dict(self.adapter.named_parameters())
        for name, kept in self.reference.named_parameters():
            kept.lerp_(own[name].to(kept.dtype), 1 - self.config.reference_decay)

    def evaluate(self) -> dict[str, float]:
        """Loss on held-out pairs, and how often the policy moved towards the chosen answer."""
        if not self.held_out:
            return {}
        loss, figures = self.loss(self.held_out)
        return {"held_out_loss": loss.item(), "held_out_preferred": figures["preferred"]}
