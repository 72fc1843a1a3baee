"""Attention backends behind one function.

Axes: B batch, H query heads, G key/value heads, R = H / G, T query positions, S key positions, D head dim.
"""

import importlib.util
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from core_llm.errors import UserError
from core_llm.kernels.cpu import ops
from core_llm.kernels.mask import Mask

# What the Triton kernels take. Their modules import triton, so nothing here imports them before use.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_TRITON_HEAD_DIMS = (64, 128)
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DECODE_QUERIES, _DECODE_ROWS = 16, 64  # T, and the R·T rows of one tile
# On a CPU, documents are looped over in texts longer than the first, where they are longer than the second
# on average.
_LOOP_TEXT, _LOOP_DOCUMENT = 512, 32


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """The formula itself, in the dtype of its inputs (give float64 to check another backend)."""
    b, h, t, d = q.shape
    g, s = k.shape[1], k.shape[2]
    grouped = q.reshape(b, g, h // g, t, d)
    scores = torch.einsum("bgrtd,bgsd->bgrts", grouped, k) / d**0.5
    visible = mask.dense(t, s, q.device)
    if visible is None:
        weights = scores.softmax(dim=-1)
    else:
        visible = visible[:, None, None]
        seen = visible.any(dim=-1, keepdim=True)
        # Softmax over nothing but -inf is NaN, and so is its gradient: a query that sees nothing keeps its
        # scores, and its weights are then zero by definition.
        weights = scores.masked_fill(~visible & seen, float("-inf")).softmax(dim=-1) * seen
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


def documents(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """One document of a packed text after the other, each merely causal; forward and backward.

    Raises ValueError for another mask and where a document has a gap. Reads the documents on the host.
    """
    lengths = _document_lengths(mask)
    if lengths is None:
        raise ValueError(
            "backend 'documents' takes a packed mask without a shared prefix whose documents are each in one "
            "piece; choose backend 'sdpa'"
        )
    rows = []
    # split, not slices: its backward joins the parts once, where each slice's would fill a whole tensor.
    for *row, parts in zip(q.split(1), k.split(1), v.split(1), lengths):
        pieces = zip(*(x.split(parts, dim=2) for x in row))
        rows.append(torch.cat([attend(a, b, c, Mask.causal()) for a, b, c in pieces], dim=2))
    return torch.cat(rows)


def _document_lengths(mask: Mask) -> list[list[int]] | None:
    """Lengths of the documents of each row; None where they cannot be taken one by one."""
    if mask.documents is None or mask.shared_prefix:
        return None
    lengths = []
    for row in mask.documents:
        numbers, counts = torch.unique_consecutive(row, return_counts=True)
        if len(numbers.unique()) < len(numbers):
            return None
        lengths.append(counts.tolist())
    return lengths


def prefill_in_triton(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """FlashAttention-2 in Triton: every mask, forward and backward (`triton_prefill.prefill`)."""
    _check_triton("triton", q, k, v)
    from core_llm.kernels.triton_prefill import prefill

    return prefill(q, k, v, mask)


def decode_in_triton(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Few queries over a long cache in Triton, the keys split among programs (`triton_decode.decode`)."""
    _check_triton("triton_decode", q, k, v)
    if not _decodes_in_triton(q, k, v, mask):
        raise ValueError(
            f"backend 'triton_decode' takes at most {_DECODE_QUERIES} queries, {_DECODE_ROWS} queries times "
            "heads per group, a full, causal or cached mask, and no gradients; choose backend 'triton'"
        )
    from core_llm.kernels.triton_decode import decode

    return decode(q, k, v, mask)


def _check_triton(backend: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    if not _HAS_TRITON:
        raise UserError(f"backend '{backend}' needs the package triton, which is not installed; use 'sdpa'")
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(f"backend '{backend}' needs tensors on a GPU, these are on '{q.device}'; use 'sdpa'")
    if not _fits_triton(q, k, v):
        raise ValueError(
            f"backend '{backend}' takes head dims {_TRITON_HEAD_DIMS} in fp32, bf16 or fp16, one dtype for "
            f"all, and at least one key; got {q.dtype}, {k.dtype}, {v.dtype} with head dim {q.shape[3]}, "
            f"{q.shape[2]} queries and {k.shape[2]} keys"
        )


def _fits_triton(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return (
        q.shape[3] in _TRITON_HEAD_DIMS
        and q.dtype in _TRITON_DTYPES
        and q.dtype == k.dtype == v.dtype
        and q.numel() > 0
        and k.shape[2] > 0
    )


def _decodes_in_triton(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> bool:
    graded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return (
        not graded
        and q.shape[2] <= _DECODE_QUERIES
        and q.shape[1] // k.shape[1] * q.shape[2] <= _DECODE_ROWS
        and mask.kind in ("full", "causal", "cached")
    )


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Mask], Tensor]] = {
    "reference": reference,
    "sdpa": sdpa,
    "folded": folded,
    "documents": documents,
    "cpu_decode": cpu_decode,
    "triton": prefill_in_triton,
    "triton_decode": decode_in_triton,
}


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, backend: str = "auto") -> Tensor:
    """Scaled dot-product attention with grouped K/V heads, scale 1/sqrt(D).

    q [B, H, T, D], k and v [B, G, S, D] with H a multiple of G; returns [B, H, T, D].
    A query that may see no key gives zeros. Raises ValueError for an unknown backend and for one that
    cannot take these tensors, UserError for one that this machine does not have.
    """
    if backend == "auto":
        backend = _choose_on_gpu(q, k, v, mask) if q.is_cuda else _choose_on_cpu(q, k, v, mask)
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend '{backend}'; known: auto, {', '.join(BACKENDS)}")
    return BACKENDS[backend](q, k, v, mask)


def _choose_on_gpu(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> str:
    """The backend for tensors on a GPU: the first line that fits.

    | case                                             | backend       | why                                 |
    |--------------------------------------------------|---------------|-------------------------------------|
    | no Triton kernel for it (dtype, D, device)       | sdpa          |                                     |
    | few queries, full, causal or cached, no gradient | triton_decode | reads only what is filled, split    |
    | packed documents                                 | triton        | skips other documents; SDPA takes   |
    | many queries behind a cache                      | triton        | a dense mask [B, T, S] in both      |
    | causal, full, keys, pairs                        | sdpa          | the vendor's kernels                |

    By reasoning, not by measurement: no GPU was at hand. `benchmarks/kernels.py` measures every line.
    """
    if not _HAS_TRITON or torch.cuda.get_device_capability(q.device) < (8, 0) or not _fits_triton(q, k, v):
        return "sdpa"
    if _decodes_in_triton(q, k, v, mask):
        return "triton_decode"
    return "triton" if mask.kind in ("packed", "cached") else "sdpa"


def _choose_on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> str:
    if _decodes_on_cpu(q, k, v, mask):
        return "cpu_decode"
    scores = q.shape[2] * k.shape[2]
    # Training: the fused kernel's backward is slow; its memory only matters for long texts.
    if torch.is_grad_enabled():
        if scores <= 512 * 512:
            return "folded"
    # Its forward has no bf16 products: plain ones take a picture's prefill (288 positions) from 54 to 48 ms.
    elif q.shape[2] == 1 or (q.dtype == torch.bfloat16 and mask.kind == "full" and scores <= 400 * 400):
        return "folded"
    if q.shape[2] > _LOOP_TEXT and not torch.compiler.is_compiling():
        lengths = _document_lengths(mask)
        if lengths is not None and sum(map(len, lengths)) * _LOOP_DOCUMENT <= q.shape[0] * q.shape[2]:
            return "documents"
    return "sdpa"
