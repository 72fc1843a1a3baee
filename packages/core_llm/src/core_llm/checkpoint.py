"""Checkpoints on disk: a core in the Hugging Face layout, an adapter with the hash of its core.

Everything is safetensors; writes go to a temporary folder first, so a reader never sees half of one.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core_llm.config import LlamaConfig, RopeScaling
from core_llm.errors import CheckpointError
from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
NANO = Path(__file__).parent / "nano"


def core_hash(model: nn.Module) -> str:
    """SHA-256 over names, shapes and bf16 bytes of all weights: a fp32 and a bf16 copy agree."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(
            tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def load_core(where: str | Path = "nano") -> tuple[Llama, Tokenizer]:
    """The bundled nano core ("nano") or the one in a folder: fp32, frozen, in evaluation mode.

    Raises `CheckpointError` for a missing, truncated or mismatched file.
    """
    folder = _folder(where, NANO)
    config = config_from_hf(read_config(folder), folder / "config.json")
    tokenizer = Tokenizer.load(folder)
    with torch.device("meta"):
        model = Llama(config)
    model = model.to_empty(device="cpu")
    tensors = {name.removeprefix("model."): t for name, t in read_tensors(folder / WEIGHTS).items()}
    if config.tied_embeddings:
        tensors["lm_head.weight"] = tensors.get("embed_tokens.weight", torch.empty(0))
    load_strict(model, tensors, folder / WEIGHTS)
    # to_empty left the buffer that no checkpoint holds without a value.
    model.frequencies = Llama(_one_layer(config)).frequencies
    return model.eval().requires_grad_(False), tokenizer


def _one_layer(config: LlamaConfig) -> LlamaConfig:
    """The same rotary settings at the least cost."""
    values = {**config.to_dict(), "n_layers": 0, "vocab_size": 1}
    return LlamaConfig.from_dict(values)


def save_core(folder: Path, model: Llama, tokenizer: Tokenizer, card: str | None = None) -> None:
    """Write config.json, bf16 model.safetensors and tokenizer.json, readable by transformers too."""
    tensors = {
        name if name.startswith("lm_head") else f"model.{name}": tensor
        for name, tensor in model.state_dict().items()
        if not (model.config.tied_embeddings and name == "lm_head.weight")
    }
    config = config_to_hf(model.config, tokenizer)
    _write_folder(folder, config, tensors, card, tokenizer)


def save_adapter(
    folder: Path,
    kind: str,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    core: Llama,
    card: str | None = None,
) -> None:
    """Write an adapter's weights in bf16 with the hash of the core that they belong to."""
    values = {"kind": kind, "core_hash": core_hash(core), "adapter": config}
    _write_folder(folder, values, tensors, card, None)


def load_adapter(folder: str | Path, kind: str, core: Llama) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and fp32 tensors of an adapter; raises `CheckpointError` unless it fits this core."""
    path = Path(folder)
    config = read_config(path)
    if config.get("kind") != kind:
        raise CheckpointError(f"{path}: holds a {config.get('kind') or 'core'}, not a {kind}")
    if config.get("core_hash") != core_hash(core):
        raise CheckpointError(
            f"{path}: this {kind} was trained on another core (hash {str(config.get('core_hash'))[:12]}, "
            f"here {core_hash(core)[:12]}); train it again on this one"
        )
    return dict(config["adapter"]), read_tensors(path / WEIGHTS)


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
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no checkpoint here (config.json is missing)") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not readable ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a configuration")
    return values


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


def config_to_hf(config: LlamaConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The keys that transformers' LlamaConfig reads."""
    values: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(tokenizer.stop_ids),
        "dtype": "bfloat16",
    }
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        values["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return values


def config_from_hf(values: Mapping[str, Any], path: Path) -> LlamaConfig:
    """The inverse of `config_to_hf`; raises `CheckpointError` for another model type or RoPE scaling."""
    if values.get("model_type") != "llama":
        raise CheckpointError(f"{path}: model_type is {values.get('model_type')!r}, expected 'llama'")
    scaling = values.get("rope_scaling")
    if scaling is not None and scaling.get("rope_type") != "llama3":
        raise CheckpointError(f"{path}: unknown RoPE scaling {scaling.get('rope_type')!r}; known: llama3")
    try:
        return LlamaConfig(
            dim=values["hidden_size"],
            n_layers=values["num_hidden_layers"],
            n_heads=values["num_attention_heads"],
            n_kv_heads=values["num_key_value_heads"],
            ffn_dim=values["intermediate_size"],
            vocab_size=values["vocab_size"],
            max_positions=values["max_position_embeddings"],
            rope_theta=values["rope_theta"],
            rope_scaling=None
            if scaling is None
            else RopeScaling(
                scaling["factor"],
                scaling["low_freq_factor"],
                scaling["high_freq_factor"],
                scaling["original_max_position_embeddings"],
            ),
            norm_eps=values["rms_norm_eps"],
            tied_embeddings=values["tie_word_embeddings"],
        )
    except KeyError as error:
        raise CheckpointError(f"{path}: {error.args[0]} is missing") from error


def _folder(where: str | Path, bundled: Path) -> Path:
    if str(where) == "nano":
        return bundled
    folder = Path(where)
    if not folder.is_dir():
        raise CheckpointError(f"unknown model '{where}'; known: nano, or a folder with a checkpoint")
    return folder


def _write_folder(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    card: str | None,
    tokenizer: Tokenizer | None,
) -> None:
    """Write all files into a neighbour folder, then move each into place, weights and config last."""
    from safetensors.torch import save_file

    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        stored = {name: t.detach().to("cpu", torch.bfloat16).contiguous() for name, t in tensors.items()}
        save_file(stored, temporary / WEIGHTS, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save(temporary / "tokenizer.json")
        if card is not None:
            (temporary / "README.md").write_text(card)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("README.md", "tokenizer.json", WEIGHTS, "config.json"):
            if (temporary / name).exists():
                (temporary / name).chmod(0o644)  # safetensors creates its files readable by the owner alone
                os.replace(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
