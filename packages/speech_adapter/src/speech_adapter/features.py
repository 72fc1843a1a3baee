"""Log-mel features: M bands (80 unless told), 25 ms window, 10 ms hop at 16 kHz.

The formula is Whisper's (openai-whisper, `log_mel_spectrogram`): power spectrum, Slaney mel filters, log10.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from speech_adapter.audio import SAMPLE_RATE

N_FFT = 400  # samples: 25 ms
HOP = 160  # samples: 10 ms, so 100 frames per second
N_MELS = 80
POWER_FLOOR = 1e-10
_BLOCK = 512  # frames at a time on a CPU: what is computed of them stays in its cache

# Slaney's mel scale: linear to 1 kHz (15 mel), then 27 steps per factor of 6.4.
_LINEAR_HZ_PER_MEL, _BREAK_HZ, _BREAK_MEL, _LOG_STEP = 200.0 / 3.0, 1000.0, 15.0, np.log(6.4) / 27.0


def _to_hz(mel: np.ndarray) -> np.ndarray:
    above = _BREAK_HZ * np.exp(_LOG_STEP * (mel - _BREAK_MEL))
    return np.where(mel < _BREAK_MEL, mel * _LINEAR_HZ_PER_MEL, above)


def _band_edges(n_mels: int = N_MELS) -> np.ndarray:
    top = _BREAK_MEL + np.log(SAMPLE_RATE / 2 / _BREAK_HZ) / _LOG_STEP
    return _to_hz(np.linspace(0.0, top, n_mels + 2))


def band_centres(n_mels: int = N_MELS) -> np.ndarray:
    """Centre frequencies of the bands in Hz, [M]."""
    return _band_edges(n_mels)[1:-1]


@lru_cache(maxsize=4)
def mel_filters(n_mels: int = N_MELS) -> Tensor:
    """Triangular filters of equal area on Slaney's mel scale from 0 to 8 kHz, fp32 [M, 201]."""
    edges = _band_edges(n_mels)
    bins = np.linspace(0.0, SAMPLE_RATE / 2, N_FFT // 2 + 1)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    area = 2.0 / (edges[2:] - edges[:-2])
    return torch.from_numpy((triangles * area[:, None]).astype(np.float32))


def n_frames(n_samples: int) -> int:
    """Number of feature frames of a clip: one per full 10 ms."""
    return n_samples // HOP


def log_mel(samples: Tensor, n_mels: int = N_MELS) -> Tensor:
    """log10 of the mel power of 16 kHz samples [N] or [B, N] → [F, M] or [B, F, M], F = N // 160.

    The power is floored at 1e-10. N must be at least 400 samples (25 ms).
    """
    return framed_log_mel(mirrored(samples), n_mels)[..., : n_frames(samples.shape[-1]), :]


def mirrored(samples: Tensor) -> Tensor:
    """Samples [..., N] with half a window of their mirror image at both ends, as `log_mel` frames them."""
    flat = samples.reshape(1, -1, samples.shape[-1])
    padded = F.pad(flat, (N_FFT // 2, N_FFT // 2), mode="reflect")
    return padded.view(*samples.shape[:-1], -1)


def framed_log_mel(samples: Tensor, n_mels: int = N_MELS) -> Tensor:
    """As `log_mel`, without anything added at the ends: one frame per hop that has a whole window.

    [..., N] → [..., 1 + (N - 400) // 160, M]; frame i is made of the samples 160 i to 160 i + 399.
    """
    # bf16 would keep three digits of a power that spans ten decades.
    with torch.autocast(samples.device.type, enabled=False):
        frames = samples.float().unfold(-1, N_FFT, HOP)
        blocks = frames.split(_BLOCK, dim=-2) if frames.is_cpu else (frames,)
        filters = _transposed_filters(n_mels, samples.device)
        return torch.cat([_block(block, filters) for block in blocks], dim=-2)


def _block(frames: Tensor, filters: Tensor) -> Tensor:
    """Frames [..., F, 400], filters [201, M] → log10 [..., F, M]."""
    spectrum = torch.fft.rfft(frames * _window(frames.device))
    power = spectrum.real.square() + spectrum.imag.square()  # the absolute value takes a root first
    return (power @ filters).clamp(min=POWER_FLOOR).log10()


@lru_cache(maxsize=4)
def _window(device: torch.device) -> Tensor:
    return torch.hann_window(N_FFT, device=device)


@lru_cache(maxsize=4)
def _transposed_filters(n_mels: int, device: torch.device) -> Tensor:
    return mel_filters(n_mels).T.contiguous().to(device)


def whisper_scale(features: Tensor) -> Tensor:
    """Whisper's scaling of one clip [F, M]: at most 8 decades below the maximum, roughly -1 to 1."""
    return (torch.maximum(features, features.max() - 8.0) + 4.0) / 4.0


def level_scale(features: Tensor, decades: float) -> Tensor:
    """Scale one clip [F, M] to -1 (at least `decades` below its loudest band) to 1 (the loudest band).

    Makes the features independent of the recording level. A clip without any sound becomes all -1.
    """
    return below(features, features.max(), decades)


def below(features: Tensor, level: Tensor, decades: float) -> Tensor:
    """Scale features [..., F, M] to 1 at `level` (log10, [...]) and to -1 at `decades` below it and less."""
    silent = level <= math.log10(POWER_FLOOR)
    level = level.masked_fill(silent, math.inf)[..., None, None]  # everything is far below that
    return (features - level).clamp(min=-decades) * (2.0 / decades) + 1.0


def running_level(blocks: Tensor) -> Tensor:
    """The loudest band so far, at the end of each block: log-mel [P, J, F, M] → [P, J]."""
    return blocks.amax(dim=(2, 3)).cummax(dim=1).values
