"""Attention backends behind one function.

Axes: B batch, H query heads, G key/value heads, R = H / G, T query positions, S key positions, D head dim.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from core_llm.kernels.cpu import ops
from core_llm.kernels.mask import Mask


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """The formula itself, in the dtype of its inputs (give float64 to check another backend)."""
    b, h, t, d = q.shape
    g, s = k.shape[1], k.shape[2]
    grouped = q.reshape(b, g, h // g, t, d)
    scores = torch.einsum("bgrtd,bgsd->bgrts", grouped, k) / d**0.5
    visible = mask.dense(t, s, q.device)
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    # A query that sees nothing has only -inf: softmax gives NaN there, the definition says zero.
    weights = scores.softmax(dim=-1).nan_to_num(0.0)
    return torch.einsum("bgrts,bgsd->bgrtd", weights, v).reshape(b, h, t, d)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """torch's fused attention; K and V stay unexpanded."""
    t, s = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if mask.kind == "full" or (mask.kind == "causal" and t == s):
        return F.scaled_dot_product_attention(q, k, v, is_causal=mask.kind == "causal", enable_gqa=grouped)
    visible = mask.dense(t, s, q.device)
    assert visible is not None
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], enable_gqa=grouped)
    if mask.visible is None:
        return out  # causal kinds: each query sees at least itself
    seen = visible.any(dim=-1)[:, None, :, None]
    return torch.where(seen, out, torch.zeros((), dtype=out.dtype, device=out.device))


def folded(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Plain products in which the query heads of a group become rows, so each key is read once.

    On a CPU it is many times faster than the fused kernel for one query over thousands of keys in bf16,
    and 5 to 15 times faster backward.
    """
    b, h, t, d = q.shape
    g, s = k.shape[1], k.shape[2]
    rows = (q * d**-0.5).reshape(b, g, (h // g) * t, d)  # scaling q is cheaper than scaling the scores
    scores = torch.matmul(rows, k.transpose(2, 3))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    visible = mask.dense(t, s, q.device)
    if visible is None:
        return torch.matmul(scores.softmax(dim=-1).to(v.dtype), v).reshape(b, h, t, d)
    visible = visible[:, None, None]
    # A finite floor, not -inf: a query that sees nothing would have NaN gradients.
    floor = torch.finfo(scores.dtype).min
    weights = scores.reshape(b, g, h // g, t, s).masked_fill(~visible, floor).softmax(dim=-1)
    if mask.visible is not None:
        weights = weights * visible.any(dim=-1, keepdim=True)
    return torch.matmul(weights.to(v.dtype).reshape(b, g, -1, s), v).reshape(b, h, t, d)


def cpu_decode(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """The own C kernel for one query per row on a CPU; raises ValueError where it cannot serve."""
    if not _decodes_on_cpu(q, k, v, mask):
        raise ValueError(
            "backend 'cpu_decode' takes one query per row without gradients, fp32 or bf16 on the CPU, a "
            "head dim that is a multiple of 16, a full or cached mask, and needs a C compiler"
        )
    return ops.attend_decode(q, k, v, mask.offsets)


def _decodes_on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> bool:
    return (
        q.shape[2] == 1
        and q.shape[3] % 16 == 0
        and q.shape[3] <= ops.MAX_HEAD_DIM
        and mask.kind in ("full", "cached")
        and k.stride(3) == v.stride(3) == q.stride(3) == 1
        and ops.usable(q, k, v)
    )


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Mask], Tensor]] = {
    "reference": reference,
    "sdpa": sdpa,
    "folded": folded,
    "cpu_decode": cpu_decode,
}


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, backend: str = "auto") -> Tensor:
    """Scaled dot-product attention with grouped K/V heads, scale 1/sqrt(D).

    q [B, H, T, D], k and v [B, G, S, D] with H a multiple of G; returns [B, H, T, D].
    A query that may see no key gives zeros. Raises ValueError for an unknown backend.
    """
    if backend == "auto":
        # Training on a CPU: the fused kernel's backward is slow; its memory only matters for long texts.
        short = q.shape[2] * k.shape[2] <= 512 * 512 if torch.is_grad_enabled() else q.shape[2] == 1
        backend = "folded" if short and q.device.type == "cpu" else "sdpa"
        if _decodes_on_cpu(q, k, v, mask):
            backend = "cpu_decode"
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend '{backend}'; known: auto, {', '.join(BACKENDS)}")
    return BACKENDS[backend](q, k, v, mask)
