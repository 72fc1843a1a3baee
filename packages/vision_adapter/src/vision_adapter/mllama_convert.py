"""Fused Llama 3.2-Vision checkpoints from one layout to another, split into core and adapter, and joined."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from core_llm.checkpoint import load_core, read_core, save_core
from core_llm.convert import carry_over, check_target, find_tokenizer
from core_llm.errors import CheckpointError, UserError
from core_llm.files import CONFIG, parse_size, read_json
from core_llm.hub import find_model
from core_llm.stored import DType
from core_llm.tokenizer import Tokenizer
from vision_adapter.mllama_adapter import KIND
from vision_adapter.mllama_checkpoint import (
    FusedHF,
    FusedOriginal,
    Read,
    load,
    open_fused,
    read_adapter,
    reader,
    write_fused,
)
from vision_adapter.mllama_keys import Entry, entries

Target = Literal["hf", "original", "adapter"]
CORE, ADAPTER = "core", "vision_adapter"  # of a model's folder, as `evals` and the demo read it


def convert_checkpoint(
    source: str | Path,
    target: Path,
    layout: Target = "hf",
    dtype: DType = "auto",
    max_shard_size: str = "5GB",
    n_shards: int = 1,
    rope_factor: float | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Write the vision checkpoint `source` to the folder `target`, which appears when all of it is there.

    source: a folder or hub id of a fused checkpoint in either layout, or a folder with core/ and
    vision_adapter/, as the layout "adapter" writes it: the core's own checkpoint, and an adapter that names
    the core by its hash. dtype "auto" keeps the stored one; an adapter is always stored in bf16.
    `max_shard_size` applies to "hf" and "adapter", `n_shards` to "original". Memory: what goes into one file,
    and for the layout "adapter" what is not in the core's own order on disk (`StoredWeights.read`).
    Raises `CheckpointError` for a bad source and `UserError` for a target that is not empty.
    """
    if str(source) == "nano":
        raise UserError("nano has no fused checkpoint; give a folder or hub id of Llama 3.2-Vision")
    folder = find_model(source, Path("nano"))
    check_target(folder, target, overwrite)
    parse_size(max_shard_size)
    if (folder / CORE / CONFIG).is_file() and (folder / ADAPTER / CONFIG).is_file():
        if layout == "adapter":
            raise UserError(f"{folder}: is split into core and adapter already; choose hf or original")
        _join(folder, target, layout, dtype, max_shard_size, n_shards, progress)
        return
    weights = open_fused(folder, rope_factor)
    stored = weights.resolve(dtype)
    if layout == "adapter":
        _split(weights, target, stored, max_shard_size)
        return
    tokenizer = find_tokenizer(weights.folder)
    copies = n_shards if layout == "original" else 1
    table = entries(weights.vision, weights.config)
    with _counted(
        table, stored, copies, progress, lambda name: weights.read(name, stored, mapped=copies == 1)
    ) as read:
        write_fused(
            target,
            weights.vision,
            weights.config,
            read,
            layout,
            stored,
            max_shard_size,
            n_shards,
            lambda temporary: carry_over(weights.folder, temporary, layout, tokenizer),
        )


def _join(
    folder: Path,
    target: Path,
    layout: Literal["hf", "original"],
    dtype: DType,
    max_shard_size: str,
    n_shards: int,
    progress: bool,
) -> None:
    kind = read_json(folder / ADAPTER / CONFIG).get("kind")
    if kind != KIND:
        raise CheckpointError(
            f"{folder / ADAPTER}: holds a {kind or 'core'}; only a {KIND} adapter can be written as one "
            "checkpoint with its core"
        )
    core, tokenizer = load_core(folder / CORE, dtype)
    adapter = load(folder / ADAPTER, core)
    if adapter.lora is not None:
        raise UserError(f"{folder / ADAPTER}: has updates of its core; merge them into the core first")
    stored = core.embed_tokens.weight.dtype
    copies = n_shards if layout == "original" else 1
    # A tied head is a tensor of its own in a fused checkpoint.
    table = entries(adapter.config, replace(core.config, tied_embeddings=False))
    with _counted(table, stored, copies, progress, reader(core, adapter, stored)) as read:
        write_fused(
            target,
            adapter.config,
            core.config,
            read,
            layout,
            stored,
            max_shard_size,
            n_shards,
            lambda temporary: carry_over(folder / CORE, temporary, layout, tokenizer),
        )


def _split(weights: FusedHF | FusedOriginal, target: Path, dtype: torch.dtype, max_shard_size: str) -> None:
    tokenizer = Tokenizer.load(weights.folder)
    core = read_core(weights, dtype)
    adapter = read_adapter(weights, dtype)
    with _parts(target) as temporary:
        save_core(temporary / CORE, core, tokenizer, dtype=dtype, max_shard_size=max_shard_size)
        carry_over(weights.folder, temporary / CORE, "hf", tokenizer)
        adapter.save(temporary / ADAPTER, core)


@contextmanager
def _parts(target: Path) -> Iterator[Path]:
    """A temporary neighbour whose core and adapter become the target's; other files there stay."""
    target = target.absolute()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if not target.exists():
            os.replace(temporary, target)
            return
        # The adapter first goes and comes last: between the two there is none, never one of another core.
        for name in (ADAPTER, CORE):
            if (target / name).exists():
                os.replace(target / name, temporary / f"old {name}")
        for name in (CORE, ADAPTER):
            os.replace(temporary / name, target / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _counted(
    table: dict[str, Entry], dtype: torch.dtype, n_reads: int, progress: bool, read: Read
) -> Iterator[Callable[[str], Tensor]]:
    """The reader, with a progress bar in bytes; each tensor is read `n_reads` times."""
    from tqdm import tqdm

    sizes = {name: torch.Size(entry.shape).numel() * dtype.itemsize for name, entry in table.items()}
    total = sum(sizes.values()) * n_reads
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="convert", disable=None if progress else True
    ) as bar:

        def counting(name: str) -> Tensor:
            tensor = read(name)
            bar.update(sizes[name])
            return tensor

        yield counting
