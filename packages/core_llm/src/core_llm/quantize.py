"""Quantisation of a core, applied from outside: the model's own files know nothing of it.

    int8  weight-only, one scale per output row; all linear layers
    int4  weight-only, groups of 64 inputs; the head, which is the most sensitive, in int8
    fp8   e4m3 weights and activations, one dynamic scale per row; feed-forward layers only, without those
          of the first and last block (the recipe of arXiv 2407.21783, section 6.2)

Embeddings and norms stay as they are, unless `embedding` asks for the table too. Where head and embedding
share one weight, int8 and int4 quantise the head by itself: the embedding's rows are still looked up, and
adapters read them. The head's int8 copy then comes on top of the embedding: one byte for each of its weights.
A core whose head is no linear layer, such as a guard's that scores a few tokens, is saved without a head.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from core_llm.checkpoint import config_from_hf, config_to_hf, core_hash, read_config
from core_llm.config import LlamaConfig
from core_llm.errors import CheckpointError, UserError
from core_llm.files import CONFIG, replacing, write_json
from core_llm.float8 import Float8Linear
from core_llm.kernels.cpu import ops
from core_llm.model import Llama
from core_llm.quantized_embedding import TABLE, NoHead, QuantizedEmbedding
from core_llm.quantized_linear import INT4_GROUP, Int4Linear, Int8Linear, QuantizedLinear
from core_llm.rope import rope_frequencies
from core_llm.stored import DType

if TYPE_CHECKING:
    from core_llm.tokenizer import Tokenizer

# Another name than that of plain weights: a reader that knows nothing of quantisation finds no weights at
# all, where it would otherwise take the whole numbers for weights.
WEIGHTS = "quantized.safetensors"
ENTRY = "quantization"  # the key of config.json
_FORMAT = 1

_NAME = re.compile(r"layers\.(\d+)\.(self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)|lm_head")
# Name of a linear layer and number of blocks → what replaces it (None: it stays).
Choice = Callable[[str, int], type[QuantizedLinear] | None]


def _float8(name: str, n_layers: int) -> type[QuantizedLinear] | None:
    if ".mlp." not in name:
        return None
    return None if int(name.split(".")[1]) in (0, n_layers - 1) else Float8Linear


SCHEMES: Mapping[str, Choice] = {
    "int8": lambda name, n_layers: Int8Linear,
    "int4": lambda name, n_layers: Int8Linear if name == "lm_head" else Int4Linear,
    "fp8": _float8,
}
# What the embedding's table becomes where it is asked for.
EMBEDDINGS: Mapping[str, type[QuantizedLinear]] = {"int8": Int8Linear, "int4": Int4Linear}
_HEAD = "lm_head"


@dataclass(frozen=True)
class Report:
    """What quantisation did. `untied_bytes`: the head's copy beside an embedding that it was tied to."""

    scheme: str
    layers: int
    bytes_before: int
    bytes_after: int
    untied_bytes: int

    def __str__(self) -> str:
        share = self.bytes_after / self.bytes_before
        text = (
            f"{self.scheme}: {self.layers} linear layers, "
            f"{self.bytes_before / 1e6:,.1f} → {self.bytes_after / 1e6:,.1f} MB ({share:.0%})"
        )
        if self.untied_bytes:
            text += f"; {self.untied_bytes / 1e6:,.1f} MB of it for a head of its own beside the embedding"
        return text


def quantize(core: Llama, scheme: str, *, progress: bool = False, embedding: bool = False) -> Report:
    """Replace the core's linear layers in place, one by one; each weight is freed before the next.

    embedding: quantise its table too (int8 and int4): for models that nothing but tokens is shown to.
    Beside the core the memory needed is one quantised layer and a few blocks of 1 MiB.
    Raises `UserError` for an unknown scheme, a core that is quantised already or has LoRA layers, a layer
    whose shape or weights cannot be quantised; the core is then as it was, except for the last of these.
    """
    from tqdm import tqdm

    chosen = _plan(core, scheme, embedding)
    before = model_bytes(core)
    tied = _HEAD in chosen and core.lm_head.weight is core.embed_tokens.weight
    for name in tqdm(chosen, desc=f"quantise {scheme}", unit="layer", disable=not progress):
        try:
            module = chosen[name].from_weight(_linear(core, name).weight)
        except ValueError as error:
            raise UserError(f"{name}: cannot be quantised: {error}") from None
        _replace(core, name, module.train(core.training))
    if embedding:
        table = EMBEDDINGS[scheme].from_weight(core.embed_tokens.weight)
        held = QuantizedEmbedding(table, core.embed_tokens.weight.dtype).train(core.training)
        _replace(core, "embed_tokens", held)
    head = model_bytes(core.lm_head) if tied else 0
    return Report(scheme, len(chosen), before, model_bytes(core), head)


def _plan(core: Llama, scheme: str, embedding: bool = False) -> dict[str, type[QuantizedLinear]]:
    """Name → replacement of every layer that the scheme quantises, all of them checked."""
    if scheme not in SCHEMES:
        raise UserError(f"unknown quantisation '{scheme}'; known: {', '.join(SCHEMES)}")
    if embedding and scheme not in EMBEDDINGS:
        raise UserError(f"{scheme} has no form for the embedding; known: {', '.join(EMBEDDINGS)}")
    modules = dict(core.named_modules())
    if any(isinstance(module, QuantizedLinear) for module in modules.values()):
        raise UserError("this core is quantised already; start from the core that it was made from")
    linear = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    foreign = [name for name in linear if not _NAME.fullmatch(name)]
    if foreign:
        raise UserError(f"{foreign[0]} is no layer of a bare core; merge LoRA into it before quantising")
    hooked = [name for name, module in linear.items() if module._forward_hooks]
    if hooked:  # they would be lost with the module
        raise UserError(
            f"{hooked[0]} has LoRA attached; merge it into the core or detach it before quantising"
        )
    n_layers = core.config.n_layers
    chosen = {name: kind for name in linear if (kind := SCHEMES[scheme](name, n_layers)) is not None}
    if not chosen:
        raise UserError(
            f"{scheme} leaves the first and the last block as they are; "
            f"a core of {n_layers} blocks has nothing to quantise"
        )
    if embedding:
        reason = EMBEDDINGS[scheme].unfit(core.config.dim, core.config.vocab_size)
        if reason:
            raise UserError(f"embed_tokens: {reason}; use int8")
    for name, kind in chosen.items():
        reason = kind.unfit(linear[name].in_features, linear[name].out_features)
        if reason:
            raise UserError(f"{name}: {reason}; use int8")
    return chosen


def _linear(core: Llama, name: str) -> nn.Linear:
    module = core.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def _replace(core: Llama, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(core.get_submodule(owner), leaf, module)


def model_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers; memory that two of them share counts once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def saved_bytes(core: Llama) -> int:
    """Bytes of the weights on disk: values and scales, and bf16 for all that is not quantised."""
    quantized = sum(m.saved_bytes() for m in core.modules() if isinstance(m, QuantizedLinear))
    return quantized + 2 * sum(parameter.numel() for parameter in core.parameters())


def pack(core: Llama) -> str:
    """Hand the products to the best library for the core's device; returns its name.

    CUDA: torchao, where it is installed (over the same numbers), else plain torch. CPU: our kernels, or
    torch's packed products where there is no C compiler. A packed core may have no state to save.
    """
    # The embedding's rows are looked up one by one: its saved form is the one that serves.
    layers = {n: m for n, m in core.named_modules() if isinstance(m, QuantizedLinear) and n != TABLE}
    dtype = core.embed_tokens.weight.dtype
    if core.embed_tokens.weight.is_cuda:
        if not _has_torchao():
            return "torch"
        for name, layer in layers.items():
            _replace(core, name, _torchao_linear(layer, dtype))
        return "torchao"
    for layer in layers.values():
        layer.pack(dtype)
    return "C kernels" if ops.available() else "torch's packed products"


def _has_torchao() -> bool:
    from importlib.util import find_spec

    return find_spec("torchao") is not None


def _torchao_linear(layer: QuantizedLinear, dtype: torch.dtype) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
    linear.weight = nn.Parameter(layer.torchao_weight(dtype), requires_grad=False)
    return linear.train(layer.training)


def save_quantized(folder: Path, core: Llama, tokenizer: "Tokenizer", source_hash: str = "") -> None:
    """Write config.json, quantized.safetensors and tokenizer.json; layers that were left are bf16.

    The files hold the plain values and scales, whatever device they will be used on. transformers finds
    no weights in such a folder and says so. `source_hash`: `core_hash` of the core it was made from.
    Raises `UserError` for a core that is not quantised or is packed.
    """
    from safetensors.torch import save_file

    scheme = scheme_of(core)
    if scheme is None:
        raise UserError("this core is not quantised, or packed; quantise it and save it before pack()")
    own = _quantized_names(core)
    tensors = {
        name: tensor if name.rpartition(".")[0] in own else tensor.to(torch.bfloat16)
        for name, tensor in core.state_dict().items()
        if not name.startswith(f"{_HEAD}.") or _HEAD in own or _keeps_head(core)
    }
    entry = {"scheme": scheme, "format": _FORMAT, "int4_group": INT4_GROUP, "source_core_hash": source_hash}
    if isinstance(core.embed_tokens, QuantizedEmbedding):
        entry["embedding"] = True
    if not _has_head(core):
        entry["head"] = False
    with replacing(Path(folder)) as temporary:
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, temporary / WEIGHTS)
        tokenizer.save(temporary / "tokenizer.json")
        write_json(temporary / CONFIG, {**config_to_hf(core.config, tokenizer), ENTRY: entry})


def _has_head(core: Llama) -> bool:
    """Whether the head is one over the whole vocabulary: what cores and their files have."""
    return isinstance(core.lm_head, nn.Linear | QuantizedLinear)


def _keeps_head(core: Llama) -> bool:
    """Whether the head is a plain weight of its own."""
    return isinstance(core.lm_head, nn.Linear) and not core.config.tied_embeddings


def scheme_of(core: Llama) -> str | None:
    """Name of the scheme that gives exactly this core's layers, or None."""
    kinds: dict[str, type[nn.Module]] = {
        name: type(m)
        for name, m in core.named_modules()
        if _NAME.fullmatch(name) and (name != _HEAD or _has_head(core))
    }
    for scheme, choice in SCHEMES.items():
        wanted = {name: choice(name, core.config.n_layers) for name in kinds}
        packed = any(isinstance(m, Int4Linear) and m.packed is not None for m in core.modules())
        fits = all(issubclass(kinds[n], w or nn.Linear) for n, w in wanted.items())
        if fits and any(wanted.values()) and not packed:
            return scheme
    return None


def _quantized_names(core: Llama) -> set[str]:
    return {name for name, module in core.named_modules() if isinstance(module, QuantizedLinear)}


def load_quantized(folder: Path, dtype: DType = torch.float32) -> tuple[Llama, "Tokenizer"]:
    """A core that `save_quantized` wrote: frozen, in evaluation mode.

    `dtype` is that of the weights that were left ("auto": bf16, as they are stored).

    Raises `CheckpointError` that names file and key for anything missing, unknown or misshapen.
    """
    from core_llm.tokenizer import Tokenizer

    folder = Path(folder)
    values = read_config(folder)
    scheme, embedding, head = _read_entry(values.get(ENTRY), folder / CONFIG)
    config = config_from_hf(values, folder / CONFIG)
    core = _empty(config, scheme, embedding, head, folder / CONFIG)
    tied = config.tied_embeddings and isinstance(core.lm_head, nn.Linear)
    wanted = core.state_dict()
    if tied:
        del wanted["lm_head.weight"]
    own = _quantized_names(core)
    left = torch.bfloat16 if dtype == "auto" else dtype
    tensors = _read_strict(folder / WEIGHTS, wanted, own, left)
    if tied:
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"]
    core.load_state_dict(tensors, assign=True)
    if tied:
        core.lm_head.weight = core.embed_tokens.weight
    core.frequencies = rope_frequencies(config)  # in no checkpoint
    if isinstance(core.embed_tokens, QuantizedEmbedding):
        core.embed_tokens.hold(left)
    return core.eval().requires_grad_(False), Tokenizer.load(folder)


def _read_entry(entry: Any, path: Path) -> tuple[str, bool, bool]:
    """What config.json names: the scheme, whether the embedding is quantised, whether there is a head."""
    if not isinstance(entry, dict):
        raise CheckpointError(f"{path}: {ENTRY} is missing: this checkpoint is not quantised")
    known = {"scheme", "format", "int4_group", "source_core_hash"}
    for key, usual in (("embedding", False), ("head", True)):
        if not isinstance(entry.get(key, usual), bool):
            raise CheckpointError(f"{path}: {ENTRY}.{key} is {entry[key]!r}, not true or false")
    for key in sorted(known ^ (set(entry) - {"embedding", "head"})):
        raise CheckpointError(f"{path}: {ENTRY}.{key} is {'missing' if key in known else 'unknown'}")
    if entry["format"] != _FORMAT or entry["int4_group"] != INT4_GROUP:
        raise CheckpointError(
            f"{path}: {ENTRY} has format {entry['format']} and int4_group {entry['int4_group']}; "
            f"this version reads {_FORMAT} and {INT4_GROUP}: quantise the core again"
        )
    if entry["scheme"] not in SCHEMES:
        raise CheckpointError(f"{path}: {ENTRY}.scheme is {entry['scheme']!r}; known: {', '.join(SCHEMES)}")
    return entry["scheme"], entry.get("embedding", False), entry.get("head", True)


def _empty(config: LlamaConfig, scheme: str, embedding: bool, head: bool, path: Path) -> Llama:
    """The quantised model's shape, without any memory."""
    with torch.device("meta"):
        core = Llama(config)
        if not head:
            _replace(core, _HEAD, NoHead())
        try:
            chosen = _plan(core, scheme, embedding)
        except UserError as error:
            raise CheckpointError(f"{path}: {error}") from None
        for name, kind in chosen.items():
            linear = _linear(core, name)
            _replace(core, name, kind(linear.in_features, linear.out_features))
        if embedding:
            table = EMBEDDINGS[scheme](config.dim, config.vocab_size)
            _replace(core, "embed_tokens", QuantizedEmbedding(table, torch.float32))
    return core


def _read_strict(
    path: Path, wanted: Mapping[str, Tensor], quantized: set[str], dtype: torch.dtype
) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stream:
            found = set(stream.keys())
            for label, keys in (("missing", set(wanted) - found), ("unknown", found - set(wanted))):
                if keys:
                    raise CheckpointError(f"{path}: {label} keys: {', '.join(sorted(keys)[:5])}")
            tensors = {name: stream.get_tensor(name) for name in wanted}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from error
    for name, tensor in tensors.items():
        needed = wanted[name].dtype if name.rpartition(".")[0] in quantized else torch.bfloat16
        if tensor.shape != wanted[name].shape or tensor.dtype != needed:
            raise CheckpointError(
                f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"the model needs {needed} {tuple(wanted[name].shape)}"
            )
        if name.rpartition(".")[0] not in quantized:
            tensors[name] = tensor.to(dtype)
    # torch's int8 product for bf16 reads 16 bytes at a time from addresses that it takes to be multiples of
    # 16, or crashes; a file promises multiples of 8.
    return {name: t.clone() if t.data_ptr() % 16 else t for name, t in tensors.items()}


def quantize_checkpoint(source: str, folder: Path, scheme: str, overwrite: bool = False) -> Report:
    """Read a core in its stored dtype, quantise it with a progress bar, and write it to a folder.

    Raises what `quantize` and `load_core` raise, and `UserError` for a folder that is not empty.
    """
    from core_llm.checkpoint import load_core

    if scheme not in SCHEMES:
        raise UserError(f"unknown quantisation '{scheme}'; known: {', '.join(SCHEMES)}")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UserError(
            f"{folder}: is not empty; give another folder, or --overwrite to replace what is there"
        )
    core, tokenizer = load_core(source, "auto")
    digest = core_hash(core)
    report = quantize(core, scheme, progress=True)
    save_quantized(folder, core, tokenizer, digest)
    return report
