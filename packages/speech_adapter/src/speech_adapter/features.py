"""Log-mel features: 80 bands, 25 ms window, 10 ms hop at 16 kHz.

The formula is Whisper's (openai-whisper, `log_mel_spectrogram`): power spectrum, Slaney mel filters, log10.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from speech_adapter.audio import SAMPLE_RATE

N_FFT = 400  # samples: 25 ms
HOP = 160  # samples: 10 ms, so 100 frames per second
N_MELS = 80
_POWER_FLOOR = 1e-10

# Slaney's mel scale: linear to 1 kHz (15 mel), then 27 steps per factor of 6.4.
_LINEAR_HZ_PER_MEL, _BREAK_HZ, _BREAK_MEL, _LOG_STEP = 200.0 / 3.0, 1000.0, 15.0, np.log(6.4) / 27.0


def _to_hz(mel: np.ndarray) -> np.ndarray:
    above = _BREAK_HZ * np.exp(_LOG_STEP * (mel - _BREAK_MEL))
    return np.where(mel < _BREAK_MEL, mel * _LINEAR_HZ_PER_MEL, above)


def _band_edges() -> np.ndarray:
    top = _BREAK_MEL + np.log(SAMPLE_RATE / 2 / _BREAK_HZ) / _LOG_STEP
    return _to_hz(np.linspace(0.0, top, N_MELS + 2))


def band_centres() -> np.ndarray:
    """Centre frequencies of the bands in Hz, [80]."""
    return _band_edges()[1:-1]


@lru_cache(maxsize=1)
def mel_filters() -> Tensor:
    """Triangular filters of equal area on Slaney's mel scale from 0 to 8 kHz, fp32 [80, 201]."""
    edges = _band_edges()
    bins = np.linspace(0.0, SAMPLE_RATE / 2, N_FFT // 2 + 1)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    area = 2.0 / (edges[2:] - edges[:-2])
    return torch.from_numpy((triangles * area[:, None]).astype(np.float32))


def n_frames(n_samples: int) -> int:
    """Number of feature frames of a clip: one per full 10 ms."""
    return n_samples // HOP


def log_mel(samples: Tensor) -> Tensor:
    """log10 of the mel power of 16 kHz samples [N] or [B, N] → [F, 80] or [B, F, 80], F = N // 160.

    The power is floored at 1e-10. N must be at least 400 samples (25 ms).
    """
    # bf16 would keep three digits of a power that spans ten decades.
    with torch.autocast(samples.device.type, enabled=False):
        window = torch.hann_window(N_FFT, device=samples.device)
        spectrum = torch.stft(samples.float(), N_FFT, HOP, window=window, return_complex=True)
        power = spectrum[..., :-1].abs().square()
        mel = mel_filters().to(samples.device) @ power
        return mel.clamp(min=_POWER_FLOOR).log10().transpose(-1, -2)


def whisper_scale(features: Tensor) -> Tensor:
    """Whisper's scaling of one clip [F, 80]: at most 8 decades below the maximum, roughly -1 to 1."""
    return (torch.maximum(features, features.max() - 8.0) + 4.0) / 4.0


def level_scale(features: Tensor, decades: float) -> Tensor:
    """Scale one clip [F, 80] to -1 (at least `decades` below its loudest band) to 1 (the loudest band).

    Makes the features independent of the recording level. A clip without any sound becomes all -1.
    """
    top = features.max()
    if top <= np.log10(_POWER_FLOOR):
        return torch.full_like(features, -1.0)
    return (features - top).clamp(min=-decades) * (2.0 / decades) + 1.0
