"""A rotary Conformer (arXiv 2005.08100, as sized in arXiv 2407.21783) whose padding cannot leak.

Every layer also runs on blocks of clips with a `Past` (see `chunks`): B is then their number, S their width,
and rotations begin with the L = look_back frames before a block. Where nobody asks for gradients, sums
and activations overwrite what they read: fresh memory costs a CPU as much as the arithmetic.

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


def plus(x: Tensor, hidden: Tensor, out: nn.Linear, dropout: nn.Dropout, scale: float = 1.0) -> Tensor:
    """x + scale · dropout(out(hidden)); without gradients summed into x by the product itself."""
    plain = torch.is_grad_enabled() or dropout.training or torch.is_autocast_enabled(x.device.type)
    if plain or type(out) is not nn.Linear or not x.is_contiguous():
        return torch.add(x, dropout(out(hidden)), alpha=scale)
    if out.bias is not None:
        x.add_(out.bias, alpha=scale)
    x.flatten(0, -2).addmm_(hidden.flatten(0, -2), out.weight.T, alpha=scale)
    return x


def turned(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """x [B, S, H, D] turned by rotations [1, 1, S, D] → [B, H, S, D]; without gradients in fewer passes."""
    cos, sin = rotation
    x = x.transpose(1, 2)
    if torch.is_grad_enabled():
        return apply_rotations(x, cos, sin)
    half = x.shape[-1] // 2
    (first, second), cos, sin = x.split(half, dim=-1), cos[..., :half], sin[..., :half]
    # Each head in one piece, which attention reads faster.
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    low, high = out.split(half, dim=-1)
    torch.mul(first, cos, out=low).addcmul_(second, sin, value=-1.0)
    torch.mul(second, cos, out=high).addcmul_(first, sin)
    return out


def silu(x: Tensor) -> Tensor:
    """x · sigmoid(x); without gradients in the memory of x."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class MacaronFeedForward(nn.Module):
    """Pre-norm feed-forward; two of them with half weight enclose attention and convolution."""

    def __init__(self, dim: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, ffn_dim)
        self.down = nn.Linear(ffn_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def add_to(self, x: Tensor, scale: float) -> Tensor:
        """x [B, S, C] + scale · feed-forward of it; see `plus`."""
        hidden = self.dropout(silu(self.up(self.norm(x))))
        return plus(x, hidden, self.down, self.dropout, scale)


class RotaryAttention(nn.Module):
    """Pre-norm self-attention over the real frames of a clip, rotary positions."""

    def __init__(self, dim: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.head_dim = dim // n_heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def add_to(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], real: Tensor | None, past: Past | None = None
    ) -> Tensor:
        """x [B, S, C] + attention over it; real [B, S] bool (None: all), rotations of S or L + S positions.

        See `plus`.
        """
        b, s, c = x.shape
        qkv = self.qkv(self.norm(x))
        if past is None:
            # Queries and keys stand side by side and turn alike.
            qk = turned(self._heads(qkv[..., : 2 * c]), rotation)
            (q, k), v = qk.chunk(2, dim=1), qkv[..., 2 * c :]
        else:
            length = past.window.look_back
            kv = torch.cat((past.before(self, qkv[..., c:], length), qkv[..., c:]), dim=1)
            assert real is not None
            real = torch.cat((past.exists(length), real), dim=1)
            k, v = turned(self._heads(kv[..., :c]), rotation), kv[..., c:]
            cos, sin = rotation
            q = turned(self._heads(qkv[..., :c]), (cos[:, :, -s:], sin[:, :, -s:]))
        v = self._heads(v).transpose(1, 2)
        if not torch.is_grad_enabled():
            v = v.contiguous()
        mixed = attend(q, k, v, Mask.full() if real is None else Mask.keys(real))
        return plus(x, mixed.transpose(1, 2).reshape(b, s, c), self.out, self.dropout)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


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

    def add_to(self, x: Tensor, real: Tensor | None, past: Past | None = None) -> Tensor:
        """x [B, S, C] + convolution of it; real [B, S] bool (None: all). See `plus`."""
        gated = F.glu(self.gated(self.norm(x)), dim=-1)
        if real is not None:
            # Before the convolution: it would carry padding into the last real frames.
            gated = gated.masked_fill(~real[..., None], 0.0)
        reach = self.depthwise.kernel_size[0] // 2
        left = None if past is None else past.before(self, gated, reach)
        mixed = self._convolve(gated, left, reach)
        return plus(x, silu(self.inner_norm(mixed)), self.out, self.dropout)

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
        """x [B, S, C], overwritten without gradients; real [B, S] bool (None: all) → [B, S, C]."""
        x = self.first.add_to(x, 0.5)
        x = self.attention.add_to(x, rotation, real, past)
        x = self.convolution.add_to(x, real, past)
        return self.norm(self.second.add_to(x, 0.5))


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
