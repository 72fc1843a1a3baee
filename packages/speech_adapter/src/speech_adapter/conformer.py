"""A rotary Conformer (arXiv 2005.08100, as sized in arXiv 2407.21783) whose padding cannot leak.

Every layer also runs on blocks of clips with a `Past` (see `chunks`): B is then their number, S their width,
and rotations begin with the L = look_back frames before a block.

Axes: B clips, F feature frames (10 ms), S encoder frames (40 ms), C width, H heads, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core_llm.kernels import Mask, attend
from core_llm.rope import apply_rotations
from speech_adapter.chunks import Past
from speech_adapter.config import SpeechConfig


class MacaronFeedForward(nn.Module):
    """Pre-norm feed-forward; two of them with half weight enclose attention and convolution."""

    def __init__(self, dim: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, ffn_dim)
        self.down = nn.Linear(ffn_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, C] → [B, S, C]."""
        return self.dropout(self.down(self.dropout(F.silu(self.up(self.norm(x))))))


class RotaryAttention(nn.Module):
    """Pre-norm self-attention over the real frames of a clip, rotary positions."""

    def __init__(self, dim: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.head_dim = dim // n_heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], real: Tensor | None, past: Past | None = None
    ) -> Tensor:
        """x [B, S, C], real [B, S] bool (None: all), rotations of S or L + S positions → [B, S, C]."""
        b, s, c = x.shape
        q, kv = self.qkv(self.norm(x)).split((c, 2 * c), dim=-1)
        if past is not None:
            length = past.window.look_back
            kv = torch.cat((past.before(self, kv, length), kv), dim=1)
            assert real is not None
            real = torch.cat((past.exists(length), real), dim=1)
        k, v = (self._heads(part) for part in kv.chunk(2, dim=-1))
        cos, sin = rotation
        q = apply_rotations(self._heads(q), cos[:, :, -s:], sin[:, :, -s:])
        mask = Mask.full() if real is None else Mask.keys(real)
        mixed = attend(q, apply_rotations(k, cos, sin), v, mask)
        return self.dropout(self.out(mixed.transpose(1, 2).reshape(b, s, c)))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class Convolution(nn.Module):
    """Gated pointwise, depthwise and pointwise convolution over time.

    LayerNorm stands where the paper has BatchNorm, whose statistics would tie a clip to its neighbours.
    """

    def __init__(self, dim: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.gated = nn.Linear(dim, 2 * dim)
        self.depthwise = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.inner_norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, real: Tensor | None, past: Past | None = None) -> Tensor:
        """x [B, S, C], real [B, S] bool (None: all) → [B, S, C]."""
        gated = F.glu(self.gated(self.norm(x)), dim=-1)
        if real is not None:
            # Before the convolution: it would carry padding into the last real frames.
            gated = gated.masked_fill(~real[..., None], 0.0)
        reach = self.depthwise.kernel_size[0] // 2
        left = None if past is None else past.before(self, gated, reach)
        mixed = self._convolve(gated, left, reach)
        return self.dropout(self.out(F.silu(self.inner_norm(mixed))))

    def _convolve(self, x: Tensor, left: Tensor | None, reach: int) -> Tensor:
        before = 0 if left is None else reach
        if left is not None:
            x = F.pad(torch.cat((left, x), dim=1), (0, 0, 0, reach))
        # In two dimensions [B, S, C] is a layout that the library knows; in one it would be copied twice.
        weight, image = self.depthwise.weight.unsqueeze(2), x.transpose(1, 2).unsqueeze(2)
        padding = (0, reach - before)
        mixed = F.conv2d(image, weight, self.depthwise.bias, padding=padding, groups=x.shape[2])
        return mixed.squeeze(2).transpose(1, 2)


class ConformerLayer(nn.Module):
    """Half feed-forward, attention, convolution, half feed-forward, norm."""

    def __init__(self, config: SpeechConfig) -> None:
        super().__init__()
        self.first = MacaronFeedForward(config.dim, config.ffn_dim, config.dropout)
        self.attention = RotaryAttention(config.dim, config.n_heads, config.dropout)
        self.convolution = Convolution(config.dim, config.kernel, config.dropout)
        self.second = MacaronFeedForward(config.dim, config.ffn_dim, config.dropout)
        self.norm = nn.LayerNorm(config.dim)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], real: Tensor | None, past: Past | None = None
    ) -> Tensor:
        """x [B, S, C], real [B, S] bool (None: all) → [B, S, C]."""
        x = torch.add(x, self.first(x), alpha=0.5)
        x = x + self.attention(x, rotation, real, past)
        x = x + self.convolution(x, real, past)
        x = torch.add(x, self.second(x), alpha=0.5)
        return self.norm(x)


class Conformer(nn.Module):
    """Stacks `config.stack` feature frames into one of 40 ms and encodes them."""

    def __init__(self, config: SpeechConfig, n_mels: int) -> None:
        super().__init__()
        self.stack = config.stack
        self.project = nn.Linear(n_mels * config.stack, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(ConformerLayer(config) for _ in range(config.n_layers))

    def forward(
        self, features: Tensor, rotation: tuple[Tensor, Tensor], real: Tensor, past: Past | None = None
    ) -> Tensor:
        """features [B, F, M] with F = S · stack, real [B, S] bool → [B, S, C]."""
        b, f, m = features.shape
        x = self.dropout(self.project(features.reshape(b, f // self.stack, m * self.stack)))
        # Without padding there is nothing to mask, and attention has a faster kernel.
        masked = None if past is None and bool(real.all()) else real
        for layer in self.layers:
            x = layer(x, rotation, masked, past)
        return x
