"""Learning from a larger guard: its P(unsafe) and its probability of each category, instead of labels.

Distillation: arXiv 1503.02531; of guards: Llama Guard 3-1B-INT4 (arXiv 2411.17713). The teacher is asked by
its own prompt and read by its own tokens, so it may have another tokenizer and any size.
Axes: B conversations, T positions, V vocabulary, K categories.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from core_llm import processes
from core_llm.checkpoint import core_hash
from core_llm.errors import UserError
from core_llm.lora import LoRA
from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer
from guard.batches import Batch, EncodedRow, Epochs, encode_forced
from guard.examples import Example
from guard.guard import Guard
from guard.policy import Policy
from guard.tasks import Recipe, VerdictTask

_CHUNK = 256  # conversations between two writes of the teacher's opinions
_SURE = 1e-6  # nearer to 0 and 1 a probability in fp32 says nothing more


@dataclass(frozen=True)
class Distillation:
    """temperature: divides the logits of both guards. categories, mass: weights of these terms beside the
    verdict's. Raises `UserError` for a temperature that is not positive.
    """

    temperature: float = 2.0
    categories: float = 0.5
    mass: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"the temperature must be greater than 0, got {self.temperature}")


def read_logits(core: Llama, batch: Batch, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B, V] where the verdict stands, and logits [B, K] of the categories behind it.

    The batch holds rows of `encode_forced`; logits of padding (code -1) are minus infinity.
    """
    rows = torch.arange(len(batch.lengths), device=hidden.device)
    verdict = core.logits(hidden[rows, batch.n_prompt - 1]).float().log_softmax(-1)
    behind = core.logits(hidden[rows, batch.lengths - 1]).float()
    return verdict, behind.gather(1, batch.codes.clamp(min=0)).masked_fill(batch.codes < 0, float("-inf"))


def distillation_loss(
    pair: Tensor, categories: Tensor, batch: Batch, settings: Distillation
) -> tuple[Tensor, Tensor]:
    """Cross-entropies with the softened opinions, times the squared temperature: verdict, categories.

    pair [B, 2]: log-probabilities of safe and unsafe; categories [B, K]: logits. That of the categories
    counts as far as the teacher holds the message for unsafe.
    """
    heat = settings.temperature
    target = batch.targets.float().clamp(_SURE, 1 - _SURE)
    verdict = F.binary_cross_entropy_with_logits(
        (pair[:, 1] - pair[:, 0]) / heat, torch.sigmoid(target.logit() / heat)
    )
    known = batch.opinions.sum(-1) > 0
    weighed = torch.zeros((), device=pair.device)
    if bool(known.any()):
        shares = batch.opinions[known].clamp(min=_SURE * _SURE).log() / heat
        shares = shares.masked_fill(batch.codes[known] < 0, float("-inf")).softmax(-1)
        logs = (categories[known] / heat).log_softmax(-1).masked_fill(batch.codes[known] < 0, 0.0)
        weighed = -((shares * logs).sum(-1) * batch.targets[known]).sum() / len(batch.targets)
    return verdict * heat**2, weighed * heat**2


class DistilTask(VerdictTask):
    """A teacher's opinions at the two positions where verdicts are read."""

    name = "guard-distil"

    def __init__(
        self, core: Llama, tokenizer: Tokenizer, epochs: Epochs, recipe: Recipe, policy: Policy,
        held_out: Mapping[str, Sequence[Example]], lora: LoRA | None, settings: Distillation,
    ) -> None:  # fmt: skip
        super().__init__(core, tokenizer, epochs, recipe, policy, held_out, lora)
        self.settings = settings

    def encoded(self, example: Example, policy: Policy) -> EncodedRow:
        """A row with the forced answer behind it."""
        return encode_forced(example, self.tokenizer, policy)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """What is left to learn of the opinions, and the mass that is on neither verdict, in nats."""
        self.average.update(self._step)
        hidden = self.core.hidden(embeddings=self._embeddings(batch))
        logp, categories = read_logits(self.core, batch, hidden)
        pair = logp[:, [self.tokens.safe, self.tokens.unsafe]]
        verdict, named = distillation_loss(pair, categories, batch, self.settings)
        mass = -pair.logsumexp(-1).mean()
        loss = verdict + self.settings.categories * named + self.settings.mass * mass
        return loss, {"verdict": verdict.item(), "categories": named.item(), "mass": mass.item()}


def with_opinions(
    teacher: Guard, examples: Sequence[Example], cache: Path, batch_size: int = 32
) -> list[Example]:
    """The same examples with the teacher's opinion, and its P(unsafe) as the target.

    Opinions are kept in `cache` (JSON, no texts), `_CHUNK` conversations a line: a run that was interrupted
    asks for the same ones together as it would have, so it gets the same numbers to the last bit. Another
    teacher or another policy asks anew.
    """
    from tqdm import tqdm

    who = hashlib.sha256(f"{core_hash(teacher.core)}{teacher.policy.digest}".encode()).hexdigest()[:16]
    keys = [_key(who, example) for example in examples]
    known = _read_cache(cache)
    missing = {key: e for key, e in zip(keys, examples, strict=True) if key not in known}
    cache.parent.mkdir(parents=True, exist_ok=True)
    todo = list(missing.items())
    writes = processes.is_writer()
    with tqdm(total=len(todo), desc="teacher", unit="row", mininterval=1.0, disable=not writes) as bar:
        for start in range(0, len(todo), _CHUNK):
            part = todo[start : start + _CHUNK]
            verdicts = teacher.classify([e.messages for _, e in part], batch_size)
            new = {key: v.categories for (key, _), v in zip(part, verdicts, strict=True)}
            known |= new
            if writes:
                _append(cache, json.dumps(list(new.items())))
            bar.update(len(part))
    return [
        replace(e, opinion=known[key], target=min(1.0, sum(known[key].values())))
        for key, e in zip(keys, examples, strict=True)
    ]


def _key(who: str, example: Example) -> str:
    said = json.dumps([who, *((m.role, m.text) for m in example.messages)])
    return hashlib.sha256(said.encode()).hexdigest()


def _append(path: Path, line: str) -> None:
    """Write a line behind the others; where the last one was cut off, it is ended first."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(f"{line}\n".encode())


def _read_cache(path: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    if not path.is_file():
        return found
    for line in path.read_text(errors="replace").splitlines():
        try:
            found |= {key: {code: float(p) for code, p in told.items()} for key, told in json.loads(line)}
        except (ValueError, TypeError, AttributeError):
            continue  # the line at which a run was killed
    return found
