"""Attention of a few queries over a long cache on a GPU: the keys are split among programs, then merged.

All query heads of a group are rows of one tile, so each key and value is read once per group. Lengths are
read on the device: nothing waits for it, and a CUDA graph captures the call. Source: flash-decoding
(Dao et al. 2023, pytorch.org/blog/flash-decoding).

Axes: B batch, H query heads, G key/value heads, R = H / G, T query positions (1 to 16), S capacity of the
cache, D head dim, N rows of a key tile, P splits.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from core_llm.kernels.mask import Mask
from core_llm.kernels.triton_forward import LOG2_E, attend_keys
from core_llm.kernels.triton_prefill import dense_features
from core_llm.kernels.triton_tiles import INTERPRETED, bound, round_to
from core_llm.kernels.triton_tuning import on_device

# Two programs on each multiprocessor hide each other's waits, and one wave of them has no tail.
PROGRAMS_PER_PROCESSOR = 2
_KEYS = {64: 128, 128: 64}  # N by D: 16 KiB of bf16 keys, and as much of values, per pipeline stage
_STAGES, _WARPS = 3, 4
_MERGED = 16  # partial results that the merge reads at a time


@triton.jit
def split_kernel(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, partial: tl.tensor, lse: tl.tensor, offsets: tl.tensor,
    scale: tl.tensor, q_b: tl.tensor, q_h: tl.tensor, q_t: tl.tensor, k_b: tl.tensor, k_g: tl.tensor,
    k_s: tl.tensor, v_b: tl.tensor, v_g: tl.tensor, v_s: tl.tensor, n_groups: tl.tensor, group: tl.tensor,
    n_queries: tl.tensor, n_keys: tl.tensor, n_splits: tl.tensor, HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """One share of the keys of one group: partial [B, G, P, R·T, D] and lse [B, G, P, R·T], both fp32."""
    split = tl.program_id(0) % n_splits
    pair = (tl.program_id(0) // n_splits).to(tl.int64)
    own = pair % n_groups
    row = pair // n_groups
    index = tl.arange(0, ROWS)
    query = index % n_queries
    n_rows = group * n_queries
    offset = 0
    length = n_keys
    whole = n_keys
    if CAUSAL:
        if offsets is not None:
            offset = tl.load(offsets + row).to(tl.int32)
        length = tl.minimum(n_keys, offset + n_queries)
        whole = tl.minimum(n_keys, offset + 1)
    share = tl.cdiv(tl.cdiv(length, BLOCK_N), n_splits) * BLOCK_N
    begin = split * share
    end = tl.minimum(length, begin + share)
    full_end = tl.maximum(tl.minimum(whole // BLOCK_N * BLOCK_N, end), begin)
    q_row = own * group + index // n_queries
    place = row * q_b + q_row * q_h + query.to(tl.int64) * q_t
    pointers = q + place[:, None] + tl.arange(0, HEAD_DIM)[None, :]
    q_tile = tl.load(pointers, mask=index[:, None] < n_rows, other=0.0)
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    k = k + row * k_b + own * k_g
    v = v + row * v_b + own * v_g
    for part in tl.static_range(2):
        low, high = (begin, full_end) if part == 0 else (full_end, end)
        acc, peak, total = attend_keys(
            acc, peak, total, q_tile, k, v, k_s, v_s, low, high, scale, query, query, offset,
            None, None, 0, 0, n_queries, n_keys, HEAD_DIM, CAUSAL, False, part != 0, BLOCK_N,
        )  # fmt: skip
    statistics = (pair * n_splits + split) * n_rows + index
    stored = index < n_rows
    # A share without keys weighs nothing in the merge: -inf plus log2(0).
    tl.store(lse + statistics, peak + tl.log2(total), mask=stored)
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(
        partial + statistics[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :], acc, mask=stored[:, None]
    )


@triton.jit
def merge_kernel(
    partial: tl.tensor, lse: tl.tensor, out: tl.tensor, out_b: tl.tensor, out_h: tl.tensor, out_t: tl.tensor,
    n_groups: tl.tensor, group: tl.tensor, n_queries: tl.tensor, n_splits: tl.tensor, HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """One row of out [B, H, T, D]: its partial results, weighted by their softmax sums."""
    n_rows = group * n_queries
    index = tl.program_id(0) % n_rows
    pair = (tl.program_id(0) // n_rows).to(tl.int64)
    head = pair % n_groups * group + index // n_queries
    base = pair * n_splits * n_rows + index
    every = tl.arange(0, SPLITS)
    logs = tl.load(lse + base + every * n_rows, mask=every < n_splits, other=float("-inf"))
    peak = tl.max(logs, 0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp2(logs - peak), 0)
    acc = tl.zeros([HEAD_DIM], tl.float32)
    feature = tl.arange(0, HEAD_DIM)
    for start in range(0, bound(n_splits), CHUNK):
        split = start + tl.arange(0, CHUNK)
        inside = split < n_splits
        weights = tl.exp2(tl.load(lse + base + split * n_rows, mask=inside, other=float("-inf")) - peak)
        pointers = partial + (base + split * n_rows)[:, None] * HEAD_DIM + feature[None, :]
        acc += tl.sum(weights[:, None] * tl.load(pointers, mask=inside[:, None], other=0.0), 0)
    acc = acc / tl.where(total == 0, 1.0, total)
    place = out + pair // n_groups * out_b + head * out_h + (index % n_queries).to(tl.int64) * out_t + feature
    tl.store(place, round_to(acc, out.dtype.element_ty))


def decode(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """q [B, H, T, D], k and v [B, G, S, D] (views of a cache) → [B, H, T, D]; no gradients.

    A full, causal or cached mask and R·T of at most 64; of each row, only keys that it may see are read.
    """
    q, k, v = (dense_features(x) for x in (q, k, v))
    call = _operator if torch.compiler.is_compiling() else _decode  # an operator costs host time per call
    return call(q, k, v, mask.offsets, mask.kind != "full")


def _decode(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None, causal: bool) -> Tensor:
    b, h, t, d = q.shape
    g, s = k.shape[1], k.shape[2]
    rows, keys = h // g * t, 16 if INTERPRETED else _KEYS[d] * 2 // q.element_size()
    splits = count_splits(b * g, s, keys, q.device)
    partial = torch.empty(b * g * splits * rows * d, dtype=torch.float32, device=q.device)
    lse = torch.empty(b * g * splits * rows, dtype=torch.float32, device=q.device)
    out = torch.empty(b, t, h, d, dtype=q.dtype, device=q.device).transpose(1, 2)
    with on_device(q):
        split_kernel[(splits * b * g,)](
            q, k, v, partial, lse, offsets, LOG2_E / d**0.5,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], g, h // g, t, s, splits,
            HEAD_DIM=d, CAUSAL=causal, ROWS=max(16, triton.next_power_of_2(rows)), BLOCK_N=keys,
            num_warps=_WARPS, num_stages=_STAGES,
        )  # fmt: skip
        merge_kernel[(b * g * rows,)](
            partial, lse, out, *out.stride()[:3], g, h // g, t, splits,
            HEAD_DIM=d, SPLITS=triton.next_power_of_2(splits), CHUNK=_MERGED, num_warps=4,
        )  # fmt: skip
    return out


_operator = torch.library.custom_op("core_llm::decode", mutates_args=())(_decode)


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None, causal: bool) -> Tensor:
    b, h, t, d = q.shape
    return q.new_empty(b, t, h, d).transpose(1, 2)


def count_splits(pairs: int, n_keys: int, tile: int, device: torch.device) -> int:
    """Programs that share the keys of each of `pairs` (row, group) pairs: enough to fill the device once.

    Depends on the capacity, never on the lengths, so that the grid of a captured graph stays right.
    """
    wanted = PROGRAMS_PER_PROCESSOR * _processors(device) // pairs
    return max(1, min(wanted, triton.cdiv(n_keys, tile)))


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8  # interpreted
    return torch.cuda.get_device_properties(device).multi_processor_count
