"""From a stage's name to a trained adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer
from core_llm.train.fit import fit
from speech_adapter.adapter import SpeechAdapter, create, load
from speech_adapter.config import PRESETS
from speech_adapter.examples import TASKS, Example, asked
from speech_adapter.stages.best_rq import BestRQTask
from speech_adapter.stages.ctc import CTCTask
from speech_adapter.stages.presets import STAGES, StageConfig
from speech_adapter.stages.sft import SFTTask
from speech_adapter.whisper_weights import PREFIX


def run_stage(
    stage: str,
    core: Llama,
    tokenizer: Tokenizer,
    adapter: SpeechAdapter,
    data: tuple[Sequence[Example], Sequence[Example]],
    out: Path,
    config: StageConfig,
    seed: int = 0,
    tasks: tuple[str, ...] = TASKS,
) -> dict[str, float]:
    """Train one stage of `adapter` in place; returns the held-out figures.

    data: examples to train on and to hold out. tasks: what sft asks about each. The same call continues an
    interrupted run, under `out`. Raises RuntimeError if the core changed in a single bit.
    """
    before = bits(core)
    settings = config.fit_config(out, seed)
    task: BestRQTask | CTCTask | SFTTask
    if stage == "best-rq":
        task = BestRQTask(adapter, *data, config, seed)
    elif stage == "ctc":
        task = CTCTask(tokenizer, adapter, *data, config, seed)
    elif stage == "sft":
        items, held_out = ([item for e in part for item in asked(e, tasks)] for part in data)
        task = SFTTask(core, tokenizer, adapter, items, held_out, config, seed)
    else:
        raise ValueError(f"unknown stage '{stage}'; known: {', '.join(STAGES)}")
    figures = fit(task, settings)
    if bits(core) != before:
        raise RuntimeError("training changed the frozen core")
    return figures


def bits(core: Llama) -> str:
    """SHA-256 of all weights in fp32: differs where a single bit does (`core_hash` rounds to bf16)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(core.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


def starting_adapter(where: str, core: Llama, size: str, seed: int) -> SpeechAdapter:
    """A fresh adapter of a size in `config.PRESETS` (where: "new", or "whisper:NAME"), or a saved one.

    Raises `CheckpointError` where it does not fit the core.
    """
    if where != "new" and not where.startswith(PREFIX):
        return load(where, core)
    torch.manual_seed(seed)
    return create("conformer" if where == "new" else where, core, **PRESETS[size])
