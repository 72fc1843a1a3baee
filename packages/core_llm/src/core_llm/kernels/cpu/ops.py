"""The C kernels as functions on tensors.

Axes: B batch, H query heads, G key/value heads, S keys, D head dim, T rows, N outputs, K inputs.
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from core_llm.kernels.cpu.build import library

GROUP = 64  # inputs that share a scale in the quantised weights (common.h)
MAX_HEAD_DIM = 256
_FLOATS = (torch.float32, torch.bfloat16)

_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, list[Any]] = {
    "linear_bf16": [_POINTER, _INT, _POINTER, _POINTER, *[_SIZE] * 3],
    "linear_f32": [*[_POINTER] * 3, *[_SIZE] * 3],
    "linear_int8": [_POINTER, _INT, *[_POINTER] * 3, *[_SIZE] * 3],
    "linear_int4": [_POINTER, _INT, *[_POINTER] * 3, *[_SIZE] * 3],
    "attend_decode": [*[_POINTER] * 6, *[_SIZE] * 5, _INT],
    "rms_norm": [*[_POINTER] * 3, *[_SIZE] * 2, _FLOAT, _INT],
    "silu_times": [*[_POINTER] * 3, _SIZE, _INT],
    "rotate": [*[_POINTER] * 4, *[_SIZE] * 3, _INT],
}


@functools.cache
def _functions() -> Any:
    loaded = library()
    if loaded is not None:
        for name, types in _SIGNATURES.items():
            getattr(loaded, name).argtypes = types
    return loaded


def available() -> bool:
    """Whether the kernels are there: false without a C compiler."""
    return _functions() is not None


def usable(*tensors: Tensor) -> bool:
    """Whether a kernel may take these tensors now: on the CPU, all fp32 or all bf16, no gradient asked."""
    # Called for every step of a decode: plain loops and few attribute look-ups.
    dtype, graded = tensors[0].dtype, torch.is_grad_enabled()
    if dtype not in _FLOATS:
        return False
    for tensor in tensors:
        if not tensor.is_cpu or tensor.dtype is not dtype or (graded and tensor.requires_grad):
            return False
    return not torch.compiler.is_compiling() and _functions() is not None


def linear_bf16(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] (fp32 or bf16) times bf16 weight [N, K] transposed: [..., N] in x's dtype, sums in fp32.

    K must be a multiple of 32, the weight contiguous.
    """
    n, k = weight.shape
    x, out, rows = _rows(x, n, k)
    _checked(_functions().linear_bf16(*_typed(x), weight.data_ptr(), out.data_ptr(), rows, n, k))
    return out


def linear_f32(x: Tensor, weight: Tensor) -> Tensor:
    """fp32 x [..., K] times a contiguous fp32 weight [N, K] transposed: [..., N]; K a multiple of 16."""
    n, k = weight.shape
    x, out, rows = _rows(x, n, k)
    _functions().linear_f32(x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, n, k)
    return out


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [..., K] times (int8 weight [N, K] · fp32 scale [N]) transposed: [..., N] in x's dtype.

    K must be a multiple of 64. Activations are rounded to 16 bits per group of 64.
    """
    n, k = weight.shape
    x, out, rows = _rows(x, n, k)
    pointers = weight.data_ptr(), scale.data_ptr(), out.data_ptr()
    _checked(_functions().linear_int8(*_typed(x), *pointers, rows, n, k))
    return out


def linear_int4(x: Tensor, weight: Tensor, scale_min: Tensor) -> Tensor:
    """x [..., K] times a 4-bit weight transposed: [..., N] in x's dtype.

    weight uint8 [N, K/2]: per 64 inputs 16 little-endian words, input 16 j + i in nibble j of word i;
    scale_min bf16 [N, K/64, 2]: value = scale · nibble + minimum.
    """
    n, k = weight.shape[0], 2 * weight.shape[1]
    x, out, rows = _rows(x, n, k)
    pointers = weight.data_ptr(), scale_min.data_ptr(), out.data_ptr()
    _checked(_functions().linear_int4(*_typed(x), *pointers, rows, n, k))
    return out


def attend_decode(q: Tensor, k: Tensor, v: Tensor, last: Tensor | None = None) -> Tensor:
    """Attention of one query per row: q [B, H, 1, D], k and v [B, G, S, D] (strided but in D) → [B, H, 1, D].

    last [B] int64: index of the last key that row b may see (-1: none, gives zeros); None: all S.
    D must be a multiple of 16, at most 256.
    """
    b, h, _, d = q.shape
    g, s = k.shape[1], k.shape[2]
    out = torch.empty(b, h, 1, d, dtype=q.dtype)
    strides = (_SIZE * 8)(q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3])
    pointers = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
    seen = None if last is None else last.data_ptr()
    bf16 = q.dtype == torch.bfloat16
    _checked(_functions().attend_decode(*pointers, seen, ctypes.addressof(strides), b, h, g, s, d, bf16))
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of x [..., C] times weight [C]."""
    x = x.contiguous()
    out = torch.empty_like(x)
    c = x.shape[-1]
    _functions().rms_norm(
        x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // c, c, eps, x.dtype == torch.bfloat16
    )
    return out


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, elementwise on contiguous tensors of one shape."""
    out = torch.empty_like(gate)
    bf16 = gate.dtype == torch.bfloat16
    _functions().silu_times(gate.data_ptr(), up.data_ptr(), out.data_ptr(), gate.numel(), bf16)
    return out


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Contiguous x [B, T, H, D] turned by cosines and sines [B or 1, T, D]; D a multiple of 32."""
    b, t, h, d = x.shape
    out = torch.empty_like(x)
    cosines, sines = (table.expand(b, -1, -1).contiguous() for table in (cosines, sines))
    pointers = x.data_ptr(), cosines.data_ptr(), sines.data_ptr(), out.data_ptr()
    _functions().rotate(*pointers, b * t, h, d, x.dtype == torch.bfloat16)
    return out


def _rows(x: Tensor, n: int, k: int) -> tuple[Tensor, Tensor, int]:
    x = x.contiguous()
    return x, torch.empty(*x.shape[:-1], n, dtype=x.dtype), x.numel() // k


def _typed(x: Tensor) -> tuple[int, bool]:
    return x.data_ptr(), x.dtype == torch.bfloat16


def _checked(failed: int) -> None:
    if failed:
        raise MemoryError("no memory left for the scratch space of a CPU kernel")
