"""Attention over keys that all rows share, followed by each row's own.

Axes: B batch, H query heads, G key/value heads, R = H / G, T query positions, P shared keys, S own keys,
D head dim.
"""

import torch
from torch import Tensor

from core_llm.kernels.mask import Mask

# Scores held at once, in elements (128 MiB in fp32): bounds the memory of long prompts.
_MAX_SCORES = 2**25


def attend_shared(q: Tensor, shared_k: Tensor, shared_v: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """One softmax over shared keys [1, G, P, D], all visible, and own keys [B, G, S, D] under `mask`.

    q [B, H, T, D]; returns [B, H, T, D]. All rows and heads of a group meet the shared keys in one
    product, so each shared key is read once for the whole batch and never copied. `mask` is causal or
    cached: every query sees at least itself. Source of the split: Hydragen, arXiv 2402.05099.
    """
    b, h, t, _ = q.shape
    s = k.shape[2]
    visible = mask.dense(t, s, q.device)
    if mask.visible is not None or visible is None:
        raise ValueError("own keys behind a shared prefix take a causal or cached mask")
    step = max(1, _MAX_SCORES // (b * h * (shared_k.shape[2] + s)))
    parts = [
        _block(q[:, :, a : a + step], shared_k[0], shared_v[0], k, v, visible[:, a : a + step])
        for a in range(0, t, step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _block(q: Tensor, shared_k: Tensor, shared_v: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    b, h, t, d = q.shape
    g, s = k.shape[1], k.shape[2]
    rows = (q * d**-0.5).reshape(b, g, (h // g) * t, d)
    gathered = rows.transpose(0, 1).reshape(g, -1, d)  # [G, B·R·T, D]
    far = _wide(torch.matmul(gathered, shared_k.transpose(1, 2)))
    near = _wide(torch.matmul(rows, k.transpose(2, 3)))
    hidden = ~visible[:, None, None]
    near = near.reshape(b, g, h // g, t, s).masked_fill(hidden, float("-inf")).reshape(b, g, -1, s)
    peak = torch.maximum(_split(far.amax(-1, keepdim=True), b), near.amax(-1, keepdim=True))
    far = (far - peak.transpose(0, 1).reshape(g, -1, 1)).exp()
    near = (near - peak).exp()
    total = _split(far.sum(-1, keepdim=True), b) + near.sum(-1, keepdim=True)
    out = _split(torch.matmul(far.to(v.dtype), shared_v), b) + torch.matmul(near.to(v.dtype), v)
    return (out / total).to(q.dtype).reshape(b, h, t, d)


def _wide(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _split(gathered: Tensor, b: int) -> Tensor:
    """[G, B·N, D] → [B, G, N, D]."""
    return gathered.unflatten(1, (b, -1)).transpose(0, 1)
