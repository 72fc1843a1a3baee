"""Commands of `vision-adapter` that make and rewrite models rather than train or ask them."""

from pathlib import Path
from typing import Annotated, Literal

import tyro


def convert(
    source: Annotated[str, tyro.conf.Positional],
    out: Path,
    layout: Literal["hf", "original", "adapter"] = "hf",
    dtype: Literal["keep", "float32", "bfloat16"] = "keep",
    max_shard_size: str = "5GB",
    shards: int = 1,
    rope_factor: float | None = None,
    overwrite: bool = False,
) -> None:
    """Rewrite a Llama 3.2-Vision checkpoint in another layout, or split it into core and adapter.

    Args:
        source: Folder in the Hugging Face or the original layout, a hub id, or a folder that was split.
        out: Folder to write; it appears when all of it is there.
        layout: hf (config.json, safetensors), original (params.json, consolidated.NN.pth), or adapter
            (core/ for any command that takes a core, vision_adapter/ for this one's --adapter).
        dtype: Of the written weights; keep leaves every bit as it is. A split adapter is stored in bfloat16.
        max_shard_size: Largest safetensors file, such as 5GB or 500MB.
        shards: Number of consolidated files, for model parallelism in the original code.
        rope_factor: RoPE scaling of an original checkpoint whose params.json does not say it; by default that
            of the preset with the same shape.
        overwrite: Replace the checkpoint in a target that is not empty.
    """
    import torch

    from core_llm.stored import DType
    from vision_adapter.mllama_convert import convert_checkpoint

    dtypes: dict[str, DType] = {"keep": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16}
    convert_checkpoint(source, out, layout, dtypes[dtype], max_shard_size, shards, rope_factor, overwrite)
    print(f"{source} written to {out} ({layout} layout)")


def create(
    out: Annotated[Path, tyro.conf.Positional],
    encoder: str,
    core: str = "nano",
    settings: str = "",
    cross_layers: tuple[int, ...] = (),
    cross_ffn_dim: int = 0,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Join an image encoder to a core as a new adapter, ready for `stage ... --adapter OUT`.

    Args:
        out: Folder for the adapter.
        encoder: open_clip:MODEL[:TAG] (with the tag's weights), mllama, nano, or llama-3.2-vision.
        core: nano, or a folder with a core's checkpoint.
        settings: Of a mllama, nano or llama-3.2-vision encoder, as JSON such as '{"dim": 64, "n_layers": 4}'.
        cross_layers: Core blocks that a cross-attention block precedes; by default every fourth if deep.
        cross_ffn_dim: Width of their feed-forward (0: the core's).
        seed: Seed of the random weights.
        overwrite: Replace the adapter that is there.
    """
    from core_llm.checkpoint import load_core
    from core_llm.errors import UserError
    from vision_adapter.create import create as created

    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UserError(f"{out}: is not empty; give another folder, or --overwrite to replace what is there")
    model, _ = load_core(core)
    adapter = created(encoder, model.config, settings, cross_layers, cross_ffn_dim, seed)
    adapter.save(out, model)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in adapter.named_children()}
    print(f"adapter saved in {out}: " + ", ".join(f"{name} {n:,}" for name, n in parts.items()))
