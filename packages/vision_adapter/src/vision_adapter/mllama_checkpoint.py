"""Released checkpoints, in which core and adapter are one model: read in two parts, written as one again.

Both layouts are read tensor by tensor and checked by name, shape and dtype before anything is used. The two
parts are `vision.` names for the adapter and the core's own.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core_llm.checkpoint import read_adapter_config, read_core
from core_llm.config import LlamaConfig
from core_llm.errors import CheckpointError
from core_llm.files import CONFIG, INDEX, PARAMS, WEIGHTS, parse_size, read_json, replacing, write_json
from core_llm.hf_layout import DTYPES, HFWeights, plan_shards, save_tensors, shard_files
from core_llm.hub import find_model
from core_llm.keys import is_derived
from core_llm.model import Llama
from core_llm.original_layout import OriginalWeights, own_storage, save_shard
from core_llm.stored import DType, StoredWeights, check_keys, without_memory
from core_llm.tokenizer import Tokenizer
from vision_adapter import mllama_config
from vision_adapter.mllama_adapter import KIND, MllamaAdapter
from vision_adapter.mllama_config import MllamaConfig
from vision_adapter.mllama_keys import (
    EMBEDDING,
    OURS,
    TOKEN_ROWS,
    Entry,
    entries,
    from_stored,
    hf_shape,
    modern,
    old,
    original_shape,
    to_stored,
)
from vision_adapter.updates import load_updates, without_updates

Layout = Literal["hf", "original"]
Read = Callable[[str], Tensor]


class FusedHF(HFWeights):
    """A fused checkpoint in Hugging Face's layout, in the names of any transformers version.

    Raises `CheckpointError` that names file and key, as `HFWeights`.
    """

    def __init__(self, folder: Path) -> None:
        self.raw = read_json(folder / CONFIG)
        self.vision, core = mllama_config.from_hf(self.raw, folder / CONFIG)
        StoredWeights.__init__(self, folder, core)
        self._handles: dict[tuple[Path, str], Any] = {}
        self._files: dict[str, Path] = {}  # by key in the spelling of version 5
        self._keys: dict[str, str] = {}  # the same as spelled in the file
        self.entries = entries(self.vision, core)

    def check(self) -> None:
        files, index = shard_files(self.folder)
        wanted = {entry.hf: hf_shape(entry) for entry in self.entries.values()}
        wanted[self.entries[EMBEDDING].hf] = (
            self.config.vocab_size + self.vision.token_rows,
            self.config.dim,
        )
        found: dict[str, torch.dtype] = {}
        for path in files:
            handle = self._open(path, "mmap")
            for key in handle.keys():  # noqa: SIM118 (not a dict)
                name = modern(key)
                if _is_derived(name):
                    continue
                if name in found:
                    raise CheckpointError(f"{path}: {key} is also in {self._files[name].name}")
                stored = handle.get_slice(key)
                self._check_tensor(key, path, stored, wanted.get(name))
                found[name] = DTYPES[stored.get_dtype()]
                self._files[name], self._keys[name] = path, key
        where = self.folder / (WEIGHTS if index is None else INDEX)
        check_keys(where, set(wanted), set(found), lambda name: self._keys.get(name, name))
        if index is not None:
            self._check_index(where, index)
        self.dtypes = {name: found[entry.hf] for name, entry in self.entries.items()}

    def _check_index(self, where: Path, index: Mapping[str, str]) -> None:
        listed = {modern(key): file for key, file in index.items() if not _is_derived(modern(key))}
        for name in sorted({*listed, *self._files}):
            file, held = listed.get(name), self._files.get(name)
            if file is None or held is None or held.name != file:
                told = f"says {file}" if file else "does not list it"
                found = f"is in {held.name}" if held else "is nowhere"
                raise CheckpointError(f"{where}: {self._keys.get(name, name)} {found}, but the index {told}")

    def read(self, name: str, dtype: torch.dtype, mapped: bool = True) -> Tensor:
        self.open()
        entry = self.entries[name]
        key, path = self._keys[entry.hf], self._files[entry.hf]
        backend = "mmap" if mapped and self.dtypes[name] == dtype else "pread"
        handle = self._open(path, backend)
        vocabulary = self.config.vocab_size
        if name == TOKEN_ROWS:
            return handle.get_slice(key)[vocabulary:].to(dtype)
        if name == EMBEDDING:
            # A mapped slice of rows is one piece of the file; read, only these rows are fetched.
            whole = handle.get_tensor(key) if backend == "mmap" else handle.get_slice(key)
            return whole[:vocabulary].to(dtype)
        return handle.get_tensor(key).to(dtype).reshape(entry.shape)


class FusedOriginal(OriginalWeights):
    """A fused checkpoint in the original layout: shards merged, all tensors in our forms.

    Raises `CheckpointError` that names file and key, as `OriginalWeights`.
    """

    vision: MllamaConfig

    def _config(self, values: Mapping[str, Any], path: Path, rope_factor: float | None) -> LlamaConfig:
        self.vision, core = mllama_config.from_params(values, path, rope_factor)
        self.entries = entries(self.vision, core)
        return core

    def check(self) -> None:
        wanted = {entry.original for entry in self.entries.values()}
        for path, shard in zip(self._files, self._kept, strict=True):
            found = {key for key in shard if not is_derived(key.removeprefix("text_model."))}
            check_keys(path, wanted, found, lambda key: key)
        for entry in self.entries.values():
            parts = [shard[entry.original] for shard in self._kept]
            shape = original_shape(entry, self.vision)
            for part in parts:
                self._check_tensor(entry.original, self._files[0], part, None)
            if entry.form == "gate":  # some files repeat the number; the released code takes the first
                fits = all(part.numel() >= 1 for part in parts)
            else:
                pieces = parts if entry.axis is not None else parts[:1]
                fits = len({part.shape for part in parts}) == 1 and parts[0].dim() == len(shape)
                fits = fits and self._merged_shape(pieces, entry.axis) == shape
            if not fits:
                shapes = " + ".join(str(tuple(part.shape)) for part in parts)
                hint = ""
                if entry.axis is not None and sum(p.shape[entry.axis] for p in parts) < shape[entry.axis]:
                    hint = f"; if a file is missing behind {self._files[-1].name}, fetch it"
                raise CheckpointError(
                    f"{self._files[0]}: {entry.original} has shape {shapes}, the model needs {shape}{hint}"
                )
        first = self._kept[0]
        self.dtypes = {name: first[entry.original].dtype for name, entry in self.entries.items()}

    def read(self, name: str, dtype: torch.dtype, mapped: bool = True) -> Tensor:
        self.open()
        entry = self.entries[name]
        kept = [shard[entry.original] for shard in self._kept]
        if entry.form == "gate":
            return kept[0].flatten()[0].to(dtype, copy=True)
        plain = entry.form in ("plain", "patch") and self.dtypes[name] == dtype and kept[0].is_contiguous()
        if mapped and plain and (entry.axis is None or len(kept) == 1):
            return kept[0].reshape(entry.shape)
        ranks = range(len(kept)) if entry.axis is not None else range(1)
        parts = [self._borrow(rank, entry.original) for rank in ranks]
        merged = parts[0] if len(parts) == 1 else torch.cat(parts, dim=entry.axis or 0)
        converted = from_stored(merged, entry, self.config.head_dim, self.vision).to(dtype)
        return converted.clone() if converted.data_ptr() == parts[0].data_ptr() else converted.contiguous()


def _is_derived(key: str) -> bool:
    return is_derived(key.replace("language_model.", ""))


def is_fused(folder: Path) -> bool:
    """Whether the folder holds a fused vision checkpoint, in either layout."""
    if (folder / CONFIG).is_file():
        return read_json(folder / CONFIG).get("model_type") == "mllama"
    return (folder / PARAMS).is_file() and "vision_chunk_size" in read_json(folder / PARAMS)


def open_fused(folder: Path, rope_factor: float | None = None) -> FusedHF | FusedOriginal:
    """The fused checkpoint in a folder, in whichever layout; raises `CheckpointError` where there is none.

    `rope_factor` as in `core_llm.checkpoint.load_core`.
    """
    if (folder / CONFIG).is_file() and any(folder.glob("*.safetensors")):
        others = [
            path.name for path in (folder / PARAMS, *folder.glob("consolidated.*.pth")) if path.exists()
        ]
        if others:
            raise CheckpointError(
                f"{folder}: holds both layouts side by side ({CONFIG} and {others[0]}); "
                "keep one of them here, or the original one in a sub-folder original/"
            )
        return FusedHF(folder)
    if (folder / PARAMS).is_file() and (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder}: {CONFIG} is of one layout and {PARAMS} of the other; remove the one without weights"
        )
    for candidate in (folder, folder / "original"):
        if (candidate / PARAMS).is_file():
            return FusedOriginal(candidate, rope_factor)
    raise CheckpointError(f"{folder}: no vision checkpoint here (neither {CONFIG} with weights nor {PARAMS})")


def read_adapter(
    weights: FusedHF | FusedOriginal, dtype: DType = "auto", mapped: bool = True
) -> MllamaAdapter:
    """The adapter of a fused checkpoint, read one tensor after the other; frozen, in evaluation mode."""
    dtype = weights.resolve(dtype)
    return _filled(weights.vision, weights.config, lambda name: weights.read(OURS + name, dtype, mapped))


def _filled(config: MllamaConfig, core: LlamaConfig, read: Read) -> MllamaAdapter:
    adapter = without_memory(lambda: MllamaAdapter(config, core))
    for name, _ in list(adapter.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(adapter.get_submodule(owner), leaf, nn.Parameter(read(name), requires_grad=False))
    return adapter.eval()


def load_fused(
    where: str | Path, dtype: DType = torch.float32, *, mapped: bool = True
) -> tuple[Llama, Tokenizer, MllamaAdapter]:
    """Frozen core, tokenizer and adapter of a fused checkpoint: a folder, or a hub id.

    Raises `CheckpointError` for a missing, truncated or mismatched file.
    """
    weights = open_fused(find_model(where, Path("nano")))
    tokenizer = Tokenizer.load(weights.folder)
    return read_core(weights, dtype, mapped), tokenizer, read_adapter(weights, dtype, mapped)


def load(folder: Path, core: Llama) -> MllamaAdapter:
    """An adapter that `MllamaAdapter.save` wrote, frozen, in the core's dtype and on its device.

    Raises `CheckpointError` where files are missing or truncated, or the adapter belongs to another core.
    """
    from safetensors import SafetensorError, safe_open

    values = without_updates(read_adapter_config(folder, KIND, core))
    config, path, weight = MllamaConfig.from_dict(values), folder / WEIGHTS, core.embed_tokens.weight
    try:
        handle = safe_open(path, framework="pt", backend="mmap")
        shapes = {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from error
    wanted = {
        name.removeprefix(OURS): entry.shape
        for name, entry in entries(config, core.config).items()
        if name.startswith(OURS)
    }
    check_keys(path, set(wanted), set(shapes), str)
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise CheckpointError(f"{path}: {name} has shape {shapes[name]}, the model needs {shape}")
    adapter = _filled(
        config, core.config, lambda name: handle.get_tensor(name).to(weight.device, weight.dtype)
    )
    adapter.hold(load_updates(Path(folder), core))
    return adapter


def reader(core: Llama, adapter: MllamaAdapter, dtype: torch.dtype) -> Read:
    """A function that reads the tensors of a core and its adapter by our names of a fused checkpoint."""
    # A tied head has a name of its own there: next to the token rows the embedding is no longer its shape.
    parameters = {"lm_head.weight": core.lm_head.weight, **dict(core.named_parameters())}
    parameters |= {OURS + name: parameter for name, parameter in adapter.named_parameters()}
    return lambda name: parameters[name].detach().to("cpu", dtype)


def save_fused(
    folder: Path,
    core: Llama,
    adapter: MllamaAdapter,
    layout: Layout = "hf",
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "5GB",
    n_shards: int = 1,
) -> None:
    """Write core and adapter as one checkpoint that transformers or the released code reads."""
    read = reader(core, adapter, dtype)
    write_fused(Path(folder), adapter.config, core.config, read, layout, dtype, max_shard_size, n_shards)


def write_fused(
    folder: Path,
    config: MllamaConfig,
    core: LlamaConfig,
    read: Read,
    layout: Layout = "hf",
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "5GB",
    n_shards: int = 1,
    add: Callable[[Path], None] | None = None,
) -> None:
    """Write a fused checkpoint from tensors `read` by our names, one file in memory at a time.

    `max_shard_size` applies to the layout "hf", `n_shards` to "original". add: writes further files into the
    folder before it appears. Raises `CheckpointError` for what
    the original layout cannot express.
    """
    core = replace(core, tied_embeddings=False)
    table = entries(config, core)
    with replacing(folder) as temporary:
        if layout == "hf":
            _write_hf(temporary, table, read, dtype, parse_size(max_shard_size))
            write_json(temporary / CONFIG, mllama_config.to_hf(config, core, dtype))
        else:
            params = mllama_config.to_params(config, core)
            _write_original(temporary, table, read, config, core, n_shards)
            write_json(temporary / PARAMS, params)
        if add is not None:
            add(temporary)


def _write_hf(folder: Path, table: Mapping[str, Entry], read: Read, dtype: torch.dtype, limit: int) -> None:
    sizes = {
        name: torch.Size(entry.shape).numel() * dtype.itemsize
        for name, entry in table.items()
        if name != TOKEN_ROWS  # they are written with the core's embedding
    }
    sizes[EMBEDDING] += torch.Size(table[TOKEN_ROWS].shape).numel() * dtype.itemsize
    shards = list(plan_shards(sizes, limit))
    index: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensor = torch.cat([read(name), read(TOKEN_ROWS)]) if name == EMBEDDING else read(name)
            tensors[old(table[name].hf)] = (tensor[None] if tensor.dim() == 0 else tensor).contiguous()
        save_tensors(folder / file, tensors)
        index |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        total = {"total_size": sum(sizes.values())}
        write_json(folder / INDEX, {"metadata": total, "weight_map": dict(sorted(index.items()))})


def _write_original(
    folder: Path,
    table: Mapping[str, Entry],
    read: Read,
    config: MllamaConfig,
    core: LlamaConfig,
    n_shards: int,
) -> None:
    counts = {"n_heads": core.n_heads, "n_kv_heads": core.n_kv_heads, "vision n_heads": config.n_heads}
    for what, count in {**counts, "token_rows": config.token_rows, "vocab_size": core.vocab_size}.items():
        if n_shards < 1 or count % n_shards:
            raise CheckpointError(f"cannot cut {what} {count} into {n_shards} shards")
    for number in range(n_shards):
        tensors = {}
        for name, entry in table.items():
            stored = to_stored(name, read(name), entry, core.head_dim, config)
            if entry.axis is not None and n_shards > 1:
                stored = stored.chunk(n_shards, dim=entry.axis)[number]
            tensors[entry.original] = own_storage(stored)
        save_shard(folder, number, tensors)
