"""The layout of the original release: params.json and consolidated.NN.pth, one file per model-parallel rank.

Axes: H heads, D head dim, C model width.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core_llm.config import PRESETS, LlamaConfig, RopeScaling
from core_llm.errors import CheckpointError
from core_llm.files import PARAMS, read_json, write_json
from core_llm.keys import (
    from_original,
    is_derived,
    is_rotary,
    shard_axis,
    to_half_split,
    to_interleaved,
    to_original,
)
from core_llm.stored import StoredWeights, check_keys, expected_shapes

_RELEASED = (
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "ffn_dim_multiplier",
    "multiple_of",
    "norm_eps",
    "rope_theta",
    "use_scaled_rope",
)
# Ours: what the released files leave to the reader. Written only where a reader would guess wrong.
_OURS = ("rope_scaling_factor", "max_positions")
_IGNORED = ("max_batch_size", "max_seq_len")  # sizes of the released code's cache
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_PASSING_SHARE = 50  # a conversion keeps at most this part of the files in memory after reading it


def ffn_dim(dim: int, multiplier: float | None, multiple_of: int) -> int:
    """Width of the feed-forward layer as the released code computes it: 8/3 · C, stretched, rounded up."""
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * -(-width // multiple_of)


def config_from_params(
    values: Mapping[str, Any], path: Path, tied: bool, rope_factor: float | None = None
) -> LlamaConfig:
    """params.json as a config; `tied` is whether the checkpoint has one matrix for both embeddings.

    The file says only `use_scaled_rope`, not by how much. The factor is, in this order: `rope_factor`;
    `rope_scaling_factor` in the file; that of the preset with the same shape (8 for 3.1, 32 for 3.2's
    1B and 3B); 32 with tied embeddings, which only 3.2 has; 8. The context is the file's `max_positions`,
    or the 131,072 positions of every release with scaling, or 8,192 without. Raises `CheckpointError`
    that names file and key.
    """
    unknown = sorted(set(values) - {*_RELEASED, *_OURS, *_IGNORED})
    if unknown:
        raise CheckpointError(f"{path}: unknown key {unknown[0]}: this is not a plain Llama 3 text model")
    whole = {key: _number(values, key, path, int) for key in ("dim", "n_layers", "n_heads", "vocab_size")}
    multiplier = values.get("ffn_dim_multiplier")
    scaled = bool(values.get("use_scaled_rope", False))
    try:
        config = LlamaConfig(
            **whole,
            n_kv_heads=_number({"n_kv_heads": whole["n_heads"], **values}, "n_kv_heads", path, int),
            ffn_dim=ffn_dim(
                whole["dim"],
                None if multiplier is None else _number(values, "ffn_dim_multiplier", path),
                _number(values, "multiple_of", path, int),
            ),
            max_positions=131_072 if scaled else 8192,
            rope_theta=_number(values, "rope_theta", path),
            norm_eps=_number(values, "norm_eps", path),
            tied_embeddings=tied,
        )
    except CheckpointError as error:
        message = str(error)
        raise CheckpointError(message if str(path) in message else f"{path}: {message}") from None
    if values.get("max_positions") is not None:
        config = replace(config, max_positions=_number(values, "max_positions", path, int))
    if not scaled:
        if rope_factor is not None:
            raise CheckpointError(f"{path}: use_scaled_rope is not true, so there is no RoPE factor to give")
        return config
    if rope_factor is None and values.get("rope_scaling_factor") is not None:
        rope_factor = _number(values, "rope_scaling_factor", path)
    return replace(config, rope_scaling=RopeScaling(rope_factor or _usual_factor(config)))


def _usual_factor(config: LlamaConfig) -> float:
    for known in PRESETS.values():
        if known.rope_scaling and known == replace(config, rope_scaling=known.rope_scaling):
            return known.rope_scaling.factor
    return 32.0 if config.tied_embeddings else 8.0


def params_from_config(config: LlamaConfig) -> dict[str, Any]:
    """The inverse of `config_from_params`; raises `CheckpointError` for what it cannot express."""
    scaling = config.rope_scaling
    if scaling and replace(scaling, factor=8.0) != RopeScaling():
        raise CheckpointError(f"the original layout cannot express {scaling}: only the factor may differ")
    multiplier, multiple_of = _ffn_settings(config.dim, config.ffn_dim)
    values: dict[str, Any] = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "vocab_size": config.vocab_size,
        "ffn_dim_multiplier": multiplier,
        "multiple_of": multiple_of,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "use_scaled_rope": scaling is not None,
    }
    return {**values, **_extras(config, values)}


def _extras(config: LlamaConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader of these params would guess wrong, under keys of our own."""
    released = {key: value for key, value in values.items() if key in _RELEASED}
    guessed = config_from_params(released, Path(PARAMS), config.tied_embeddings)
    extras: dict[str, Any] = {}
    if guessed.max_positions != config.max_positions:
        extras["max_positions"] = config.max_positions
    if config.rope_scaling and replace(guessed, max_positions=config.max_positions) != config:
        extras["rope_scaling_factor"] = config.rope_scaling.factor
    return extras


def _ffn_settings(dim: int, width: int) -> tuple[float, int]:
    """A multiplier, as short as possible, and a multiple from which `ffn_dim` gives this width."""
    multiple_of = min(width & -width, 4096)  # the largest power of two in it
    base = ffn_dim(dim, None, 1)
    for digits in range(1, 17):
        multiplier = round(width / base, digits)
        if multiplier > 0 and ffn_dim(dim, multiplier, multiple_of) == width:
            return multiplier, multiple_of
    raise CheckpointError(f"the original layout cannot express ffn_dim {width} at dim {dim}")


def _number(values: Mapping[str, Any], key: str, path: Path, kind: type = float) -> Any:
    value = values.get(key)
    if value is None:
        raise CheckpointError(f"{path}: {key} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0 or value != kind(value):
        raise CheckpointError(f"{path}: {key} is {value!r}, not a positive {kind.__name__}")
    return kind(value)


class OriginalWeights(StoredWeights):
    """The weights in a folder of this layout: shards merged, rows of q and k in our order.

    Nothing is unpickled but tensors (`weights_only`). Raises `CheckpointError` that names file and key.
    """

    def __init__(self, folder: Path, rope_factor: float | None = None) -> None:
        path = folder / PARAMS
        values = read_json(path)
        self._files = _consolidated(folder)
        self._kept = [_load(file) for file in self._files]
        self._passing: dict[int, dict[str, Tensor]] = {}
        self._passed = 0
        self._may_pass = sum(file.stat().st_size for file in self._files) // _PASSING_SHARE
        super().__init__(folder, self._config(values, path, rope_factor))
        self.params = {**values, **_extras(self.config, values)}

    def _config(self, values: Mapping[str, Any], path: Path, rope_factor: float | None) -> LlamaConfig:
        return config_from_params(values, path, self._is_tied(), rope_factor)

    def check(self) -> None:
        shapes = expected_shapes(self.config)
        dtypes: dict[str, torch.dtype] = {}
        for path, shard in zip(self._files, self._kept):
            found = set()
            for key, tensor in shard.items():
                if is_derived(key):
                    continue
                name = _own_name(key, path)
                found.add(name)
                self._check_tensor(key, path, tensor, shapes.get(name))
                dtypes[name] = tensor.dtype
            if self.config.tied_embeddings:
                found.discard("lm_head.weight")
            check_keys(path, set(shapes), found, to_original)
        self.dtypes = {name: dtypes[name] for name in shapes}
        for name, shape in shapes.items():
            self._check_merged(name, shape)

    def read(self, name: str, dtype: torch.dtype, mapped: bool = True) -> Tensor:
        self.open()
        key, axis = to_original(name), shard_axis(name)
        if mapped and not is_rotary(name) and self.dtypes[name] == dtype:
            whole = self._kept[0][key]
            if (axis is None or len(self._kept) == 1) and whole.is_contiguous():
                return whole
        known = [shard[key] for shard in self._kept]
        out = torch.empty(self._merged_shape(known, axis), dtype=dtype)
        # A norm is whole in every shard: the first one's will do.
        pieces = [out] if axis is None else out.split([part.shape[axis] for part in known], axis)
        for rank, piece in enumerate(pieces):
            part = self._borrow(rank, key)  # of whole heads where it is q or k
            piece.copy_(to_half_split(part, self.config.head_dim) if is_rotary(name) else part)
        return out

    def _borrow(self, rank: int, key: str) -> Tensor:
        """A shard's tensor, from a mapping that is let go now and then: pages once read would stay."""
        if rank not in self._passing or self._passed > self._may_pass:
            self._passing, self._passed = {rank: _load(self._files[rank])}, 0
        part = self._passing[rank][key]
        self._passed += part.nbytes
        return part

    def _is_tied(self) -> bool:
        """Whether the output matrix is left out or the same as the embedding, as in 3.2's 1B and 3B."""
        for path in self._files:
            shard = _load(path)  # not `_kept`: what is read here must not stay in memory
            embed, head = shard.get("tok_embeddings.weight"), shard.get("output.weight")
            if embed is None or head is None:
                return head is None
            if embed.data_ptr() != head.data_ptr() and not (
                embed.shape == head.shape and torch.equal(embed[:1], head[:1]) and torch.equal(embed, head)
            ):
                return False
        return True

    def _check_tensor(self, key: str, path: Path, tensor: Tensor, shape: tuple[int, ...] | None) -> None:
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(f"{path}: {key} has dtype {tensor.dtype}; only floating point can be read")
        if shape is not None and tensor.dim() != len(shape):
            raise CheckpointError(f"{path}: {key} has shape {tuple(tensor.shape)}, the model needs {shape}")

    def _check_merged(self, name: str, shape: tuple[int, ...]) -> None:
        key, axis = to_original(name), shard_axis(name)
        parts = [shard[key] for shard in self._kept]
        same = all(part.shape == parts[0].shape for part in parts)
        if axis is None:
            parts = parts[:1]
        if not same or self._merged_shape(parts, axis) != shape:
            shapes = " + ".join(str(tuple(part.shape)) for part in parts)
            raise CheckpointError(f"{self._files[0]}: {key} has shape {shapes}, the model needs {shape}")

    @staticmethod
    def _merged_shape(parts: list[Tensor], axis: int | None) -> tuple[int, ...]:
        shape = list(parts[0].shape)
        if axis is not None:
            shape[axis] = sum(part.shape[axis] for part in parts)
        return tuple(shape)


def _own_name(key: str, path: Path) -> str:
    try:
        return from_original(key)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: keys do not fit the model ({error})") from None


def _consolidated(folder: Path) -> list[Path]:
    """consolidated.00.pth, .01, … in order; raises `CheckpointError` where one is missing."""
    numbers = sorted(
        int(found[1])
        for p in folder.iterdir()
        if (found := re.fullmatch(r"consolidated\.(\d+)\.pth", p.name))
    )
    for expected in range(max(numbers, default=0) + 1):
        if expected not in numbers:
            raise CheckpointError(f"{folder / _file(expected)}: no such file")
    return [folder / _file(number) for number in numbers]


def _file(number: int) -> str:
    return f"consolidated.{number:02d}.pth"


def _load(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, their memory mapped from it."""
    import pickle

    try:
        values = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, ValueError, EOFError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: truncated or not a torch file ({reason})") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: holds something else than tensors; not loaded") from error
    if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
        raise CheckpointError(f"{path}: holds something else than tensors under names")
    return values


def write_original(
    folder: Path,
    params: Mapping[str, Any],
    config: LlamaConfig,
    read: Callable[[str], Tensor],
    n_shards: int = 1,
) -> None:
    """Write params.json and `n_shards` files from tensors `read` by our names, one file in memory at a time.

    Raises `CheckpointError` where the heads, the widths or the vocabulary do not divide by `n_shards`.
    """
    for what in ("n_heads", "n_kv_heads", "ffn_dim", "vocab_size"):
        if n_shards < 1 or getattr(config, what) % n_shards:
            raise CheckpointError(f"cannot cut {what} {getattr(config, what)} into {n_shards} shards")
    for number in range(n_shards):
        tensors = {}
        for name in expected_shapes(config):
            tensors[to_original(name)] = _part(name, read(name), config.head_dim, number, n_shards)
        if config.tied_embeddings:  # the same storage: the file holds it once
            tensors["output.weight"] = tensors["tok_embeddings.weight"]
        save_shard(folder, number, tensors)
    write_json(folder / PARAMS, params)


def save_shard(folder: Path, number: int, tensors: Mapping[str, Tensor]) -> None:
    """Write one consolidated.NN.pth; raises `CheckpointError` where the disk does not take it."""
    path = folder / _file(number)
    try:
        torch.save(dict(tensors), path)
    except RuntimeError as error:  # torch's writer reports a full disk this way
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: could not be written ({reason})") from error


def _part(name: str, tensor: Tensor, head_dim: int, number: int, n_shards: int) -> Tensor:
    axis = shard_axis(name)
    if axis is not None and n_shards > 1:
        tensor = tensor.chunk(n_shards, dim=axis)[number]
    return own_storage(to_interleaved(tensor, head_dim) if is_rotary(name) else tensor)


def own_storage(tensor: Tensor) -> Tensor:
    """The tensor, copied where it is part of a larger one: torch.save writes whole storages."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
