"""The command `speech-adapter stage`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro


def stage(
    name: Annotated[str, tyro.conf.Positional],
    data: Annotated[str, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    core: str = "nano",
    adapter: str = "new",
    preset: str = "nano",
    data_root: Path | None = None,
    steps: int = 0,
    batch: int = 0,
    micro_batch: int = 0,
    lr: float = 0.0,
    seed: int = 0,
    tasks: tuple[str, ...] = (),
    units: str = "",
    kl_weight: float = -1.0,
    augment: tuple[str, ...] = (),
) -> None:
    """Train one stage of the paper's recipe; the same command continues an interrupted run.

    best-rq: the encoder alone, on sound without text. ctc: the encoder spells, or the adapter says tokens.
    sft: encoder and adapter learn recognition, translation and spoken questions through the frozen core.

    Args:
        name: best-rq, ctc or sft.
        data: fsdd, librispeech, common_voice:de, fleurs:de_de, covost2:en_de, a folder with metadata.jsonl
            (such as `synthesize` writes), a hub id; several with commas.
        out: Folder for the adapter, metrics and the resumable state.
        core: nano, or a folder with a core's checkpoint.
        adapter: What to start from: new, whisper:NAME (openai-whisper's encoder, or a .pt file), nano, or a
            folder of an earlier stage.
        preset: nano (a laptop's) or paper.
        data_root: Folder with local copies of the public datasets; the hub where absent.
        steps: Optimizer steps (0: the preset's).
        batch: Clips per step (0: the preset's).
        micro_batch: Clips per backward pass; sums are fp32 (0: the preset's).
        lr: Peak learning rate (0: the preset's).
        seed: Seed of weights, data order and augmentation.
        tasks: sft: recognition, translation, question (none: all that the data hold).
        units: ctc: characters or tokens (empty: the preset's).
        kl_weight: sft: part of the loss that is the distance from the core's reading of the text, 0 to 1
            (-1: the preset's).
        augment: Any of spec, speed, noise, in place of the preset's.
    """
    from speech_adapter.stages.command import train_stage

    given = {"steps": steps, "batch": batch, "micro_batch": micro_batch, "lr": lr, "units": units}
    changed = {key: value for key, value in given.items() if value}
    if kl_weight != -1.0:
        changed["kl_weight"] = kl_weight
    train_stage(name, data, out, core, adapter, preset, data_root, changed, seed, tasks, augment)
