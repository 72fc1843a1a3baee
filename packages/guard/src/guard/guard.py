"""The guard: one forward pass per batch gives P(unsafe) and every category's probability.

Axes: B prompts, T positions, V vocabulary.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core_llm.chat import Message
from core_llm.checkpoint import load_core, save_core
from core_llm.errors import CheckpointError, UserError
from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer
from guard.policy import Policy
from guard.prompt import VerdictTokens, prompts

NANO = Path(__file__).parent / "nano"
SETTINGS = "guard.json"

# Below this P(safe) + P(unsafe) the answer is not a verdict: it is read as unsafe.
MIN_MASS = 0.5


@dataclass(frozen=True)
class Verdict:
    """Judgement of the last message of a conversation.

    probability: P(unsafe) / (P(safe) + P(unsafe)) in the most suspicious window. mass: P(safe) + P(unsafe)
    there; where it is below one half the answer is no verdict and counts as unsafe. categories: code →
    probability that the message is unsafe and this is the first category named; they add up to `probability`.
    flagged: the categories named, where the policy has thresholds of their own for some; else None. policy:
    digest of the policy that was judged by.
    """

    unsafe: bool
    probability: float
    mass: float
    categories: dict[str, float]
    flagged: tuple[str, ...] | None = None
    policy: str = ""

    @property
    def named(self) -> list[str]:
        """The categories of an unsafe verdict: the strongest one, and all above a quarter of the verdict."""
        if not self.unsafe:
            return []
        if self.flagged is not None:
            return list(self.flagged)
        strongest = max(self.categories, key=lambda code: self.categories[code])
        floor = self.probability / 4
        return [c for c, p in self.categories.items() if c == strongest or (p >= floor and p > 0)]

    @property
    def text(self) -> str:
        """The verdict in the guard's own grammar."""
        return f"unsafe\n{','.join(self.named)}" if self.unsafe else "safe"


class Guard:
    """A core fine-tuned to judge conversations."""

    def __init__(
        self, core: Llama, tokenizer: Tokenizer, policy: Policy | None = None, threshold: float = 0.5
    ) -> None:
        if not 0 < threshold < 1:
            raise UserError(f"the threshold must be between 0 and 1, got {threshold}")
        self.core, self.tokenizer = core, tokenizer
        self.policy = policy or Policy()
        self.threshold = threshold
        self.tokens = VerdictTokens.of(tokenizer, list(self.policy.categories))
        self.name = "guard"

    @classmethod
    def load(cls, where: str | Path = "nano") -> "Guard":
        """The bundled guard ("nano") or the one in a folder.

        Raises `CheckpointError` for a missing, truncated or mismatched checkpoint.
        """
        folder = NANO if str(where) == "nano" else Path(where)
        if not folder.is_dir():
            raise CheckpointError(f"unknown guard '{where}'; known: nano, or a folder with a checkpoint")
        values = _read_settings(folder / SETTINGS)
        core, tokenizer = load_core(folder)
        try:
            policy = Policy(values["categories"], values["brief"], values["window"], values["context"])
            guard = cls(core, tokenizer, policy, values["threshold"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / SETTINGS}: {error} is missing or malformed") from error
        guard.name = f"guard-{where}" if str(where) == "nano" else folder.name
        return guard

    def save(self, folder: Path, card: str | None = None) -> None:
        """Write the checkpoint: a core in the Hugging Face layout, and the guard's settings."""
        values = {
            "categories": {code: category.name for code, category in self.policy.categories.items()},
            "brief": self.policy.brief,
            "window": self.policy.window,
            "context": self.policy.context,
            "threshold": self.threshold,
        }
        save_core(folder, self.core, self.tokenizer, card)
        temporary = folder / f"{SETTINGS}.tmp"
        temporary.write_text(json.dumps(values, indent=2) + "\n")
        os.replace(temporary, folder / SETTINGS)

    def classify(self, conversations: Sequence[Sequence[Message]], batch_size: int = 32) -> list[Verdict]:
        """Judge the last message of each conversation, in order.

        Raises `UserError` for an empty conversation or an empty last message.
        """
        rows: list[list[int]] = []
        owners: list[int] = []
        for owner, messages in enumerate(conversations):
            windows = prompts(messages, self.tokenizer, self.policy)
            rows += windows
            owners += [owner] * len(windows)
        verdicts: list[Verdict | None] = [None] * len(conversations)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # like lengths together: little padding
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            for index, verdict in zip(chosen, self._judge([rows[i] for i in chosen]), strict=True):
                verdicts[owners[index]] = _worse(verdicts[owners[index]], verdict)
        return [v for v in verdicts if v is not None]

    @torch.inference_mode()
    def scores(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Log-probabilities at the verdict position and behind the forced `unsafe\\nS`, both [B, V].

        rows are prompts as `prompt.prompts` builds them. Attention is causal, so what is forced behind the
        verdict position, and the padding behind that, cannot change the verdict.
        """
        forced = list(self.tokens.forced)
        lengths = torch.tensor([len(row) for row in rows])
        width = int(lengths.max()) + len(forced)
        pad = self.tokenizer.pad_id
        padded = [[*row, *forced, *[pad] * (width - len(row) - len(forced))] for row in rows]
        device = self.core.embed_tokens.weight.device
        hidden = self.core.hidden(torch.tensor(padded, device=device))
        at = torch.arange(len(rows), device=device)
        ends = lengths.to(device) - 1
        picked = torch.stack([hidden[at, ends], hidden[at, ends + len(forced)]])
        verdict, category = self.core.logits(picked).float().log_softmax(-1)
        return verdict.cpu(), category.cpu()

    def _judge(self, rows: Sequence[Sequence[int]]) -> list[Verdict]:
        verdict, category = self.scores(rows)
        pair = verdict[:, [self.tokens.safe, self.tokens.unsafe]].double()
        masses = pair.exp().sum(-1).tolist()
        probabilities = pair.softmax(-1)[:, 1].tolist()
        shares = category[:, list(self.tokens.codes.values())].double().softmax(-1).tolist()
        return [self._verdict(*row) for row in zip(probabilities, masses, shares, strict=True)]

    def _verdict(self, probability: float, mass: float, shares: list[float]) -> Verdict:
        if not all(map(math.isfinite, [probability, mass, *shares])):
            # Broken weights or overflow: nothing was judged, so nothing may pass.
            probability, mass, shares = 1.0, 0.0, [1 / len(shares)] * len(shares)
        unsafe = probability >= self.threshold or mass < MIN_MASS
        scores = [probability * share for share in shares]
        return Verdict(unsafe, probability, mass, dict(zip(self.tokens.codes, scores, strict=True)))


def _worse(first: Verdict | None, second: Verdict) -> Verdict:
    """The verdict that a message of several windows gets."""
    if first is None:
        return second
    return max(first, second, key=lambda verdict: (verdict.unsafe, verdict.probability))


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: no guard here ({SETTINGS} is missing)") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a guard's settings")
    return values
