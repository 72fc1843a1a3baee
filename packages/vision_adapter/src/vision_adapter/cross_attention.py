"""Gated cross-attention from text to image, as in Llama 3.2-Vision.

Axes: B batch, T text positions, S memory positions, C core width, H query heads, G key/value heads,
D head dim, P pictures.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from core_llm.adapters import Spans
from core_llm.config import LlamaConfig
from core_llm.errors import MediaError
from core_llm.kernels import Mask, attend
from core_llm.layers import FeedForward, Linear, RMSNorm


def check_placeholders(spans: Spans, n_images: int) -> None:
    """Raise `MediaError` where the text has not one placeholder for each picture."""
    if len(spans.rows) != n_images:
        raise MediaError(
            f"the text has {len(spans.rows)} image placeholders but {n_images} images were given; "
            "give one image for each placeholder"
        )


class CrossAttentionBlock(nn.Module):
    """Text reads the image memory; two scalar tanh gates, zero at first, decide how much of it.

    Head counts and norm are the core's. No rotary positions: a patch's place is in its features.
    Source: arXiv 2407.21783, section 7.3, and the released Llama 3.2-Vision checkpoints.
    """

    def __init__(self, core: LlamaConfig, ffn_dim: int) -> None:
        super().__init__()
        kv_dim = core.n_kv_heads * core.head_dim
        self.head_dim = core.head_dim
        self.attention_norm = RMSNorm(core.dim, core.norm_eps)
        self.q_proj = Linear(core.dim, core.dim)
        self.k_proj = Linear(core.dim, kv_dim)
        self.v_proj = Linear(core.dim, kv_dim)
        self.o_proj = Linear(core.dim, core.dim)
        self.q_norm = RMSNorm(core.head_dim, core.norm_eps)
        self.k_norm = RMSNorm(core.head_dim, core.norm_eps)
        self.ffn_norm = RMSNorm(core.dim, core.norm_eps)
        self.ffn = FeedForward(core.dim, ffn_dim)
        self.attention_gate = nn.Parameter(torch.zeros(()))
        self.ffn_gate = nn.Parameter(torch.zeros(()))

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Memory [P, S, C] → normed keys and values, each [P, G, S, D]; never repeated to H heads."""
        return self.k_norm(self._heads(self.k_proj(memory))), self._heads(self.v_proj(memory))

    def forward(
        self, hidden: Tensor, keys: Tensor, values: Tensor, mask: Mask, sees: Tensor | None
    ) -> Tensor:
        """hidden [B, T, C], keys and values [B, G, S, D] → [B, T, C].

        sees: bool [B, T], or None where every position sees an image. Where it is false the hidden state
        comes back bit for bit: neither attention nor feed-forward may touch a position without an image.
        """
        out = self.blend(hidden, lambda q: attend(q, keys, values, mask))
        return out if sees is None else torch.where(sees[..., None], out, hidden)

    def blend(self, hidden: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
        """hidden [B, T, C] → [B, T, C]; `read` maps queries [B, H, T, D] to what they read of the memory."""
        q = self.q_norm(self._heads(self.q_proj(self.attention_norm(hidden))))
        mixed = read(q).transpose(1, 2).flatten(2)
        out = hidden + self.attention_gate.tanh() * self.o_proj(mixed)
        out = out + self.ffn_gate.tanh() * self.ffn(self.ffn_norm(out))
        return out.to(hidden.dtype)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
