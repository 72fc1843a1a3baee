"""The layers of a Llama block.

Axes: B batch, T text positions, S key positions, C model width, H query heads, G key/value heads, D head dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core_llm.cache import KVCache
from core_llm.config import LlamaConfig
from core_llm.kernels import Mask, attend, attend_shared
from core_llm.rope import apply_rotations


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467), statistics in fp32."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] → [..., C]."""
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        kv_dim = config.n_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Mask,
        cache: KVCache | None,
        layer: int,
    ) -> Tensor:
        """x [B, T, C] → [B, T, C]; with a cache, keys and values are written to it and read back."""
        b, t, c = x.shape
        q = apply_rotations(self._heads(self.q_proj(x)), *rotation)
        k = apply_rotations(self._heads(self.k_proj(x)), *rotation)
        v = self._heads(self.v_proj(x))
        if cache is not None:
            k, v = cache.write(layer, k, v)
        if cache is not None and cache.prefix is not None:
            prefix = cache.prefix
            mixed = attend_shared(q, prefix.keys[layer], prefix.values[layer], k, v, mask)
        else:
            mixed = attend(q, k, v, mask)
        return self.o_proj(mixed.transpose(1, 2).reshape(b, t, c))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) · up(x))."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.up_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.down_proj = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] → [..., C]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and feed-forward, each behind its norm and added to the residual stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = FeedForward(config.dim, config.ffn_dim)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Mask,
        cache: KVCache | None,
        layer: int,
    ) -> Tensor:
        """[B, T, C] → [B, T, C]."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))
