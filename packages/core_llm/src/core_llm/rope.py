"""Rotary position embedding with Llama 3.1 frequency scaling.

Axes: B batch, H heads, T text positions, D head dim. Half-split layout: channel d turns with d + D/2.
"""

import math

import torch
from torch import Tensor

from core_llm.config import LlamaConfig, RopeScaling
from core_llm.kernels.steps import rotate as turn


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Radians per position of each channel pair, fp32 [D/2].

    Source: arXiv 2104.09864; the scaling is the one of Llama 3.1's released code: wavelengths
    above `original / low` are divided by `factor`, below `original / high` kept, linear between.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / theta**exponent
    if scaling is None:
        return frequencies
    wavelength = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = ((scaling.original_max_positions / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """`inverse_frequencies` of a core, fp32 [D/2]."""
    return inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)


def rotations(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, each [B, 1, T, D]; computed once per forward pass."""
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotations(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [B, H, T, D] by precomputed rotations."""
    return turn(x, cos, sin)


def rotate(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Turn x [B, H, T, D] by its positions [B, T]."""
    return apply_rotations(x, *rotations(positions, frequencies, x.dtype))
