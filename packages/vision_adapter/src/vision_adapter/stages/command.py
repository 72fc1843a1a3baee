"""`vision-adapter stage`: from names of data and folders to a saved adapter."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from core_llm import cli_tools
from core_llm.checkpoint import load_core
from core_llm.data.sources import SOURCES
from core_llm.errors import UserError
from vision_adapter.adapter import VisionAdapter
from vision_adapter.examples import SCENES, train_and_held_out
from vision_adapter.stages.presets import StageConfig, preset
from vision_adapter.stages.run import run_stage, starting_adapter


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
    swap_core: bool,
    device: torch.device,
) -> None:
    """Train one stage, save the adapter with its card, print the figures. `given` replaces preset settings.

    Raises `UserError` where settings, data and stage do not fit together.
    """
    config = replace(preset(preset_name, name), **given)
    if config.average_top and name != "sft":
        raise UserError(f"--average-top belongs to sft, not to {name}")
    examples, held_out = train_and_held_out(data, data_root)
    model, tokenizer = load_core(core)
    model.to(device)
    start = starting_adapter(adapter, model, swap_core, seed, config.image_size)
    if not ("image_size" in given or isinstance(start, VisionAdapter)):
        config = replace(config, image_size=0)  # the presets' sizes are those of the bundled adapter's kind
    print(f"{name}: {len(examples)} examples, {len(held_out)} held out", flush=True)
    trained, figures = run_stage(
        name, model, tokenizer, start, (examples, held_out), out / "state", config, seed
    )
    trained.save(out, model, card(name, data, preset_name, seed, config, figures))
    cli_tools.print_saved(out, figures)


def card(
    stage: str, data: str, preset: str, seed: int, config: StageConfig, figures: Mapping[str, float]
) -> str:
    """The model card that is saved beside the weights of a stage."""
    shown = data if data in (SCENES, *SOURCES) or not Path(data).exists() else "a folder of own data"
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in figures.items())
    chosen = (
        f"\nThe weights are the mean, taken in fp32, of the {config.average_top} checkpoints with the lowest "
        "held-out loss. They were chosen by the held-out examples that the table is about, which flatters "
        "them.\n"
        if config.average_top
        else ""
    )
    settings = f"{config.steps} steps of {config.batch} examples, learning rate {config.lr:g}, seed {seed}"
    return f"""# Vision adapter after the stage {stage}

For the frozen core named by the hash in `config.json`.

- **Data:** {shown}.
- **Settings:** preset {preset}, {settings}.
{chosen}
| held out | value |
|---|---|
{rows}
"""
