"""From a stage's name to a trained adapter."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from core_llm import processes
from core_llm.errors import UserError
from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer
from core_llm.train.fit import FitConfig, fit
from vision_adapter.adapter import VisionAdapter, load, load_on_other_core
from vision_adapter.config import VisionConfig
from vision_adapter.examples import Example
from vision_adapter.stages.answers import AnswerTask, at_resolution
from vision_adapter.stages.average import BestCheckpoints, config_of
from vision_adapter.stages.contrastive import ContrastiveTask
from vision_adapter.stages.dpo import DPOTask
from vision_adapter.stages.presets import STAGES, StageConfig

if TYPE_CHECKING:
    from vision_adapter.adapter import ImageAdapter


def run_stage(
    stage: str,
    core: Llama,
    tokenizer: Tokenizer,
    adapter: "ImageAdapter",
    data: tuple[Sequence[Example], Sequence[Example]],
    out: Path,
    config: StageConfig,
    seed: int = 0,
) -> tuple["ImageAdapter", dict[str, float]]:
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
    task = task_type(stage, core, tokenizer, adapter, *data, config, seed)
    if not config.average_top:
        return adapter, fit(task, settings)
    return adapter, _fit_and_average(task, settings, config.average_top)


def _fit_and_average(task: AnswerTask, settings: FitConfig, keep: int) -> dict[str, float]:
    """Train, then put the mean of the `keep` best checkpoints in the adapter's place.

    Returns the figures of the mean, and beside them those of the last step and of the single best.
    """
    if len(task.held_out) < 2:
        raise UserError("--average-top chooses by held-out examples, and these data hold out none")
    if set(task.modules()) != {"adapter"}:
        raise UserError("--average-top averages the adapter alone: leave core-lora out of --trainable")
    folder = settings.out / "best"
    best = BestCheckpoints(folder, keep, task.adapter, config_of(task.adapter, task.assistant.core))
    every = max(1, settings.steps // max(10, 2 * keep))
    last = fit(task, replace(settings, eval_every=every), best.offer)
    with processes.writer_first():  # it has written them
        scores = best.scores()
        best.load_average()
    task.adapter.eval()
    with torch.no_grad():
        mean = task.evaluate()
    return {
        **mean,
        "averaged_checkpoints": float(len(scores)),
        "held_out_loss_of_best": min(scores.values()),
        "held_out_loss_of_last": last["held_out_loss"],
    }


def starting_adapter(where: str, core: Llama, swap_core: bool, seed: int, image_size: int) -> "ImageAdapter":
    """A fresh adapter (where: "new"), or a saved one, on the core's device.

    swap_core: put an adapter of another core of the same shape on this one, as post-training does with the
    instruct core (arXiv 2407.21783, section 7.5). Raises `CheckpointError` where it does not fit.
    """
    if where == "new":
        torch.manual_seed(seed)
        config = VisionConfig()
        fresh = VisionAdapter(replace(config, image_size=image_size or config.image_size), core.config)
        return fresh.to(core.embed_tokens.weight.device)
    if not swap_core:
        return load(where, core)
    return load_on_other_core(where, core).to(core.embed_tokens.weight.device)
