"""The three spellings of a Llama's weights: ours, Hugging Face's, and the original release's.

Ours is Hugging Face's without the prefix "model.". The original layout names everything differently and
keeps the rows of q and k in another order, because its rotary embedding turns neighbouring channels
(2i, 2i + 1) where ours turns halves (i, i + D/2).

Axes: H heads, D head dim, C input width.
"""

import re

from torch import Tensor

from core_llm.errors import CheckpointError

# Ours → original, and the axis along which model-parallel shards cut the tensor (None: every shard
# holds all of it). From the released code: column-parallel layers and the vocabulary-parallel
# embedding are cut by rows, row-parallel ones by columns. "{}" stands for the layer.
ORIGINAL_KEYS: dict[str, tuple[str, int | None]] = {
    "embed_tokens.weight": ("tok_embeddings.weight", 0),
    "layers.{}.input_layernorm.weight": ("layers.{}.attention_norm.weight", None),
    "layers.{}.self_attn.q_proj.weight": ("layers.{}.attention.wq.weight", 0),
    "layers.{}.self_attn.k_proj.weight": ("layers.{}.attention.wk.weight", 0),
    "layers.{}.self_attn.v_proj.weight": ("layers.{}.attention.wv.weight", 0),
    "layers.{}.self_attn.o_proj.weight": ("layers.{}.attention.wo.weight", 1),
    "layers.{}.post_attention_layernorm.weight": ("layers.{}.ffn_norm.weight", None),
    "layers.{}.mlp.gate_proj.weight": ("layers.{}.feed_forward.w1.weight", 0),
    "layers.{}.mlp.up_proj.weight": ("layers.{}.feed_forward.w3.weight", 0),
    "layers.{}.mlp.down_proj.weight": ("layers.{}.feed_forward.w2.weight", 1),
    "norm.weight": ("norm.weight", None),
    "lm_head.weight": ("output.weight", 0),
}
_FROM_ORIGINAL = {original: ours for ours, (original, _) in ORIGINAL_KEYS.items()}
_ROTARY = ("q_proj.weight", "k_proj.weight")
# Buffers that older writers stored and that follow from the configuration.
_DERIVED = re.compile(r"rope\.freqs|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_LAYER = re.compile(r"(?<=^layers\.)\d+(?=\.)")


def is_derived(key: str) -> bool:
    """Whether a stored tensor is only a table of rotary frequencies, which a reader computes itself."""
    return _DERIVED.fullmatch(key) is not None


def to_hf(name: str) -> str:
    """Our name → Hugging Face's; an unknown one raises `CheckpointError`."""
    _row(name)
    return name if name.startswith("lm_head.") else f"model.{name}"


def from_hf(key: str) -> str:
    """Hugging Face's name → ours; an unknown one raises `CheckpointError`."""
    name = key.removeprefix("model.")
    if _pattern(name)[0] not in ORIGINAL_KEYS or to_hf(name) != key:
        raise CheckpointError(f"unknown key {key}")
    return name


def to_original(name: str) -> str:
    """Our name → the original release's; an unknown one raises `CheckpointError`."""
    return _row(name)[0].replace("{}", _pattern(name)[1])


def from_original(key: str) -> str:
    """The original release's name → ours; an unknown one raises `CheckpointError`."""
    pattern, layer = _pattern(key)
    if pattern not in _FROM_ORIGINAL:
        raise CheckpointError(f"unknown key {key}")
    return _FROM_ORIGINAL[pattern].replace("{}", layer)


def shard_axis(name: str) -> int | None:
    """The axis along which original shards cut the tensor of our name; None where each holds all of it."""
    return _row(name)[1]


def is_rotary(name: str) -> bool:
    """Whether the rows of this tensor stand in another order in the original layout."""
    return name.endswith(_ROTARY)


def to_half_split(weight: Tensor, head_dim: int) -> Tensor:
    """Rows [H·D, C] of whole heads from the original order (pairs side by side) to ours (pairs D/2 apart)."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def to_interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `to_half_split`."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _pattern(name: str) -> tuple[str, str]:
    found = _LAYER.search(name)
    return (name, "") if found is None else (_LAYER.sub("{}", name, count=1), found[0])


def _row(name: str) -> tuple[str, int | None]:
    row = ORIGINAL_KEYS.get(_pattern(name)[0])
    if row is None:
        raise CheckpointError(f"unknown tensor {name}")
    return row
