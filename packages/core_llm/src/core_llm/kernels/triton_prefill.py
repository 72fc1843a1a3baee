"""Attention over many queries on a GPU, forward and backward, as operators that torch.compile can trace.

Axes: B batch, H query heads, G key/value heads, T query positions, S key positions, D head dim.
"""

from typing import Any

import torch
from torch import Tensor

from core_llm.kernels import triton_backward, triton_forward
from core_llm.kernels.mask import Mask
from core_llm.kernels.triton_tiles import document_spans
from core_llm.kernels.triton_tuning import on_device


def prefill(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """q [B, H, T, D], k and v [B, G, S, D] → [B, H, T, D]; every kind of mask, differentiable.

    D is 64 or 128; all three share one dtype: fp32, bf16 or fp16. K and V stay unexpanded. Keys outside
    a query's documents are skipped a tile at a time. A query that sees nothing gives zeros and no gradient.
    """
    q, k, v = (dense_features(x) for x in (q, k, v))
    visible = mask.visible
    if visible is not None:
        visible = (visible[:, None] if visible.dim() == 2 else visible).view(torch.uint8)
    documents = None if mask.documents is None else mask.documents.contiguous()
    causal = mask.kind in ("causal", "cached", "packed")
    return _attention(q, k, v, mask.offsets, documents, visible, causal, mask.shared_prefix)[0]


def dense_features(x: Tensor) -> Tensor:
    """x itself, or a copy where its last axis is strided."""
    return x if x.stride(-1) == 1 else x.contiguous()


# torch reads these annotations as the operator's schema; it knows Optional, not every spelling of a union.
@torch.library.custom_op("core_llm::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | None,
    documents: Tensor | None,
    visible: Tensor | None,
    causal: bool,
    shared_prefix: bool,
) -> tuple[Tensor, Tensor]:
    """out [B, H, T, D] and the softmax statistics fp32 [B, H, T] that the backward pass needs."""
    spans = _spans(documents, shared_prefix)
    return triton_forward.forward(q, k, v, offsets, documents, spans, visible, causal, shared_prefix)


@torch.library.custom_op("core_llm::attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor | None,
    documents: Tensor | None,
    visible: Tensor | None,
    causal: bool,
    shared_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    spans = _spans(documents, shared_prefix)
    return triton_backward.backward(
        dense_features(grad_out), q, k, v, out, lse, offsets, documents, spans, visible, causal, shared_prefix
    )


def _spans(documents: Tensor | None, shared_prefix: bool) -> Tensor | None:
    if documents is None:
        return None
    with on_device(documents):
        return document_spans(documents, shared_prefix)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *mask: Any) -> tuple[Tensor, Tensor]:
    b, h, t, _d = q.shape
    return _heads_last(q), q.new_empty(b, h, t, dtype=torch.float32)


@_attention_backward.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _heads_last(q), _heads_last(k), _heads_last(v)


def _heads_last(x: Tensor) -> Tensor:
    """An empty [B, H, T, D] laid out as [B, T, H, D], as the kernels return it."""
    b, h, t, d = x.shape
    return x.new_empty(b, t, h, d).transpose(1, 2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, offsets, documents, visible, ctx.causal, ctx.shared_prefix = inputs
    ctx.save_for_backward(q, k, v, *output, offsets, documents, visible)


def _differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _attention_backward(grad_out, *ctx.saved_tensors, ctx.causal, ctx.shared_prefix)
    return *gradients, None, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)
