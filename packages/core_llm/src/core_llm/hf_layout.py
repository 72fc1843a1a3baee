"""Hugging Face's layout: config.json and safetensors, in one file or in shards under an index."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from core_llm.config import LlamaConfig, RopeScaling
from core_llm.errors import CheckpointError
from core_llm.files import CONFIG, INDEX, WEIGHTS, read_json, write_json
from core_llm.keys import from_hf, is_derived, to_hf
from core_llm.stored import StoredWeights, check_keys, expected_shapes

if TYPE_CHECKING:
    from core_llm.tokenizer import Tokenizer

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}

# Keys that change the model, with the values that leave it a Llama 3.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", "swish"),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
}
_ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def config_to_hf(
    config: LlamaConfig, tokenizer: "Tokenizer | None" = None, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """The keys that transformers' LlamaConfig reads, in the spelling that version 4 and 5 both know.

    Without a tokenizer the ids follow from Llama 3's rule that the 256 special tokens come last.
    """
    words = config.vocab_size - 256
    stored = str(dtype).removeprefix("torch.")
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
        "bos_token_id": tokenizer.bos_id if tokenizer else words,
        "eos_token_id": list(tokenizer.stop_ids) if tokenizer else [words + 1, words + 8, words + 9],
        "dtype": stored,
        "torch_dtype": stored,  # the name of the same key before version 5
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
    """The inverse of `config_to_hf`; reads transformers 4's and 5's spelling of the rotary settings.

    Raises `CheckpointError` that names the file and the key: another model type, an unknown kind of
    RoPE, a bias, another activation, a missing or malformed value.
    """
    if values.get("model_type") != "llama":
        raise CheckpointError(f"{path}: model_type is {values.get('model_type')!r}, expected 'llama'")
    for key, allowed in _NEUTRAL.items():
        if key in values and values[key] not in allowed:
            raise CheckpointError(
                f"{path}: {key} is {_short(values[key])}; this core has only {allowed[0]!r}"
            )
    tied = values.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise CheckpointError(f"{path}: tie_word_embeddings is {_short(tied)}, not true or false")
    rope = _rope(values, path)
    heads = _number(values, "num_attention_heads", path, int)
    try:
        config = LlamaConfig(
            dim=_number(values, "hidden_size", path, int),
            n_layers=_number(values, "num_hidden_layers", path, int),
            n_heads=heads,
            n_kv_heads=_number({"num_key_value_heads": heads, **values}, "num_key_value_heads", path, int),
            ffn_dim=_number(values, "intermediate_size", path, int),
            vocab_size=_number(values, "vocab_size", path, int),
            max_positions=_number(values, "max_position_embeddings", path, int),
            rope_theta=_number(rope, "rope_theta", path),
            rope_scaling=_scaling(rope, path),
            norm_eps=_number(values, "rms_norm_eps", path),
            tied_embeddings=tied,
        )
    except CheckpointError as error:
        message = str(error)
        raise CheckpointError(message if str(path) in message else f"{path}: {message}") from None
    if values.get("head_dim") not in (None, config.head_dim):
        raise CheckpointError(
            f"{path}: head_dim is {_short(values['head_dim'])}; this core has only hidden_size / "
            f"num_attention_heads = {config.head_dim}"
        )
    return config


def _rope(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """One dictionary out of `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(values.get(key), dict | None):
            raise CheckpointError(f"{path}: {key} is {_short(values[key])}, not an object")
    new, old = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
    if new and old and any(new.get(key, old[key]) != old[key] for key in old):
        raise CheckpointError(f"{path}: rope_parameters and rope_scaling contradict each other; keep one")
    merged = {"rope_theta": values.get("rope_theta"), **old, **new}
    return {key: value for key, value in merged.items() if value is not None}


def _scaling(rope: Mapping[str, Any], path: Path) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise CheckpointError(
            f"{path}: unknown RoPE scaling {_short(kind)} (rope_type); known: default, llama3"
        )
    factor, low, high, original = (_number(rope, key, path) for key in _ROPE_KEYS)
    if low >= high:
        raise CheckpointError(f"{path}: low_freq_factor {low} is not below high_freq_factor {high}")
    return RopeScaling(factor, low, high, int(original))


def _number(values: Mapping[str, Any], key: str, path: Path, kind: type = float) -> Any:
    value = values.get(key)
    if value is None:
        raise CheckpointError(f"{path}: {key} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0 or value != kind(value):
        raise CheckpointError(f"{path}: {key} is {_short(value)}, not a positive {kind.__name__}")
    return kind(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class HFWeights(StoredWeights):
    """The weights in a folder of this layout, checked against config.json when opened, read one by one.

    Raises `CheckpointError` that names the file and the key: a file that is missing or cut short, a key
    that is missing, unknown or in two shards, a shape or dtype that does not fit.
    """

    def __init__(self, folder: Path) -> None:
        self.raw = read_json(folder / CONFIG)
        super().__init__(folder, config_from_hf(self.raw, folder / CONFIG))
        self._handles: dict[tuple[Path, str], Any] = {}
        self._files: dict[str, Path] = {}

    def check(self) -> None:
        files, index = shard_files(self.folder)
        shapes = expected_shapes(self.config)
        dtypes: dict[str, torch.dtype] = {}
        for path in files:
            handle = self._open(path, "mmap")
            for key in handle.keys():  # noqa: SIM118 (not a dict)
                if is_derived(key):
                    continue
                name = self._own_name(key, path, index)
                stored = handle.get_slice(key)
                shape = shapes.get(name, shapes.get("embed_tokens.weight"))
                self._check_tensor(key, path, stored, shape)
                self._files[name] = path
                dtypes[name] = DTYPES[stored.get_dtype()]
        where = self.folder / (WEIGHTS if index is None else INDEX)
        found = set(self._files)
        for key, file in (index or {}).items():
            if not is_derived(key) and key.removeprefix("model.") not in found:
                raise CheckpointError(f"{where}: {key} should be in {file}, which does not hold it")
        if self.config.tied_embeddings and "lm_head.weight" in found:
            self._check_tied()
            found.remove("lm_head.weight")
            dtypes.pop("lm_head.weight")
        check_keys(where, set(shapes), found, to_hf)
        self.dtypes = dtypes

    def read(self, name: str, dtype: torch.dtype, mapped: bool = True) -> Tensor:
        self.open()
        # Read, not mapped, for a conversion: the source's pages would count beside the result.
        backend = "mmap" if mapped and self.dtypes[name] == dtype else "pread"
        return self._open(self._files[name], backend).get_tensor(to_hf(name)).to(dtype)

    def _open(self, path: Path, backend: str) -> Any:
        from safetensors import SafetensorError, safe_open

        if (path, backend) not in self._handles:
            try:
                self._handles[path, backend] = safe_open(path, framework="pt", backend=backend)
            except FileNotFoundError:
                raise CheckpointError(f"{path}: no such file") from None
            except (SafetensorError, ValueError, OSError) as error:
                raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from error
        return self._handles[path, backend]

    def _own_name(self, key: str, path: Path, index: Mapping[str, str] | None) -> str:
        try:
            name = from_hf(key)
        except CheckpointError:
            raise CheckpointError(f"{path}: keys do not fit the model (unknown: {key})") from None
        if name in self._files:
            raise CheckpointError(f"{path}: {key} is also in {self._files[name].name}")
        if index is not None and index.get(key) != path.name:
            told = f"says that it is in {index[key]}" if key in index else "does not list it"
            raise CheckpointError(f"{path}: {key} is here, but {INDEX} {told}")
        return name

    def _check_tensor(self, key: str, path: Path, stored: Any, shape: tuple[int, ...] | None) -> None:
        if stored.get_dtype() not in DTYPES:
            raise CheckpointError(
                f"{path}: {key} has dtype {stored.get_dtype()}; only {', '.join(DTYPES)} can be read"
            )
        if shape is not None and tuple(stored.get_shape()) != shape:
            raise CheckpointError(
                f"{path}: {key} has shape {tuple(stored.get_shape())}, the model needs {shape}"
            )

    def _check_tied(self) -> None:
        path = self._files["lm_head.weight"]
        embed_path = self._files.get("embed_tokens.weight")
        if embed_path is None:
            return  # reported as missing
        head = self._open(path, "pread").get_tensor("lm_head.weight")
        embed = self._open(embed_path, "pread").get_tensor("model.embed_tokens.weight")
        if not torch.equal(head, embed):
            raise CheckpointError(
                f"{path}: lm_head.weight differs from model.embed_tokens.weight, "
                f"but tie_word_embeddings is true in {CONFIG}"
            )


def shard_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a folder and, where there are several, the index: key → file name.

    Raises `CheckpointError` where there are none, the index is malformed or names a missing file.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS], None
    path = folder / INDEX
    if not path.is_file():
        if any(folder.glob("model-*-of-*.safetensors")):
            raise CheckpointError(
                f"{path}: no such file, but the shards that it lists are here; fetch it too"
            )
        pickled = any(folder.glob("pytorch_model*.bin"))
        hint = "; pytorch_model.bin is not read, fetch the safetensors files" if pickled else ""
        raise CheckpointError(f"{folder / WEIGHTS}: no such file (nor {INDEX}){hint}")
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{path}: weight_map is missing")
    for key, name in index.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise CheckpointError(
                f"{path}: {key} is not in a .safetensors file of this folder ({_short(name)})"
            )
        if not (folder / name).is_file():
            raise CheckpointError(f"{path}: {key} should be in {name}, which is missing")
    return [folder / name for name in sorted(set(index.values()))], index


def write_hf(
    folder: Path,
    config: Mapping[str, Any],
    sizes: Mapping[str, int],
    read: Callable[[str], Tensor],
    max_shard_bytes: int,
) -> None:
    """Write config.json and the tensors, `read` by our names shard by shard; `sizes` are their bytes.

    One file where all of it fits into `max_shard_bytes`, else shards and an index. A tensor that is
    larger than a shard gets one of its own.
    """
    shards = list(plan_shards(sizes, max_shard_bytes))
    index: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_tensors(folder / file, {to_hf(name): read(name).contiguous() for name in names})
        index |= {to_hf(name): file for name in names}
    if len(shards) > 1:
        total = {"total_size": sum(sizes.values())}
        write_json(folder / INDEX, {"metadata": total, "weight_map": dict(sorted(index.items()))})
    write_json(folder / CONFIG, config)


def plan_shards(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Names in order, split so that each part's bytes stay within the limit where a tensor allows it."""
    shard: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if shard and filled + size > limit:
            yield shard
            shard, filled = [], 0
        shard.append(name)
        filled += size
    yield shard


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file; raises `CheckpointError` where the disk does not take it."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise CheckpointError(f"{path}: could not be written ({error})") from error
