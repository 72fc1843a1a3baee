"""FlashAttention-2 backward in Triton, without atomics: the same inputs give the same bits.

One kernel walks the queries of a key tile, all heads of the group in turn, and so sums dK and dV where
they are; the other walks the keys of a query tile for dQ. Source: arXiv 2307.08691.
Axes: B batch, H query heads, G key/value heads, T query positions, S key positions, D head dim,
M rows of a query tile, N rows of a key tile.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from core_llm.kernels.triton_forward import LOG2_E, visible_strides
from core_llm.kernels.triton_tiles import (
    GRANULE,
    INTERPRETED,
    SPAN_FIELDS,
    bound,
    dot,
    key_span,
    load_documents,
    load_tile,
    query_span,
    round_to,
    visible_pairs,
)
from core_llm.kernels.triton_tuning import configs, keep_fitting, length_class, on_device

_SPAN_FIELDS = tl.constexpr(SPAN_FIELDS)
_LOG2_E = tl.constexpr(LOG2_E)
_DELTA_ROWS = 16 if INTERPRETED else 64


@triton.jit
def delta_kernel(
    out: tl.tensor, grad_out: tl.tensor, delta: tl.tensor, out_b: tl.tensor, out_h: tl.tensor,
    out_t: tl.tensor, grad_b: tl.tensor, grad_h: tl.tensor, grad_t: tl.tensor, n_heads: tl.tensor,
    n_queries: tl.tensor, D: tl.constexpr, BLOCK_M: tl.constexpr,
) -> None:  # fmt: skip
    """delta [B, H, T] = Σ_D out · grad_out, which the softmax takes off every score's gradient."""
    n_tiles = tl.cdiv(n_queries, BLOCK_M)
    query = tl.program_id(0) % n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    head = (tl.program_id(0) // n_tiles % n_heads).to(tl.int64)
    row = (tl.program_id(0) // n_tiles // n_heads).to(tl.int64)
    a = load_tile(out + row * out_b + head * out_h, query, out_t, n_queries, D, True)
    b = load_tile(grad_out + row * grad_b + head * grad_h, query, grad_t, n_queries, D, True)
    total = tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    tl.store(delta + (row * n_heads + head) * n_queries + query, total, mask=query < n_queries)


@triton.jit
def gather_queries(
    dk: tl.tensor, dv: tl.tensor, k_tile: tl.tensor, v_tile: tl.tensor, q: tl.tensor, grad_out: tl.tensor,
    lse: tl.tensor, delta: tl.tensor, q_h: tl.tensor, q_t: tl.tensor, grad_h: tl.tensor, grad_t: tl.tensor,
    group: tl.tensor, begin: tl.tensor, end: tl.tensor, scale: tl.tensor, key: tl.tensor,
    key_document: tl.tensor, offset: tl.tensor, documents: tl.tensor, visible: tl.tensor,
    visible_t: tl.tensor, visible_s: tl.tensor, n_queries: tl.tensor, n_keys: tl.tensor, D: tl.constexpr,
    CAUSAL: tl.constexpr, SHARED: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr,
) -> Any:  # fmt: skip
    """Adds to dk and dv [N, D] what the queries begin .. end of every head of the group give.

    One loop over heads and tiles: nested ones, repeated for each part of the queries, spill registers.
    """
    n_tiles = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_M)
    for step in tl.range(0, bound(group * n_tiles)):
        member = (step // n_tiles).to(tl.int64)
        query = begin + step % n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        q_tile = load_tile(q + member * q_h, query, q_t, n_queries, D, MASKED)
        statistics = member * n_queries + query
        if MASKED:
            norm = tl.load(lse + statistics, mask=query < n_queries, other=float("inf"))
            drop = tl.load(delta + statistics, mask=query < n_queries, other=0.0)
        else:
            norm = tl.load(lse + statistics)
            drop = tl.load(delta + statistics)
        scores = dot(k_tile, tl.trans(q_tile), None)
        weights = tl.exp2(scores * scale - norm[None, :])
        if MASKED:
            query_document = load_documents(documents, query, n_queries)
            seen = visible_pairs(
                query[None, :], key[:, None], query_document[None, :], key_document[:, None], offset,
                visible, visible_t, visible_s, n_queries, n_keys, CAUSAL, documents is not None, SHARED,
            )  # fmt: skip
            weights = tl.where(seen, weights, 0.0)
        grad_tile = load_tile(grad_out + member * grad_h, query, grad_t, n_queries, D, MASKED)
        dv = dot(round_to(weights, grad_tile.dtype), grad_tile, dv)
        grad_scores = weights * (dot(v_tile, tl.trans(grad_tile), None) - drop[None, :])
        dk = dot(round_to(grad_scores, q_tile.dtype), q_tile, dk)
    return dk, dv


@triton.autotune(
    configs=configs("keys"),
    key=["HEAD_DIM", "CAUSAL", "SHARED", "length_class"],
    prune_configs_by={"early_config_prune": keep_fitting("keys")},
)
@triton.jit(do_not_specialize=["length_class"])
def key_gradient_kernel(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, grad_out: tl.tensor, lse: tl.tensor, delta: tl.tensor,
    dk: tl.tensor, dv: tl.tensor, offsets: tl.tensor, documents: tl.tensor, spans: tl.tensor,
    visible: tl.tensor, scale: tl.tensor, q_b: tl.tensor, q_h: tl.tensor, q_t: tl.tensor, k_b: tl.tensor,
    k_g: tl.tensor, k_s: tl.tensor, v_b: tl.tensor, v_g: tl.tensor, v_s: tl.tensor, grad_b: tl.tensor,
    grad_h: tl.tensor, grad_t: tl.tensor, dk_b: tl.tensor, dk_g: tl.tensor, dk_s: tl.tensor,
    visible_b: tl.tensor, visible_t: tl.tensor, visible_s: tl.tensor, n_heads: tl.tensor, group: tl.tensor,
    n_queries: tl.tensor, n_keys: tl.tensor, length_class: tl.tensor, HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr, SHARED: tl.constexpr, GRANULE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """dk and dv of one key tile of one group (both laid out alike); `scale` is in base 2."""
    n_tiles = tl.cdiv(n_keys, BLOCK_N)
    first = tl.program_id(0) % n_tiles * BLOCK_N
    n_groups = n_heads // group
    own = (tl.program_id(0) // n_tiles % n_groups).to(tl.int64)
    row = (tl.program_id(0) // n_tiles // n_groups).to(tl.int64)
    offset = 0
    if offsets is not None:
        offset = tl.load(offsets + row).to(tl.int32)
    if documents is not None:
        documents = documents + row * n_queries
        spans = spans + row * tl.cdiv(n_queries, GRANULE) * _SPAN_FIELDS
    if visible is not None:
        visible = visible + row * visible_b
    key = first + tl.arange(0, BLOCK_N)
    key_document = load_documents(documents, key, n_keys)
    k_tile = load_tile(k + row * k_b + own * k_g, key, k_s, n_keys, HEAD_DIM, True)
    v_tile = load_tile(v + row * v_b + own * v_g, key, v_s, n_keys, HEAD_DIM, True)
    dk_tile = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    begin, full_begin, full_end, end = query_span(
        spans, first, offset, n_queries, CAUSAL, documents is not None, visible is not None, GRANULE,
        BLOCK_M, BLOCK_N,
    )  # fmt: skip
    head = own * group
    statistics = (row * n_heads + head) * n_queries
    for part in tl.static_range(3):
        low, high = (begin, full_begin) if part == 0 else (full_begin, full_end)
        if part == 2:
            low, high = full_end, end
        dk_tile, dv_tile = gather_queries(
            dk_tile, dv_tile, k_tile, v_tile, q + row * q_b + head * q_h,
            grad_out + row * grad_b + head * grad_h, lse + statistics, delta + statistics, q_h, q_t,
            grad_h, grad_t, group, low, high, scale, key, key_document, offset, documents, visible,
            visible_t, visible_s, n_queries, n_keys, HEAD_DIM, CAUSAL, SHARED, part != 1, BLOCK_M,
        )  # fmt: skip
    place = row * dk_b + own * dk_g + key.to(tl.int64)[:, None] * dk_s + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(dk + place, round_to(dk_tile * (scale / _LOG2_E), k_tile.dtype), mask=key[:, None] < n_keys)
    tl.store(dv + place, round_to(dv_tile, k_tile.dtype), mask=key[:, None] < n_keys)


@triton.jit
def gather_keys(
    dq: tl.tensor, q_tile: tl.tensor, grad_tile: tl.tensor, norm: tl.tensor, drop: tl.tensor, k: tl.tensor,
    v: tl.tensor, k_s: tl.tensor, v_s: tl.tensor, begin: tl.tensor, end: tl.tensor, scale: tl.tensor,
    query: tl.tensor, query_document: tl.tensor, offset: tl.tensor, documents: tl.tensor, visible: tl.tensor,
    visible_t: tl.tensor, visible_s: tl.tensor, n_queries: tl.tensor, n_keys: tl.tensor, D: tl.constexpr,
    CAUSAL: tl.constexpr, SHARED: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
) -> Any:  # fmt: skip
    """Adds to dq [M, D] what the keys begin .. end give."""
    for start in tl.range(bound(begin), bound(end), BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k_tile = load_tile(k, key, k_s, end, D, MASKED)
        v_tile = load_tile(v, key, v_s, end, D, MASKED)
        weights = tl.exp2(dot(q_tile, tl.trans(k_tile), None) * scale - norm[:, None])
        if MASKED:
            key_document = load_documents(documents, key, n_keys)
            seen = visible_pairs(
                query[:, None], key[None, :], query_document[:, None], key_document[None, :], offset,
                visible, visible_t, visible_s, n_queries, n_keys, CAUSAL, documents is not None, SHARED,
            )  # fmt: skip
            weights = tl.where(seen, weights, 0.0)
        grad_scores = weights * (dot(grad_tile, tl.trans(v_tile), None) - drop[:, None])
        dq = dot(round_to(grad_scores, k_tile.dtype), k_tile, dq)
    return dq


@triton.autotune(
    configs=configs("queries"),
    key=["HEAD_DIM", "CAUSAL", "SHARED", "length_class"],
    prune_configs_by={"early_config_prune": keep_fitting("queries")},
)
@triton.jit(do_not_specialize=["length_class"])
def query_gradient_kernel(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, grad_out: tl.tensor, lse: tl.tensor, delta: tl.tensor,
    dq: tl.tensor, offsets: tl.tensor, documents: tl.tensor, spans: tl.tensor, visible: tl.tensor,
    scale: tl.tensor, q_b: tl.tensor, q_h: tl.tensor, q_t: tl.tensor, k_b: tl.tensor, k_g: tl.tensor,
    k_s: tl.tensor, v_b: tl.tensor, v_g: tl.tensor, v_s: tl.tensor, grad_b: tl.tensor, grad_h: tl.tensor,
    grad_t: tl.tensor, dq_b: tl.tensor, dq_h: tl.tensor, dq_t: tl.tensor, visible_b: tl.tensor,
    visible_t: tl.tensor, visible_s: tl.tensor, n_heads: tl.tensor, group: tl.tensor, n_queries: tl.tensor,
    n_keys: tl.tensor, length_class: tl.tensor, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr,
    SHARED: tl.constexpr, GRANULE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """dq of one query tile of one head; walks the keys as the forward kernel does."""
    n_tiles = tl.cdiv(n_queries, BLOCK_M)
    first = (n_tiles - 1 - tl.program_id(0) % n_tiles) * BLOCK_M
    head = (tl.program_id(0) // n_tiles % n_heads).to(tl.int64)
    row = (tl.program_id(0) // n_tiles // n_heads).to(tl.int64)
    k = k + row * k_b + head // group * k_g
    v = v + row * v_b + head // group * v_g
    offset = 0
    if offsets is not None:
        offset = tl.load(offsets + row).to(tl.int32)
    if documents is not None:
        documents = documents + row * n_queries
        spans = spans + row * tl.cdiv(n_queries, GRANULE) * _SPAN_FIELDS
    if visible is not None:
        visible = visible + row * visible_b
    query = first + tl.arange(0, BLOCK_M)
    query_document = load_documents(documents, query, n_queries)
    q_tile = load_tile(q + row * q_b + head * q_h, query, q_t, n_queries, HEAD_DIM, True)
    grad_tile = load_tile(grad_out + row * grad_b + head * grad_h, query, grad_t, n_queries, HEAD_DIM, True)
    statistics = (row * n_heads + head) * n_queries + query
    norm = tl.load(lse + statistics, mask=query < n_queries, other=float("inf"))
    drop = tl.load(delta + statistics, mask=query < n_queries, other=0.0)
    dq_tile = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    prefix_end, begin, full_begin, full_end, end = key_span(
        spans, first, offset, n_queries, n_keys, CAUSAL, documents is not None, visible is not None, GRANULE,
        BLOCK_M, BLOCK_N,
    )  # fmt: skip
    for part in tl.static_range(4):
        low, high = (0, prefix_end) if part == 0 else (begin, full_begin)
        if part >= 2:
            low, high = (full_begin, full_end) if part == 2 else (full_end, end)
        dq_tile = gather_keys(
            dq_tile, q_tile, grad_tile, norm, drop, k, v, k_s, v_s, low, high, scale, query, query_document,
            offset, documents, visible, visible_t, visible_s, n_queries, n_keys, HEAD_DIM, CAUSAL, SHARED,
            part != 2, BLOCK_N,
        )  # fmt: skip
    rows = dq + row * dq_b + head * dq_h + query.to(tl.int64)[:, None] * dq_t
    pointers = rows + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(pointers, round_to(dq_tile * (scale / _LOG2_E), q_tile.dtype), mask=query[:, None] < n_queries)


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor | None,
    documents: Tensor | None,
    spans: Tensor | None,
    visible: Tensor | None,
    causal: bool,
    shared_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of `out`; the other arguments as `forward` has them."""
    b, h, t, d = q.shape
    g, s = k.shape[1], k.shape[2]
    dq = torch.empty(b, t, h, d, dtype=q.dtype, device=q.device).transpose(1, 2)
    dk = torch.empty(b, s, g, d, dtype=k.dtype, device=k.device).transpose(1, 2)
    dv = torch.empty(b, s, g, d, dtype=v.dtype, device=v.device).transpose(1, 2)
    delta = torch.empty_like(lse)
    mask = offsets, documents, spans, visible
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3]
    sizes = *visible_strides(visible), h, h // g, t, s, length_class(t, s)
    constants = {"HEAD_DIM": d, "CAUSAL": causal, "SHARED": shared_prefix, "GRANULE": GRANULE}
    scale = LOG2_E / d**0.5
    with on_device(q):
        delta_kernel[(triton.cdiv(t, _DELTA_ROWS) * b * h,)](
            out, grad_out, delta, *out.stride()[:3], *grad_out.stride()[:3], h, t, D=d, BLOCK_M=_DELTA_ROWS
        )
        key_gradient_kernel[lambda meta: (triton.cdiv(s, meta["BLOCK_N"]) * b * g,)](
            q, k, v, grad_out, lse, delta, dk, dv, *mask, scale,
            *strides, *dk.stride()[:3], *sizes, **constants,
        )  # fmt: skip
        query_gradient_kernel[lambda meta: (triton.cdiv(t, meta["BLOCK_M"]) * b * h,)](
            q, k, v, grad_out, lse, delta, dq, *mask, scale,
            *strides, *dq.stride()[:3], *sizes, **constants,
        )  # fmt: skip
    return dq, dk, dv
