"""A whole block of the model in one C call, for decoding with bf16 activations.

Axes: B rows, C model width, F feed-forward width, G key/value heads, S capacity, D head dim,
N outputs, K inputs.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core_llm.kernels.cpu import ops
from core_llm.kernels.cpu.build import library

MAX_ROWS = 4
BF16, INT8, INT4 = range(3)  # kinds of weights, as in block.c
_MULTIPLE = {BF16: 32, INT8: ops.GROUP, INT4: ops.GROUP}  # of inputs

_SIZE, _POINTER = ctypes.c_int64, ctypes.c_void_p


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight as the C kernels read it (see `ops` for the layouts); `scale` belongs to int8 and int4."""

    kind: int
    n: int
    k: int
    weight: Tensor
    scale: Tensor | None = None


class _CMatrix(ctypes.Structure):
    _fields_ = [("kind", _SIZE), ("n", _SIZE), ("k", _SIZE), ("weight", _POINTER), ("scale", _POINTER)]


_PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class _CBlock(ctypes.Structure):
    _fields_ = [
        *[(name, _SIZE) for name in ("B", "C", "F", "H", "G", "S", "D")],
        *[(name, _SIZE) for name in ("k_b", "k_g", "k_s", "v_b", "v_g", "v_s")],
        ("eps", ctypes.c_double),
        *[(name, _POINTER) for name in ("x", "cosines", "sines", "attention_norm", "ffn_norm")],
        *[(name, _POINTER) for name in ("y", "keys", "values", "lengths")],
        *[(name, _CMatrix) for name in _PRODUCTS],
    ]


def suits(x: Tensor, keys: Tensor, head_dim: int) -> bool:
    """Whether one new token per row x [B, 1, C] can go through `decode_block`, by shapes and dtypes."""
    return (
        x.dtype == keys.dtype == torch.bfloat16
        and x.shape[1] == 1
        and x.shape[0] <= MAX_ROWS
        and x.shape[2] % 16 == 0
        and head_dim % 32 == 0
        and head_dim <= ops.MAX_HEAD_DIM
        and x.is_contiguous()
        and ops.usable(x, keys)
    )


def hooked(*modules: nn.Module) -> bool:
    """Whether something wants to see or change what goes in or out of one of the modules."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def matrices(layers: tuple[nn.Module, ...]) -> list[Matrix] | None:
    """The weights of q, k, v, o, gate, up and down, or None where one is not what the kernels read.

    A layer offers its weight by a method `cpu_matrix() -> Matrix | None`; one without it (wrapped, say, or
    another library's) or with hooks (LoRA's) computes more than a product.
    """
    found = []
    for layer in layers:
        offer = getattr(layer, "cpu_matrix", None)
        matrix: Matrix | None = offer() if offer is not None and not hooked(layer) else None
        if matrix is None or matrix.k % _MULTIPLE[matrix.kind]:
            return None
        found.append(matrix)
    return found


def decode_block(
    x: Tensor,
    norms: tuple[Tensor, Tensor],
    eps: float,
    weights: list[Matrix],
    rotation: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
) -> Tensor:
    """x [B, 1, C] → [B, 1, C]: attention over the cache and feed-forward, both added to the stream.

    norms: weights [C] before each half; rotation: cosines and sines [B or 1, 1, 1, D] of the new positions;
    keys and values [B, G, S, D]: the cache, into which the new ones are written at lengths [B].
    """
    out = torch.empty_like(x)
    b, _, c = x.shape
    _, g, s, d = keys.shape
    cos, sin = (table.expand(b, -1, -1, -1).contiguous() for table in rotation)
    raw = _CBlock(
        b, c, weights[4].n, weights[0].n // d, g, s, d, *keys.stride()[:3], *values.stride()[:3], eps
    )
    raw.x, raw.y, raw.cosines, raw.sines = x.data_ptr(), out.data_ptr(), cos.data_ptr(), sin.data_ptr()
    raw.attention_norm, raw.ffn_norm = norms[0].data_ptr(), norms[1].data_ptr()
    raw.keys, raw.values, raw.lengths = keys.data_ptr(), values.data_ptr(), lengths.data_ptr()
    for name, m in zip(_PRODUCTS, weights, strict=True):
        scale = None if m.scale is None else m.scale.data_ptr()
        setattr(raw, name, _CMatrix(m.kind, m.n, m.k, m.weight.data_ptr(), scale))
    loaded = library()
    assert loaded is not None  # `suits` was asked
    if loaded.decode_block(ctypes.byref(raw)):
        raise MemoryError("no memory left for the scratch space of a CPU kernel")
    return out
