"""`speech-adapter stage`: from names of data and folders to a saved adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from core_llm import cli_tools
from core_llm.checkpoint import load_core
from speech_adapter.augment import perturbation
from speech_adapter.examples import TASKS, train_and_held_out
from speech_adapter.stages.presets import preset
from speech_adapter.stages.run import run_stage, starting_adapter


def train_stage(
    name: str,
    data: str,
    out: Path,
    core: str,
    adapter: str,
    preset_name: str,
    data_root: Path | None,
    given: Mapping[str, Any],
    seed: int,
    tasks: Sequence[str],
    augment: Sequence[str],
) -> None:
    """Train one stage, save the adapter, print the figures. `given` replaces settings of the preset.

    Raises `UserError` where settings, data and stage do not fit together.
    """
    config = replace(preset(preset_name, name), **given)
    if augment:
        config = replace(config, perturbation=perturbation(augment))
    examples, held_out = train_and_held_out(data, data_root)
    model, tokenizer = load_core(core)
    trained = starting_adapter(adapter, model, config.size, seed)
    print(f"{name}: {len(examples)} recordings, {len(held_out)} held out", flush=True)
    chosen = tuple(tasks) or TASKS
    figures = run_stage(
        name, model, tokenizer, trained, (examples, held_out), out / "state", config, seed, chosen
    )
    trained.save(out, model)
    cli_tools.print_saved(out, figures)
