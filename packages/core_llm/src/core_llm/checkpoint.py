"""Checkpoints: cores in the Hugging Face or the original layout, adapters with the hash of their core.

Nothing is unpickled but tensors. Writes go to a temporary folder first, so a reader never sees half of one.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core_llm.errors import CheckpointError
from core_llm.files import CONFIG, PARAMS, WEIGHTS, parse_size, read_json, replacing, write_json
from core_llm.hf_layout import HFWeights, config_from_hf, config_to_hf, save_tensors, write_hf
from core_llm.hub import find_model
from core_llm.model import Llama
from core_llm.original_layout import OriginalWeights
from core_llm.stored import DType, StoredWeights, skeleton
from core_llm.tokenizer import Tokenizer

__all__ = [
    "config_from_hf",
    "config_to_hf",
    "core_hash",
    "load_adapter",
    "load_core",
    "load_strict",
    "open_weights",
    "read_adapter_config",
    "read_config",
    "read_core",
    "read_tensors",
    "save_adapter",
    "save_core",
]

NANO = Path(__file__).parent / "nano"


def core_hash(model: nn.Module) -> str:
    """SHA-256 over names, shapes and bf16 bytes of all weights: a fp32 and a bf16 copy agree."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.bfloat16).flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_core(
    where: str | Path = "nano",
    dtype: DType = torch.float32,
    *,
    mapped: bool = True,
    rope_factor: float | None = None,
) -> tuple[Llama, Tokenizer]:
    """The bundled nano core ("nano"), one in a folder, or one by its hub id: frozen, in evaluation mode.

    `dtype` "auto" keeps the stored one. Weights that need no conversion are not copied: their memory is
    the file's, shared with every process that reads it (see `StoredWeights.read`); `mapped=False` copies
    them. `rope_factor` is for the original layout, which leaves it out (see `config_from_params`).
    A quantised core stays quantised; `dtype` is then that of its other weights.
    Raises `CheckpointError` for a missing, truncated or mismatched file.
    """
    folder = find_model(where, NANO)
    if (folder / CONFIG).is_file() and "quantization" in read_config(folder):
        from core_llm.quantize import load_quantized  # which builds on this module

        return load_quantized(folder, dtype)
    weights = open_weights(folder, rope_factor)
    tokenizer = Tokenizer.load(weights.folder)
    return read_core(weights, dtype, mapped), tokenizer


def open_weights(folder: Path, rope_factor: float | None = None) -> StoredWeights:
    """The checkpoint in a folder, in whichever layout; raises `CheckpointError` where there is none.

    A hub repository may hold both: the original layout in its sub-folder is read only when there are
    no safetensors.
    """
    original = folder / "original"
    if (folder / CONFIG).is_file() and (
        any(folder.glob("*.safetensors")) or not (original / PARAMS).is_file()
    ):
        if rope_factor is not None:
            raise CheckpointError(f"{folder / CONFIG}: holds the RoPE factor itself; change it there")
        return HFWeights(folder)
    for candidate in (folder, original):
        if (candidate / PARAMS).is_file():
            return OriginalWeights(candidate, rope_factor)
    raise CheckpointError(
        f"{folder}: no checkpoint here (config.json is missing, and so is params.json of the original layout)"
    )


def read_core(weights: StoredWeights, dtype: DType = "auto", mapped: bool = True) -> Llama:
    """A core with these weights, read one by one; at no time is there a second copy of them in memory."""
    dtype = weights.resolve(dtype)
    model = skeleton(weights.config)
    for name, _ in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        tensor = weights.read(name, dtype, mapped)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
    if weights.config.tied_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval()


def save_core(
    folder: Path,
    model: Llama,
    tokenizer: Tokenizer,
    card: str | None = None,
    *,
    dtype: DType = torch.bfloat16,
    max_shard_size: str = "5GB",
) -> None:
    """Write config.json, weights and tokenizer.json in the Hugging Face layout, for transformers too.

    `dtype` "auto" keeps the model's own. Weights larger than `max_shard_size` become several files and an
    index; the memory needed beside the model is one such file.
    """
    parameters = dict(model.named_parameters())
    stored = model.embed_tokens.weight.dtype if dtype == "auto" else dtype
    sizes = {name: parameter.numel() * stored.itemsize for name, parameter in parameters.items()}

    def read(name: str) -> Tensor:
        return parameters[name].detach().to("cpu", stored)

    limit = parse_size(max_shard_size)
    with replacing(Path(folder)) as temporary:
        write_hf(temporary, config_to_hf(model.config, tokenizer, stored), sizes, read, limit)
        tokenizer.save(temporary / "tokenizer.json")
        _write_card(temporary, card)


def save_adapter(
    folder: Path,
    kind: str,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    core: Llama,
    card: str | None = None,
) -> None:
    """Write an adapter's weights in bf16 with the hash of the core that they belong to."""
    stored = {name: t.detach().to("cpu", torch.bfloat16).contiguous() for name, t in tensors.items()}
    with replacing(Path(folder)) as temporary:
        save_tensors(temporary / WEIGHTS, stored)
        _write_card(temporary, card)
        write_json(temporary / CONFIG, {"kind": kind, "core_hash": core_hash(core), "adapter": config})


def _write_card(folder: Path, card: str | None) -> None:
    if card is not None:
        (folder / "README.md").write_text(card)


def load_adapter(folder: str | Path, kind: str, core: Llama) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and fp32 tensors of an adapter; raises `CheckpointError` unless it fits this core."""
    return read_adapter_config(folder, kind, core), read_tensors(Path(folder) / WEIGHTS)


def read_adapter_config(folder: str | Path, kind: str, core: Llama) -> dict[str, Any]:
    """Configuration of an adapter; raises `CheckpointError` unless it is of this kind and fits this core."""
    path = Path(folder)
    config = read_config(path)
    if config.get("kind") != kind:
        raise CheckpointError(f"{path}: holds a {config.get('kind') or 'core'}, not a {kind}")
    if config.get("core_hash") != core_hash(core):
        raise CheckpointError(
            f"{path}: this {kind} was trained on another core (hash {str(config.get('core_hash'))[:12]}, "
            f"here {core_hash(core)[:12]}); train it again on this one"
        )
    if not isinstance(config.get("adapter"), dict):
        raise CheckpointError(f"{path / CONFIG}: says nothing of the {kind}'s shape ('adapter' is missing)")
    return dict(config["adapter"])


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], where: Path | str) -> None:
    """Fill a module; every missing, unknown or misshapen key raises `CheckpointError` that names it."""
    wanted = module.state_dict()
    missing, unknown = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or unknown:
        parts = [
            f"{label}: {', '.join(keys[:5])}"
            for label, keys in (("missing", missing), ("unknown", unknown))
            if keys
        ]
        raise CheckpointError(f"{where}: keys do not fit the model ({'; '.join(parts)})")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, "
                f"the model needs {tuple(wanted[name].shape)}"
            )
    module.load_state_dict(dict(tensors))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder."""
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: no checkpoint here (config.json is missing)")
    return read_json(folder / CONFIG)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, in fp32."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from error
