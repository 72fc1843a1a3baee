"""The layers of a Llama block.

Axes: B batch, T text positions, S key positions, C model width, H query heads, G key/value heads, D head dim.
"""

import torch
from torch import Tensor, nn

from core_llm.cache import KVCache
from core_llm.config import LlamaConfig
from core_llm.kernels import Mask, attend, attend_shared
from core_llm.kernels.cpu.block import BF16, Matrix, decode_block, hooked, matrices, suits
from core_llm.kernels.steps import linear, rms_norm, swiglu
from core_llm.rope import apply_rotations


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467), statistics in fp32."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] → [..., C]."""
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """A product without a bias; `kernels` decides what computes it."""

    def __init__(self, n_inputs: int, n_outputs: int) -> None:
        super().__init__(n_inputs, n_outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        return linear(x, self.weight)

    def cpu_matrix(self) -> Matrix | None:
        """The weight for the C kernels, which read bf16 of one piece."""
        if self.weight.dtype != torch.bfloat16 or not self.weight.is_contiguous():
            return None
        return Matrix(BF16, self.out_features, self.in_features, self.weight)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        kv_dim = config.n_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.dim, config.dim)
        self.k_proj = Linear(config.dim, kv_dim)
        self.v_proj = Linear(config.dim, kv_dim)
        self.o_proj = Linear(config.dim, config.dim)

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
        self.gate_proj = Linear(dim, ffn_dim)
        self.up_proj = Linear(dim, ffn_dim)
        self.down_proj = Linear(ffn_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] → [..., C]."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


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
        if cache is not None and mask.offsets is cache.lengths and x.shape[1] == 1:
            out = self._decoded_at_once(x, rotation, cache, layer)
            if out is not None:
                return out
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))

    def _decoded_at_once(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: KVCache, layer: int
    ) -> Tensor | None:
        """The same steps for one new token per row as a single call of the C kernels, where they serve."""
        keys = cache.keys[layer]
        first, second, attention, mlp = (
            self.input_layernorm,
            self.post_attention_layernorm,
            self.self_attn,
            self.mlp,
        )
        if cache.prefix is not None or not suits(x, keys, attention.head_dim):
            return None
        if hooked(first, second, attention, mlp):
            return None
        products = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        weights = matrices((*products, mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        if weights is None:
            return None
        norms = first.weight, second.weight
        return decode_block(x, norms, first.eps, weights, rotation, keys, cache.values[layer], cache.lengths)
