"""What the Triton kernels share: which tiles of queries and keys meet, and which pairs within a tile.

Needs the `triton` package: imported only by the backends that run it. With TRITON_INTERPRET=1 in the
environment before the import, the kernels run on CPU tensors, for tests.

Axes: B batch, T query positions, S key positions, D head dim, M rows of a query tile, N rows of a key tile.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
# Positions per entry of the table of document spans; every tile is a multiple of it.
GRANULE = 16 if INTERPRETED else 64
SPAN_FIELDS = 5  # of one entry: first, uniform_from, last, uniform_to, prefix_end
HEAD_DIMS = (64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_EMULATED = tl.constexpr(INTERPRETED)
_SPAN_FIELDS = tl.constexpr(SPAN_FIELDS)


@triton.jit
def round_to(x: tl.tensor, TYPE: tl.constexpr) -> Any:
    """fp32 tile x in another element type, rounded to nearest even."""
    if _EMULATED and tl.bfloat16 == TYPE:
        # The interpreter truncates; the hardware rounds.
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(TYPE)


@triton.jit
def bound(x: tl.tensor) -> Any:
    """x as the limit of a loop."""
    if _EMULATED:  # numpy ≥ 2.4 no longer lets the interpreter read its one-element arrays as integers
        return x if isinstance(x, int) else int(x.handle.data.item())
    else:
        return x


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor) -> Any:
    """acc + a·b in fp32, or a·b where acc is None; fp32 operands are multiplied as fp32, not TF32."""
    if _EMULATED:  # the interpreter would multiply the bit patterns of bf16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_tile(
    pointer: tl.tensor,
    rows: tl.tensor,
    stride: tl.tensor,
    n_rows: tl.tensor,
    D: tl.constexpr,
    MASKED: tl.constexpr,
) -> Any:
    """Rows of a [*, D] matrix; with MASKED, rows from n_rows on are zeros."""
    # 64-bit: one head of a long cache can span more than 2^31 elements.
    pointers = pointer + rows.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    if MASKED:
        return tl.load(pointers, mask=rows[:, None] < n_rows, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_documents(documents: tl.tensor, positions: tl.tensor, n_positions: tl.tensor) -> Any:
    """Document numbers at `positions` of one row; zeros where there are no documents."""
    if documents is None:
        return positions * 0
    else:
        return tl.load(documents + positions, mask=positions < n_positions, other=-1)


@triton.jit
def visible_pairs(
    query: tl.tensor,
    key: tl.tensor,
    query_document: tl.tensor,
    key_document: tl.tensor,
    offset: tl.tensor,
    visible: tl.tensor,
    visible_t: tl.tensor,
    visible_s: tl.tensor,
    n_queries: tl.tensor,
    n_keys: tl.tensor,
    CAUSAL: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    SHARED: tl.constexpr,
) -> Any:
    """Which pairs of a tile attend; query and key are index tiles that broadcast."""
    seen = (query < n_queries) & (key < n_keys)
    if CAUSAL:
        seen = seen & (key <= query + offset)
    if DOCUMENTS:
        same = query_document == key_document
        if SHARED:
            same = same | (key_document == 0)
        seen = seen & same
    if visible is not None:
        place = visible + query.to(tl.int64) * visible_t + key.to(tl.int64) * visible_s
        seen = seen & (tl.load(place, mask=seen, other=0) != 0)
    return seen


@triton.jit
def span_field(
    spans: tl.tensor,
    first: tl.tensor,
    field: tl.constexpr,
    n_positions: tl.tensor,
    GRANULE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> Any:
    """One field of the span table for the positions of a tile, before they are reduced to one number."""
    entries = first // GRANULE + tl.arange(0, BLOCK // GRANULE)
    # A tile may reach past the end of the text: there its last entry stands in.
    entries = tl.minimum(entries, tl.cdiv(n_positions, GRANULE) - 1)
    return tl.load(spans + entries * _SPAN_FIELDS + field)


@triton.jit
def key_span(
    spans: tl.tensor,
    first: tl.tensor,
    offset: tl.tensor,
    n_queries: tl.tensor,
    n_keys: tl.tensor,
    CAUSAL: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    VISIBLE: tl.constexpr,
    GRANULE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> Any:
    """Which keys the queries first .. first + BLOCK_M meet.

    Returns prefix_end, begin, full_begin, full_end, end: keys 0 .. prefix_end and begin .. end may be seen,
    and those in full_begin .. full_end are seen by every query. All but `end` are multiples of BLOCK_N.
    """
    end = n_keys
    full_end = n_keys
    if CAUSAL:
        end = tl.minimum(n_keys, offset + tl.minimum(first + BLOCK_M, n_queries))
        full_end = tl.minimum(n_keys, offset + first + 1)
    full_end = full_end // BLOCK_N * BLOCK_N
    prefix_end = 0
    begin = 0
    full_begin = 0
    if VISIBLE:
        full_end = 0
    if DOCUMENTS:
        begin = tl.min(span_field(spans, first, 0, n_queries, GRANULE, BLOCK_M), 0) // BLOCK_N * BLOCK_N
        uniform_from = tl.max(span_field(spans, first, 1, n_queries, GRANULE, BLOCK_M), 0)
        full_begin = tl.minimum(tl.cdiv(uniform_from, BLOCK_N) * BLOCK_N, full_end)
        full_begin = tl.maximum(full_begin, begin)
        prefix_end = tl.max(span_field(spans, first, 4, n_queries, GRANULE, BLOCK_M), 0)
        prefix_end = tl.minimum(tl.cdiv(prefix_end, BLOCK_N) * BLOCK_N, begin)
    return prefix_end, begin, full_begin, full_end, end


@triton.jit
def query_span(
    spans: tl.tensor,
    first: tl.tensor,
    offset: tl.tensor,
    n_queries: tl.tensor,
    CAUSAL: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    VISIBLE: tl.constexpr,
    GRANULE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> Any:
    """Which queries see any of the keys first .. first + BLOCK_N: begin, full_begin, full_end, end.

    As `key_span`, with the parts exchanged; queries in full_begin .. full_end see all of these keys.
    """
    begin = 0
    full_begin = 0
    end = n_queries
    full_end = n_queries // BLOCK_M * BLOCK_M
    if CAUSAL:
        begin = tl.maximum(first - offset, 0) // BLOCK_M * BLOCK_M
        full_begin = tl.cdiv(tl.maximum(first + BLOCK_N - 1 - offset, 0), BLOCK_M) * BLOCK_M
    if DOCUMENTS:
        end = tl.max(span_field(spans, first, 2, n_queries, GRANULE, BLOCK_N), 0)
        uniform_to = tl.min(span_field(spans, first, 3, n_queries, GRANULE, BLOCK_N), 0)
        full_end = tl.minimum(full_end, uniform_to // BLOCK_M * BLOCK_M)
    if VISIBLE:
        full_end = 0
    full_begin = tl.minimum(full_begin, tl.cdiv(end, BLOCK_M) * BLOCK_M)
    full_begin = tl.maximum(full_begin, begin)
    full_end = tl.maximum(full_end, full_begin)
    return begin, full_begin, full_end, end


@triton.jit(do_not_specialize=["n_positions"])
def document_spans_kernel(
    documents: tl.tensor,
    spans: tl.tensor,
    n_positions: tl.tensor,
    SHARED: tl.constexpr,
    GRANULE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One entry of the span table; program (granule, row). Ranges are kept tight where numbers ascend."""
    granule = tl.program_id(0)
    n_granules = tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    start = granule * GRANULE
    stop = tl.minimum(start + GRANULE, n_positions)
    own_positions = tl.minimum(start + tl.arange(0, GRANULE), n_positions - 1)
    own = tl.load(documents + row * n_positions + own_positions)
    low = tl.min(own, 0)
    high = tl.max(own, 0)
    first = n_positions
    last = 0
    uniform_from = 0
    uniform_to = n_positions
    prefix_end = 0
    for chunk in range(0, bound(n_positions), BLOCK):
        position = chunk + tl.arange(0, BLOCK)
        inside = position < n_positions
        other = tl.load(documents + row * n_positions + position, mask=inside, other=0)
        near = inside & (other >= low) & (other <= high)
        strange = inside & ((other != low) | (low != high))
        first = tl.minimum(first, tl.min(tl.where(near, position, n_positions), 0))
        last = tl.maximum(last, tl.max(tl.where(near, position + 1, 0), 0))
        # A shared document 0 is seen by these queries, but as queries it is strange to these keys.
        foreign = strange & (other != 0) if SHARED else strange
        before = foreign & (position < start)
        uniform_from = tl.maximum(uniform_from, tl.max(tl.where(before, position + 1, 0), 0))
        after = strange & (position >= stop)
        uniform_to = tl.minimum(uniform_to, tl.min(tl.where(after, position, n_positions), 0))
        if SHARED:
            zero = inside & (other == 0)
            prefix_end = tl.maximum(prefix_end, tl.max(tl.where(zero, position + 1, 0), 0))
    uniform_from = tl.where(low == high, uniform_from, stop)
    uniform_to = tl.where(low == high, uniform_to, start)
    if SHARED:
        last = tl.where((low <= 0) & (high >= 0), n_positions, last)
        uniform_to = tl.where((low == 0) & (high == 0), n_positions, uniform_to)
    entry = spans + (row * n_granules + granule) * _SPAN_FIELDS
    tl.store(entry, first)
    tl.store(entry + 1, uniform_from)
    tl.store(entry + 2, last)
    tl.store(entry + 3, uniform_to)
    tl.store(entry + 4, prefix_end)


def document_spans(documents: Tensor, shared_prefix: bool) -> Tensor:
    """Table int32 [B, ceil(T / GRANULE), 5] of the spans that each granule of positions meets.

    Computed on the device without waiting for it. documents [B, T] contiguous, any integers. Per entry:
    first and last + 1 position of its documents; from where before it, and to where after it, all
    positions belong to its only document; the end of document 0 (0 without a shared prefix).
    """
    b, t = documents.shape
    granules = triton.cdiv(t, GRANULE)
    spans = torch.empty(b, granules, SPAN_FIELDS, dtype=torch.int32, device=documents.device)
    document_spans_kernel[(granules, b)](
        documents, spans, t, SHARED=shared_prefix, GRANULE=GRANULE, BLOCK=64 if INTERPRETED else 1024
    )
    return spans
