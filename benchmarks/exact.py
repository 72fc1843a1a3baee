"""Attention and its gradients in float64, a few queries at a time, so that long texts fit.

Axes: B batch, H query heads, G key/value heads, R = H / G, T query positions, S key positions, D head dim.
"""

import torch
from torch import Tensor

from core_llm.kernels import Mask

SCORES = 1 << 28  # held at once, in elements: 2 GiB in float64


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Mask, grad: Tensor | None) -> list[Tensor]:
    """out [B, H, T, D] and, with `grad` (that of out), the gradients of q, k and v, written out by hand."""
    b, h, t, d = q.shape
    g, s = k.shape[1], k.shape[2]
    k64, v64 = k.detach().double(), v.detach().double()
    visible = mask.dense(t, s, q.device)
    step = max(1, SCORES // (b * h * s))
    outs, dqs = [], []
    dk, dv = torch.zeros_like(k64), torch.zeros_like(v64)
    for a in range(0, t, step):
        rows = q.detach()[:, :, a : a + step].double().reshape(b, g, h // g, -1, d)
        scores = torch.einsum("bgrtd,bgsd->bgrts", rows, k64) / d**0.5
        if visible is not None:
            part = visible if visible.shape[1] == 1 else visible[:, a : a + step]
            scores.masked_fill_(~part[:, None, None], float("-inf"))
        weights = scores.softmax(dim=-1)
        del scores
        out = torch.einsum("bgrts,bgsd->bgrtd", weights, v64)
        outs.append(out.reshape(b, h, -1, d))
        if grad is None:
            continue
        grad_out = grad[:, :, a : a + step].double().reshape(out.shape)
        dv += torch.einsum("bgrts,bgrtd->bgsd", weights, grad_out)
        dscores = torch.einsum("bgrtd,bgsd->bgrts", grad_out, v64)
        dscores.sub_((grad_out * out).sum(-1, keepdim=True)).mul_(weights).div_(d**0.5)
        del weights
        dk += torch.einsum("bgrts,bgrtd->bgsd", dscores, rows)
        dqs.append(torch.einsum("bgrts,bgsd->bgrtd", dscores, k64).reshape(b, h, -1, d))
    return [torch.cat(outs, dim=2), *([torch.cat(dqs, dim=2), dk, dv] if grad is not None else [])]
