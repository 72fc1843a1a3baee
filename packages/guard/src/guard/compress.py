"""A smaller guard out of a guard: pruned, healed by distillation from what it was, quantised."""

import copy
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from core_llm.errors import UserError
from core_llm.model import Llama
from core_llm.quantize import EMBEDDINGS, quantize, saved_bytes
from core_llm.train.fit import FitConfig, fit
from guard.batches import Batch, Epochs, collate, encode_forced
from guard.distillation import Distillation, DistilTask, with_opinions
from guard.examples import Example
from guard.fake_quantisation import rounded_weights
from guard.guard import Guard
from guard.head import cut_head
from guard.pruning import check, prune
from guard.tasks import Recipe

_IMPORTANCE_BATCH = 32


@dataclass(frozen=True)
class Compression:
    """How small a guard is made. layers, ffn: None leaves them; head: cut to the verdict's tokens.

    scheme: int8 or int4 weights, or None. aware: heal with rounded weights. rows: conversations by which
    importance is measured. batch: of the healing.
    """

    layers: int | None = None
    ffn: int | None = None
    head: bool = False
    scheme: str | None = None
    aware: bool = False
    rows: int = 256
    batch: int = 32
    average_decay: float = 0.95
    seed: int = 0
    distillation: Distillation = Distillation()

    def __post_init__(self) -> None:
        if self.scheme is not None and self.scheme not in EMBEDDINGS:
            raise UserError(f"unknown quantisation '{self.scheme}'; known: {', '.join(EMBEDDINGS)}")
        if self.aware and self.scheme is None:
            raise UserError("--qat rounds weights as --quantize will: give --quantize too")
        if self.rows < 1 or self.batch < 1:
            raise UserError("--rows and --batch must be at least 1")


@dataclass(frozen=True)
class Stage:
    """One line of the report: bytes of the weights on disk, held-out figures (auprc_NAME)."""

    name: str
    bytes: int
    figures: dict[str, float]


def compress(
    guard: Guard, parts: Sequence[tuple[Sequence[Example], int | None]],
    held_out: dict[str, list[Example]], config: FitConfig, settings: Compression,
) -> tuple[Guard, list[Stage]]:  # fmt: skip
    """A smaller copy of the guard, and size and figures of every stage on the way.

    config.steps: of the healing, 0 leaves it out. Raises `UserError` for a shape that does not fit.
    """
    check(guard.core, settings.layers, settings.ffn, settings.scheme)
    policy, tokenizer = guard.policy, guard.tokenizer
    core = copy.deepcopy(guard.core)
    if settings.head:
        cut_head(core, tokenizer, list(policy.shown.values()))
    stages = [Stage("full", saved_bytes(guard.core), measure(guard, held_out))]
    batches = _sample(guard, [e for rows, _ in parts for e in rows], settings, core)
    prune(core, batches, guard.tokens, settings.layers, settings.ffn)
    small = Guard(core, tokenizer, policy, guard.threshold)
    stages.append(Stage("pruned", saved_bytes(core), measure(small, held_out)))
    if config.steps:
        cache = config.out / "opinions.jsonl"
        shown = _shown(parts, config.steps * settings.batch, settings.seed)
        taught = [(with_opinions(guard, rows, cache), amount) for rows, amount in shown]
        recipe = Recipe(
            dropout=0.0, token_dropout=0.0, average_decay=settings.average_decay, batch=settings.batch,
            seed=settings.seed,
        )  # fmt: skip
        encoded = [([encode_forced(e, tokenizer, policy) for e in rows], n) for rows, n in taught]
        core.requires_grad_(True)
        with rounded_weights(core, settings.scheme if settings.aware else None):
            task = DistilTask(
                core, tokenizer, Epochs(encoded, settings.batch, settings.seed), recipe, policy, {}, None,
                settings.distillation,
            )  # fmt: skip
            fit(task, config)
            task.finish()
        small = Guard(core.eval().requires_grad_(False), tokenizer, policy, guard.threshold)
        stages.append(Stage("healed", saved_bytes(core), measure(small, held_out)))
    if settings.scheme is not None:
        # The table of a head that is not cut stays: transformers and adapters read it.
        quantize(core, settings.scheme, progress=True, embedding=settings.head)
        small = Guard(core, tokenizer, policy, guard.threshold)
        stages.append(Stage(settings.scheme, saved_bytes(core), measure(small, held_out)))
    return small, stages


def _shown(
    parts: Sequence[tuple[Sequence[Example], int | None]], rows: int, seed: int
) -> list[tuple[list[Example], int | None]]:
    """As many examples of each part as that many rows show: of others the teacher need not be asked."""
    epochs = rows / sum(amount or len(part) for part, amount in parts)
    rng = random.Random(f"shown-{seed}")
    found: list[tuple[list[Example], int | None]] = []
    for part, amount in parts:
        needed = min(len(part), math.ceil((amount or len(part)) * epochs))
        chosen = rng.sample(list(part), needed)
        found.append((chosen, amount if epochs >= 1 else None))
    return found


def _sample(guard: Guard, examples: Sequence[Example], settings: Compression, core: Llama) -> list[Batch]:
    """Batches of conversations by which layers and neurons are chosen."""
    rng = random.Random(f"importance-{settings.seed}")
    chosen = rng.sample(list(examples), min(settings.rows, len(examples)))
    rows = [encode_forced(example, guard.tokenizer, guard.policy) for example in chosen]
    rows.sort(key=lambda row: len(row.ids))
    device = core.embed_tokens.weight.device
    return [
        collate(rows[i : i + _IMPORTANCE_BATCH], guard.tokenizer.pad_id).to(device)
        for i in range(0, len(rows), _IMPORTANCE_BATCH)
    ]


@torch.inference_mode()
def measure(guard: Guard, held_out: dict[str, list[Example]]) -> dict[str, float]:
    """Area under the precision-recall curve on each held-out set with both verdicts."""
    from sklearn.metrics import average_precision_score

    figures = {}
    for name, rows in held_out.items():
        labels = [int(e.unsafe) for e in rows]
        if len(set(labels)) == 2:
            verdicts = guard.classify([e.messages for e in rows], batch_size=64)
            scores = [v.probability for v in verdicts]
            figures[f"auprc_{name}"] = float(average_precision_score(labels, scores))
    return figures


def report(stages: Sequence[Stage]) -> str:
    """The stages as a Markdown table."""
    names = sorted({name for stage in stages for name in stage.figures})
    titles = [name.replace("auprc_", "AUPRC ") for name in names]
    lines = [f"| guard | weights, MB | {' | '.join(titles)} |", "|---" * (len(names) + 2) + "|"]
    for stage in stages:
        figures = " | ".join(f"{stage.figures[name]:.3f}" for name in names)
        lines.append(f"| {stage.name} | {stage.bytes / 1e6:.2f} | {figures} |")
    return "\n".join(lines) + "\n"


def write_report(folder: Path, stages: Sequence[Stage]) -> None:
    """Write the table beside the checkpoint."""
    temporary = folder / "compression.md.tmp"
    temporary.write_text(report(stages))
    os.replace(temporary, folder / "compression.md")
