"""From a stage's name to a trained adapter."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from core_llm.checkpoint import load_strict, read_config, read_tensors
from core_llm.errors import CheckpointError
from core_llm.files import WEIGHTS
from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer
from core_llm.train.fit import fit
from vision_adapter.adapter import KIND, NANO, VisionAdapter, load
from vision_adapter.config import VisionConfig
from vision_adapter.examples import Example
from vision_adapter.stages.answers import AnswerTask, at_resolution
from vision_adapter.stages.contrastive import ContrastiveTask
from vision_adapter.stages.dpo import DPOTask
from vision_adapter.stages.presets import STAGES, StageConfig


def run_stage(
    stage: str,
    core: Llama,
    tokenizer: Tokenizer,
    adapter: VisionAdapter,
    data: tuple[Sequence[Example], Sequence[Example]],
    out: Path,
    config: StageConfig,
    seed: int = 0,
) -> tuple[VisionAdapter, dict[str, float]]:
    """Train one stage; returns the adapter, at the stage's resolution, and the held-out figures.

    data: examples to train on and to hold out. Every stage has an optimizer of its own, so annealing warms
    up anew. The same call continues an interrupted run, under `out`.
    """
    if stage not in STAGES:
        raise ValueError(f"unknown stage '{stage}'; known: {', '.join(STAGES)}")
    adapter = at_resolution(adapter, core.config, config.image_size)
    settings = config.fit_config(out, seed)
    if stage == "contrastive":
        return adapter, fit(ContrastiveTask(tokenizer, adapter, *data, config, seed), settings)
    task_type = DPOTask if stage == "dpo" else AnswerTask
    return adapter, fit(task_type(stage, core, tokenizer, adapter, *data, config, seed), settings)


def starting_adapter(where: str, core: Llama, swap_core: bool, seed: int, image_size: int) -> VisionAdapter:
    """A fresh adapter (where: "new"), or a saved one.

    swap_core: put an adapter of another core of the same shape on this one, as post-training does with the
    instruct core (arXiv 2407.21783, section 7.5). Raises `CheckpointError` where it does not fit.
    """
    if where == "new":
        torch.manual_seed(seed)
        config = VisionConfig()
        return VisionAdapter(replace(config, image_size=image_size or config.image_size), core.config)
    if not swap_core:
        return load(where, core)
    directory = NANO if where == "nano" else Path(where)
    values = read_config(directory)
    if values.get("kind") != KIND:
        raise CheckpointError(f"{directory}: holds a {values.get('kind') or 'core'}, not a {KIND}")
    adapter = VisionAdapter(VisionConfig.from_dict(values["adapter"]), core.config)
    load_strict(adapter, read_tensors(directory / WEIGHTS), directory)
    return adapter
