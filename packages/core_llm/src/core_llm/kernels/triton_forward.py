"""FlashAttention-2 forward in Triton: grouped heads, causal, document and arbitrary masks.

Source: arXiv 2307.08691; scores are kept in base 2, so that exp2 needs no extra product.
Axes: B batch, H query heads, G key/value heads, T query positions, S key positions, D head dim,
M rows of a query tile, N rows of a key tile.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from core_llm.kernels.triton_tiles import (
    GRANULE,
    SPAN_FIELDS,
    bound,
    dot,
    key_span,
    load_documents,
    load_tile,
    round_to,
    visible_pairs,
)
from core_llm.kernels.triton_tuning import configs, keep_fitting, length_class, on_device

LOG2_E = 1.4426950408889634
_SPAN_FIELDS = tl.constexpr(SPAN_FIELDS)


@triton.jit
def attend_keys(
    acc: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    q_tile: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    k_s: tl.tensor,
    v_s: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    scale: tl.tensor,
    query: tl.tensor,
    query_document: tl.tensor,
    offset: tl.tensor,
    documents: tl.tensor,
    visible: tl.tensor,
    visible_t: tl.tensor,
    visible_s: tl.tensor,
    n_queries: tl.tensor,
    n_keys: tl.tensor,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    SHARED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> Any:
    """Online softmax over the keys begin .. end; acc [M, D], peak and total [M] in fp32, scores in base 2."""
    for start in tl.range(bound(begin), bound(end), BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        # Not even zero times what lies behind `end`: a cache may hold anything there.
        k_tile = load_tile(k, key, k_s, end, D, MASKED)
        scores = dot(q_tile, tl.trans(k_tile), None)
        if MASKED:
            key_document = load_documents(documents, key, n_keys)
            seen = visible_pairs(
                query[:, None], key[None, :], query_document[:, None], key_document[None, :], offset,
                visible, visible_t, visible_s, n_queries, n_keys, CAUSAL, documents is not None, SHARED,
            )  # fmt: skip
            scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
        base = new_peak
        if MASKED:  # a row that has seen nothing yet: -inf minus -inf would be NaN
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores * scale - base[:, None])
        decay = tl.exp2(peak - base)
        total = total * decay + tl.sum(weights, 1)
        v_tile = load_tile(v, key, v_s, end, D, MASKED)
        acc = dot(round_to(weights, v_tile.dtype), v_tile, acc * decay[:, None])
        peak = new_peak
    return acc, peak, total


@triton.autotune(
    configs=configs("forward"),
    key=["HEAD_DIM", "CAUSAL", "SHARED", "length_class"],
    prune_configs_by={"early_config_prune": keep_fitting("forward")},
)
@triton.jit(do_not_specialize=["length_class"])
def forward_kernel(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, out: tl.tensor, lse: tl.tensor, offsets: tl.tensor,
    documents: tl.tensor, spans: tl.tensor, visible: tl.tensor, scale: tl.tensor, q_b: tl.tensor,
    q_h: tl.tensor, q_t: tl.tensor, k_b: tl.tensor, k_g: tl.tensor, k_s: tl.tensor, v_b: tl.tensor,
    v_g: tl.tensor, v_s: tl.tensor, out_b: tl.tensor, out_h: tl.tensor, out_t: tl.tensor,
    visible_b: tl.tensor, visible_t: tl.tensor, visible_s: tl.tensor, n_heads: tl.tensor, group: tl.tensor,
    n_queries: tl.tensor, n_keys: tl.tensor, length_class: tl.tensor, HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr, SHARED: tl.constexpr, GRANULE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """One query tile of one head: out and, per row, the base-2 log of its softmax sum (inf: sees nothing)."""
    n_tiles = tl.cdiv(n_queries, BLOCK_M)
    # The last tiles of a causal mask meet the most keys: they start first.
    first = (n_tiles - 1 - tl.program_id(0) % n_tiles) * BLOCK_M
    row_head = tl.program_id(0) // n_tiles
    head = (row_head % n_heads).to(tl.int64)
    row = (row_head // n_heads).to(tl.int64)
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
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    prefix_end, begin, full_begin, full_end, end = key_span(
        spans, first, offset, n_queries, n_keys, CAUSAL, documents is not None, visible is not None, GRANULE,
        BLOCK_M, BLOCK_N,
    )  # fmt: skip
    for part in tl.static_range(4):
        if part == 0:
            low, high = 0, prefix_end
        elif part == 1:
            low, high = begin, full_begin
        elif part == 2:
            low, high = full_begin, full_end
        else:
            low, high = full_end, end
        acc, peak, total = attend_keys(
            acc, peak, total, q_tile, k, v, k_s, v_s, low, high, scale, query, query_document, offset,
            documents, visible, visible_t, visible_s, n_queries, n_keys, HEAD_DIM, CAUSAL, SHARED,
            part != 2, BLOCK_N,
        )  # fmt: skip
    empty = total == 0
    place = (row * n_heads + head) * n_queries + query
    tl.store(lse + place, tl.where(empty, float("inf"), peak + tl.log2(total)), mask=query < n_queries)
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    rows = out + row * out_b + head * out_h + query.to(tl.int64)[:, None] * out_t
    pointers = rows + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(pointers, round_to(acc, q_tile.dtype), mask=query[:, None] < n_queries)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | None,
    documents: Tensor | None,
    spans: Tensor | None,
    visible: Tensor | None,
    causal: bool,
    shared_prefix: bool,
) -> tuple[Tensor, Tensor]:
    """q [B, H, T, D], k and v [B, G, S, D] → out [B, H, T, D] and its statistics fp32 [B, H, T].

    offsets [B]; documents [B, T] contiguous with their `spans`; visible uint8 [B, T or 1, S].
    out is laid out as [B, T, H, D], so that joining the heads costs nothing.
    """
    b, h, t, d = q.shape
    g, s = k.shape[1], k.shape[2]
    out = torch.empty(b, t, h, d, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(b, h, t, dtype=torch.float32, device=q.device)
    with on_device(q):
        forward_kernel[lambda meta: (triton.cdiv(t, meta["BLOCK_M"]) * b * h,)](
            q, k, v, out, lse, offsets, documents, spans, visible, LOG2_E / d**0.5,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *visible_strides(visible),
            h, h // g, t, s, length_class(t, s),
            HEAD_DIM=d, CAUSAL=causal, SHARED=shared_prefix, GRANULE=GRANULE,
        )  # fmt: skip
    return out, lse


def visible_strides(visible: Tensor | None) -> tuple[int, int, int]:
    """Strides of a mask [B, T or 1, S] with which one row serves every query."""
    if visible is None:
        return 0, 0, 0
    return visible.stride(0), visible.stride(1) if visible.shape[1] > 1 else 0, visible.stride(2)
