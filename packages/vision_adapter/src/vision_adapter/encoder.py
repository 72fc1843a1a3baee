"""Image encoder: a Vision Transformer behind a convolution stem.

Axes: P pictures, S memory positions (patches), E encoder width, H heads, D head dim.
"""

import torch
from torch import Tensor, nn

from core_llm.kernels import Mask, attend
from vision_adapter.config import VisionConfig


class EncoderBlock(nn.Module):
    """Pre-norm self-attention and GELU feed-forward, without rotary positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        dim = config.encoder_dim
        self.n_heads = config.encoder_heads
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.encoder_ffn_dim), nn.GELU(), nn.Linear(config.encoder_ffn_dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[P, S, E] → [P, S, E]."""
        p, s, e = x.shape
        q, k, v = self.qkv_proj(self.attention_norm(x)).view(p, s, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.o_proj(attend(q, k, v, Mask.full()).transpose(1, 2).reshape(p, s, e))
        return x + self.ffn(self.ffn_norm(x))


class Encoder(nn.Module):
    """Pixels → patch features; patches are 8 pixels wide.

    The stem is three convolutions of stride 2: at this size a plain patch embedding needs more than ten
    times the steps to tell shapes apart (arXiv 2106.14881 reports the same at scale). The norms between them
    halve the steps once more; they look at one picture at a time, so a batch equals its pictures one by one.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        first, second = config.stem_channels
        self.stem = nn.Sequential(
            nn.Conv2d(3, first, 3, stride=2, padding=1),
            nn.GroupNorm(8, first),
            nn.GELU(),
            nn.Conv2d(first, second, 5, stride=2, padding=2),
            nn.GroupNorm(8, second),
            nn.GELU(),
            nn.Conv2d(second, config.encoder_dim, 5, stride=2, padding=2),
        )
        self.positions = nn.Parameter(torch.randn(config.n_patches, config.encoder_dim) * 0.02)
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.encoder_layers))
        self.norm = nn.LayerNorm(config.encoder_dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [P, 3, height, width] → [P, S, E]."""
        x = self.stem(pixels).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
