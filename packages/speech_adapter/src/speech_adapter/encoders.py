"""What an audio encoder has to offer, whatever it is inside; the Conformer and openai-whisper's offered so.

Axes: P clips, F feature frames (10 ms), M bands, S encoder frames (40 ms), E encoder width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core_llm.rope import inverse_frequencies, rotations
from speech_adapter.config import SpeechConfig
from speech_adapter.conformer import Conformer
from speech_adapter.features import N_FFT, level_scale, log_mel, n_frames, whisper_scale

WINDOW = 3000  # feature frames that Whisper reads at once: 30 s
_WINDOW_SAMPLES = 480_000


@dataclass(frozen=True, eq=False)
class Encoded:
    """What an encoder hears in P clips: hidden [P, S, E] padded to the longest, lengths [P] real ones."""

    hidden: Tensor
    lengths: Tensor


@runtime_checkable
class AudioEncoder(Protocol):
    """Samples to features to frames of 40 ms; also an `nn.Module`, so that it is trained, moved and stored.

    width: E.
    """

    width: int

    def features(self, samples: Tensor) -> Tensor:
        """One clip at 16 kHz, [N] with N >= 400 → [N // 160, M], as this encoder's scale has them."""
        ...

    def encode(self, log_mel: Tensor, frames: Tensor) -> Encoded:
        """Features [P, F, M] of which `frames` [P] are real, anything behind → ceil(frames / stack) each.

        A batch equals its clips one by one.
        """
        ...


def build_encoder(config: SpeechConfig) -> ConformerEncoder | WhisperEncoder:
    """The encoder that a configuration names, with random weights."""
    return WhisperEncoder(config) if config.encoder == "whisper" else ConformerEncoder(config)


def rotation(length: int, head_dim: int, theta: float, like: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
    """Rotations of the positions `start` to `start + length - 1`, with device and dtype of `like`."""
    frequencies = inverse_frequencies(head_dim, theta).to(like.device)
    positions = torch.arange(start, start + length, device=like.device)[None]
    return rotations(positions, frequencies, like.dtype)


class ConformerEncoder(Conformer):
    """The project's own encoder; its features do not depend on the recording level."""

    def __init__(self, config: SpeechConfig) -> None:
        super().__init__(config, config.n_mels)
        self.config = config
        self.width = config.dim

    def features(self, samples: Tensor) -> Tensor:
        """See `AudioEncoder`: `level_scale`."""
        return level_scale(log_mel(samples, self.config.n_mels), self.config.range_decades)

    def encode(self, log_mel: Tensor, frames: Tensor) -> Encoded:
        """See `AudioEncoder`; what is missing in a clip's last stack is silence."""
        weight, stack = self.project.weight, self.config.stack
        frames = frames.to(weight.device)
        width = -(-log_mel.shape[1] // stack) * stack
        features = F.pad(log_mel.to(weight.device, weight.dtype), (0, 0, 0, width - log_mel.shape[1]))
        position = torch.arange(width, device=weight.device)
        features = features.masked_fill((position >= frames[:, None])[..., None], -1.0)
        lengths = (frames + stack - 1) // stack
        real = position[: width // stack] < lengths[:, None]
        turns = rotation(
            width // stack, self.config.dim // self.config.n_heads, self.config.rope_theta, weight
        )
        return Encoded(self(features, turns, real), lengths)


class WhisperEncoder(nn.Module):
    """openai-whisper's encoder (arXiv 2212.04356) of any size, `stack` / 2 of its 20 ms frames side by side.

    It reads windows of exactly 30 s. A clip is cut into such windows, the last is filled up with silence,
    and the frames of that silence are left out of what comes back: the length follows the clip.
    """

    def __init__(self, config: SpeechConfig) -> None:
        super().__init__()
        from whisper.model import AudioEncoder as Tower

        self.config = config
        self.width = config.dim * config.stack // 2
        self.tower = Tower(config.n_mels, WINDOW // 2, config.dim, config.n_heads, config.n_layers)

    def features(self, samples: Tensor) -> Tensor:
        """See `AudioEncoder`: Whisper's own, each window of 30 s scaled by itself.

        Equal to transformers' WhisperFeatureExtractor where the clip ends in 15 ms of silence, such as the
        edges that the adapter adds: the frame after the last one begins in it, and is cut off here.
        """
        return torch.cat([self._window(part) for part in samples.split(_WINDOW_SAMPLES)])

    def _window(self, samples: Tensor) -> Tensor:
        # Silence follows a short window, so what hears the end hears silence, not a mirror image.
        missing = max(0, min(N_FFT, _WINDOW_SAMPLES - len(samples)))
        features = log_mel(F.pad(samples, (0, missing)), self.config.n_mels)
        return whisper_scale(features)[: n_frames(len(samples))]

    def encode(self, log_mel: Tensor, frames: Tensor) -> Encoded:
        """See `AudioEncoder`."""
        weight = self.tower.conv1.weight
        frames = frames.to(weight.device)
        n_windows = -(-log_mel.shape[1] // WINDOW)
        features = log_mel.to(weight.device, weight.dtype)
        features = F.pad(features, (0, 0, 0, n_windows * WINDOW - log_mel.shape[1]))
        missing = torch.arange(n_windows * WINDOW, device=weight.device) >= frames[:, None]
        windows = features.unflatten(1, (n_windows, WINDOW))
        missing = missing.unflatten(1, (n_windows, WINDOW))
        heard = ~missing[:, :, 0]
        windows, missing = windows[heard], missing[heard][..., None]
        # Silence on Whisper's scale: 8 decades below the loudest band, or a power of 1e-10.
        loudest = windows.masked_fill(missing, float("-inf")).amax(dim=(1, 2), keepdim=True)
        windows = torch.where(missing, (loudest - 2.0).clamp(min=-1.5), windows)
        frames_of_20_ms = self.tower(windows.transpose(1, 2))
        stacked = frames_of_20_ms.reshape(len(windows), WINDOW // self.config.stack, self.width)
        hidden = stacked.new_zeros(*heard.shape, *stacked.shape[1:])
        hidden[heard] = stacked
        lengths = (frames + self.config.stack - 1) // self.config.stack
        return Encoded(hidden.flatten(1, 2)[:, : int(lengths.max())], lengths)
