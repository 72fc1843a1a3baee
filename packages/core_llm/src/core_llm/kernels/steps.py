"""The other steps of a block behind one function each: what computes them is decided here.

On a CPU the own kernels serve weights without gradients and few rows, which is decoding: bf16, and large ones
of fp32. Everything else is torch's.
Axes: B batch, T positions, C model width, H heads, D head dim, N outputs, K inputs.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from core_llm.kernels.cpu import ops

KERNEL_ROWS = 4  # more rows than these are a matrix product, which torch's libraries do better
FP32_ELEMENTS = 1 << 18  # of a weight: a smaller one stays in the cache, where torch's product is as fast
UPCAST_ELEMENTS = 1 << 20  # weights widened to fp32 at a time: 4 MB, about a core's cache


@functools.cache
def multiplies_bf16(device_type: str) -> bool:
    """Whether the device multiplies bf16 matrices itself; emulation took a CPU 13 times as long as fp32."""
    if device_type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return True


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] times weight [N, K] transposed: [..., N]."""
    if not ops.usable(x, weight) or not weight.is_contiguous():
        return F.linear(x, weight)
    few = x.numel() <= KERNEL_ROWS * x.shape[-1] and x.shape[-1] % 32 == 0
    if weight.dtype == torch.float32:
        large = weight.numel() >= FP32_ELEMENTS
        return ops.linear_f32(x, weight) if few and large else F.linear(x, weight)
    if few:
        return ops.linear_bf16(x, weight)
    return F.linear(x, weight) if multiplies_bf16("cpu") else _linear_upcast(x, weight)


def _linear_upcast(x: Tensor, weight: Tensor) -> Tensor:
    """The product in fp32, a slice of the outputs at a time: no fp32 copy of the weight is ever held."""
    n, k = weight.shape
    wide = x.float()
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype)
    for part, into in zip(
        weight.split(max(1, UPCAST_ELEMENTS // k)), out.split(max(1, UPCAST_ELEMENTS // k), -1), strict=True
    ):
        into.copy_(F.linear(wide, part.float()))
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (arXiv 1910.07467) of x [..., C] times weight [C], statistics in fp32."""
    if _few(x) and x.shape[-1] % 16 == 0 and ops.usable(x, weight):
        return ops.rms_norm(x, weight, eps)
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up (arXiv 2002.05202), elementwise."""
    if _few(gate) and gate.shape[-1] % 16 == 0 and ops.usable(gate, up):
        return ops.silu_times(gate, up)
    return F.silu(gate) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [B, H, T, D] by the cosines and sines [B or 1, 1, T, D] of its positions.

    Half-split layout: channel d turns with d + D/2.
    """
    rows = x.transpose(1, 2)
    if (
        x.dtype == torch.bfloat16
        and rows.shape[0] * rows.shape[1] <= KERNEL_ROWS
        and x.shape[-1] % 32 == 0
        and rows.is_contiguous()
        and ops.usable(x, cos, sin)
    ):
        return ops.rotate(rows, cos[:, 0], sin[:, 0]).transpose(1, 2)
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


def _few(x: Tensor) -> bool:
    """bf16 of at most KERNEL_ROWS rows."""
    return x.dtype == torch.bfloat16 and x.numel() <= KERNEL_ROWS * x.shape[-1]
