"""The spellings of a fused checkpoint's tensors: ours, Hugging Face's, and the original release's.

Ours are the core's own names and, behind "vision.", the adapter's. Axes: K tiles per picture, A aspect
ratios, S positions of a tile, E encoder width, V vocabulary, C core width.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from core_llm.config import LlamaConfig
from core_llm.errors import CheckpointError
from core_llm.keys import is_rotary, shard_axis, to_half_split, to_interleaved, to_original
from core_llm.stored import expected_shapes, without_memory
from vision_adapter.mllama_adapter import MllamaAdapter
from vision_adapter.mllama_config import MllamaConfig, fused_indices, tile_grids

OURS = "vision."  # before the adapter's names
EMBEDDING, TOKEN_ROWS = "embed_tokens.weight", f"{OURS}token_rows"

# How a tensor's stored form differs from ours.
# gate: ours has no axis. patch: original [E, 3·p·p]. table: original [K, K, S or 1, E] by row and column of
# the grid, ours [A + 1, K·S·E] by aspect ratio. rotary: rows of q and k in another order in the original.
Form = Literal["plain", "gate", "patch", "table", "rotary"]


@dataclass(frozen=True)
class Entry:
    """One of our tensors: its shape, names elsewhere, form, and the axis that original shards cut."""

    shape: tuple[int, ...]
    hf: str
    original: str
    form: Form
    axis: int | None


_CROSS_HF = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attention_gate": "cross_attn_attn_gate",
    "ffn_gate": "cross_attn_mlp_gate",
    **{f"{p}_proj.weight": f"cross_attn.{p}_proj.weight" for p in "qkvo"},
    **{f"{p}_norm.weight": f"cross_attn.{p}_norm.weight" for p in "qk"},
    **{f"ffn.{p}_proj.weight": f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")},
}
_CROSS_ORIGINAL: dict[str, tuple[str, int | None]] = {
    "attention_norm.weight": ("attention_norm.weight", None),
    "ffn_norm.weight": ("ffn_norm.weight", None),
    "attention_gate": ("gate_attn", None),
    "ffn_gate": ("gate_ffwd", None),
    "q_proj.weight": ("attention.wq.weight", 0),
    "k_proj.weight": ("attention.wk.weight", 0),
    "v_proj.weight": ("attention.wv.weight", 0),
    "o_proj.weight": ("attention.wo.weight", 1),
    "q_norm.weight": ("attention.q_norm.weight", None),
    "k_norm.weight": ("attention.k_norm.weight", None),
    "ffn.gate_proj.weight": ("feed_forward.w1.weight", 0),
    "ffn.up_proj.weight": ("feed_forward.w3.weight", 0),
    "ffn.down_proj.weight": ("feed_forward.w2.weight", 1),
}
_BLOCK_ORIGINAL: dict[str, tuple[str, int | None]] = {
    "self_attn.q_proj.weight": ("attn.wq.weight", 0),
    "self_attn.k_proj.weight": ("attn.wk.weight", 0),
    "self_attn.v_proj.weight": ("attn.wv.weight", 0),
    "self_attn.o_proj.weight": ("attn.wo.weight", 1),
    "mlp.fc1.weight": ("mlp.c_fc.weight", 0),
    "mlp.fc1.bias": ("mlp.c_fc.bias", 0),
    "mlp.fc2.weight": ("mlp.c_proj.weight", 1),
    "mlp.fc2.bias": ("mlp.c_proj.bias", None),
    **{f"input_layernorm.{p}": (f"ln_1.{p}", None) for p in ("weight", "bias")},
    **{f"post_attention_layernorm.{p}": (f"ln_2.{p}", None) for p in ("weight", "bias")},
    "gate_attn": ("gate_attn", None),
    "gate_ffn": ("gate_ffn", None),
}
_ENCODER_ORIGINAL: dict[str, tuple[str, int | None]] = {
    "patch_embedding.weight": ("conv1._linear.weight", 0),
    "class_embedding": ("class_embedding", None),
    "gated_positional_embedding.embedding": ("positional_embedding", None),
    "gated_positional_embedding.tile_embedding.weight": ("gated_positional_embedding", None),
    "gated_positional_embedding.gate": ("gated_positional_embedding_gate", None),
    **{
        f"{when}_tile_positional_embedding.{ours}": (f"{when}_tile_pos_embed.{original}", None)
        for when in ("pre", "post")
        for ours, original in (("embedding.weight", "embedding"), ("gate", "gate"))
    },
    **{
        f"layernorm_{when}.{part}": (f"ln_{when}.{part}", None)
        for when in ("pre", "post")
        for part in ("weight", "bias")
    },
}
_OLD_PREFIXES = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_model.", "model.vision_model."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
_LAYER = re.compile(r"^layers\.(\d+)\.")
_BLOCK = re.compile(r"^((?:global_)?transformer)\.layers\.(\d+)\.(.+)$")


def adapter_shapes(config: MllamaConfig, core: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of the adapter's parameters."""
    adapter = without_memory(lambda: MllamaAdapter(config, core))
    return {name: tuple(parameter.shape) for name, parameter in adapter.named_parameters()}


def entries(config: MllamaConfig, core: LlamaConfig) -> dict[str, Entry]:
    """Every tensor of a fused checkpoint by our name; both embeddings are one tensor in Hugging Face's."""
    own, cross = fused_indices(core.n_layers, config.cross_layers)
    table: dict[str, Entry] = {}
    for name, shape in expected_shapes(core).items():
        moved = _LAYER.sub(lambda found: f"layers.{own[int(found[1])]}.", name)
        hf = name if name.startswith("lm_head.") else f"model.language_model.{moved}"
        original = f"text_model.{to_original(name)}"
        table[name] = Entry(shape, hf, original, "rotary" if is_rotary(name) else "plain", shard_axis(name))
    for name, shape in adapter_shapes(config, core).items():
        table[OURS + name] = _adapter_entry(name, shape, config, cross)
    return table


def _adapter_entry(name: str, shape: tuple[int, ...], config: MllamaConfig, cross: list[int]) -> Entry:
    form: Form = "plain"
    part, _, rest = name.partition(".")
    if part == "token_rows":
        original = "text_model.learnable_embedding.weight"
        return Entry(shape, f"model.language_model.{EMBEDDING}", original, form, 0)
    if part == "projector":
        return Entry(
            shape, f"model.multi_modal_projector.{rest}", f"vision_model.vision_projection.{rest}", form, 0
        )
    if part == "cross_attention":
        layer, _, rest = rest.partition(".")
        number = config.cross_layers.index(int(layer))
        original, axis = _CROSS_ORIGINAL[rest]
        hf = f"model.language_model.layers.{cross[number]}.{_CROSS_HF[rest]}"
        original = f"text_model.cross_attention_layers.{number}.{original}"
    else:
        hf = f"model.vision_model.{rest}"
        block = _BLOCK.match(rest)
        if block is not None:
            original, axis = _BLOCK_ORIGINAL[block[3]]
            original = f"{block[1]}.resblocks.{block[2]}.{original}"
        else:
            original, axis = _ENCODER_ORIGINAL[rest]
        original = f"vision_model.vision_encoder.{original}"
    if shape == ():
        form = "gate"
    elif rest == "patch_embedding.weight":
        form = "patch"
    elif rest.endswith(("tile_positional_embedding.embedding.weight", "tile_embedding.weight")):
        form = "table"
    return Entry(shape, hf, original, form, axis)


def modern(key: str) -> str:
    """A key of any transformers version in the spelling of version 5."""
    for old, new in _OLD_PREFIXES:
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def old(key: str) -> str:
    """The inverse of `modern`: the spelling of the files on the hub, which every version reads."""
    for past, new in _OLD_PREFIXES:
        if key.startswith(new):
            return past + key.removeprefix(new)
    return key


def hf_shape(entry: Entry) -> tuple[int, ...]:
    """Shape of the tensor in Hugging Face's layout, apart from the shared embedding."""
    return (1,) if entry.form == "gate" else entry.shape


def original_shape(entry: Entry, config: MllamaConfig) -> tuple[int, ...]:
    """Shape of the tensor in the original layout, shards merged."""
    if entry.form == "patch":
        return (entry.shape[0], entry.shape[1] * entry.shape[2] * entry.shape[3])
    if entry.form == "table":
        k = config.max_tiles
        return (k, k, entry.shape[1] // (k * config.dim), config.dim)
    return hf_shape(entry)


def from_stored(tensor: Tensor, entry: Entry, head_dim: int, config: MllamaConfig) -> Tensor:
    """A merged tensor of the original layout in our form."""
    if entry.form == "rotary":
        return to_half_split(tensor, head_dim)
    if entry.form == "table":
        return to_table(tensor, config.max_tiles)
    return tensor.reshape(entry.shape)


def to_stored(name: str, tensor: Tensor, entry: Entry, head_dim: int, config: MllamaConfig) -> Tensor:
    """The inverse of `from_stored`; raises `CheckpointError` where the original layout cannot express it."""
    if entry.form == "rotary":
        return to_interleaved(tensor, head_dim)
    if entry.form == "table":
        return from_table(name, tensor, config)
    return tensor.reshape(original_shape(entry, config))


def to_table(grid: Tensor, max_tiles: int) -> Tensor:
    """Vectors by place in the grid [K, K, S, E] → by aspect ratio [A + 1, K·S·E], zero for missing tiles.

    Places that no aspect ratio uses, such as (1, 2) of four tiles, are dropped.
    """
    grids = tile_grids(max_tiles)
    table = grid.new_zeros(len(grids) + 1, max_tiles, *grid.shape[2:])
    for ratio, (height, width) in enumerate(grids, start=1):
        table[ratio, : height * width] = grid[:height, :width].flatten(0, 1)
    return table.flatten(1)


def from_table(name: str, table: Tensor, config: MllamaConfig) -> Tensor:
    """The inverse of `to_table`, with zeros at places that no aspect ratio uses.

    Raises `CheckpointError` where one place has different vectors in two aspect ratios, or a missing tile
    has one: what was trained in that form has no counterpart.
    """
    k = config.max_tiles
    vectors = table.unflatten(1, (k, -1, config.dim))
    grid = torch.zeros(k, k, *vectors.shape[2:], dtype=table.dtype)
    for ratio, (height, width) in enumerate(tile_grids(k), start=1):
        grid[:height, :width] = vectors[ratio, : height * width].unflatten(0, (height, width))
    if not torch.equal(to_table(grid, k), table):
        raise CheckpointError(
            f"{name}: has a vector of its own for a tile in each aspect ratio, the original layout only one "
            "for its place; keep this checkpoint in Hugging Face's layout"
        )
    return grid


def count(table: Mapping[str, Entry]) -> dict[str, int]:
    """Parameters by part: core, encoder, projector, token_rows, cross_attention, and total."""
    sums: dict[str, int] = {}
    for name, entry in table.items():
        part = name.removeprefix(OURS).partition(".")[0] if name.startswith(OURS) else "core"
        sums[part] = sums.get(part, 0) + torch.Size(entry.shape).numel()
    return {**sums, "total": sum(sums.values())}
