"""Augmentation of training speech: other voices, rooms, microphones and telephone lines.

Waveforms are float32 mono at 16 kHz [N]; every function takes its random generator and returns a new array.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core_llm.errors import UserError
from speech_adapter.audio import SAMPLE_RATE
from speech_adapter.features import band_centres

Waveform = np.ndarray


@dataclass(frozen=True)
class Augmentation:
    """How hard to augment; the probabilities are per clip."""

    speed: tuple[float, float] = (0.83, 1.18)  # resampling: moves tempo, pitch and formants together
    equaliser_db: float = 6.0  # largest gain of the random equaliser, either way
    telephone: float = 0.5  # probability of cutting everything above about 4 kHz
    reverberation: float = 0.15
    noise: float = 0.6
    noise_snr_db: tuple[float, float] = (8.0, 40.0)
    clipping: float = 0.2  # probability of a microphone that is overdriven
    clipping_db: tuple[float, float] = (3.0, 22.0)  # how far beyond full scale
    cut_ms: float = 30.0  # at most this much is cut off each end, as hasty recordings do
    silence_ms: tuple[float, float] = (0.0, 350.0)  # added at each end
    tract: tuple[float, float] = (0.88, 1.14)  # stretches formants alone, features only
    frequency_masks: int = 2
    frequency_width: int = 8  # mel bands
    time_masks: int = 1
    time_width: float = 0.06  # of the clip


def change_speed(samples: Waveform, factor: float) -> Waveform:
    """Play `factor` times faster: pitch and formants rise with it, as with a shorter vocal tract."""
    n = max(int(len(samples) / factor), 1)
    return np.interp(np.arange(n) * factor, np.arange(len(samples)), samples).astype(np.float32)


def colour(samples: Waveform, rng: np.random.Generator, settings: Augmentation) -> Waveform:
    """Random equaliser (a microphone) and, with `telephone`, a random band limit near 4 kHz."""
    n = 1 << int(np.ceil(np.log2(max(len(samples), 2))))
    spectrum = np.fft.rfft(samples, n)
    hz = np.fft.rfftfreq(n, 1.0 / SAMPLE_RATE)
    knots = np.array([0.0, 200.0, 500.0, 1000.0, 2000.0, 3500.0, 8000.0])
    decibels = rng.uniform(-settings.equaliser_db, settings.equaliser_db, len(knots))
    gain = 10.0 ** (np.interp(hz, knots, decibels) / 20.0)
    if rng.random() < settings.telephone:
        gain[hz > rng.uniform(3300.0, 4000.0)] = 0.0
        if rng.random() < 0.3:
            gain[hz < rng.uniform(50.0, 300.0)] *= 0.1
    return np.fft.irfft(spectrum * gain.astype(np.float32), n)[: len(samples)].astype(np.float32)


def reverberate(samples: Waveform, rng: np.random.Generator) -> Waveform:
    """Convolve with a synthetic room: the direct sound and exponentially decaying noise of 50 to 350 ms."""
    n = int(SAMPLE_RATE * rng.uniform(0.05, 0.35))
    room = rng.standard_normal(n, dtype=np.float32) * np.exp(-6.9 * np.arange(n) / n).astype(np.float32)
    room *= rng.uniform(0.1, 0.7) / np.sqrt(np.sum(room**2))
    room[0] = 1.0
    size = 1 << int(np.ceil(np.log2(len(samples) + n)))
    wet = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(room, size), size)
    return wet[: len(samples)].astype(np.float32)


def coloured_noise(n: int, rng: np.random.Generator) -> Waveform:
    """Noise with a power spectrum of 1/f^a, a from 0 (white) to 2 (brown), unit power, float32 [n]."""
    size = 1 << int(np.ceil(np.log2(max(n, 2))))
    spectrum = np.fft.rfft(rng.standard_normal(size, dtype=np.float32))
    tilt = -rng.uniform(0.0, 1.0)  # half the exponent of the power
    spectrum *= np.exp(tilt * np.log(np.arange(1, len(spectrum) + 1, dtype=np.float32)))
    noise = np.fft.irfft(spectrum, size)[:n]
    return (noise / (noise.std() + 1e-12)).astype(np.float32)


def add_noise(samples: Waveform, rng: np.random.Generator, settings: Augmentation) -> Waveform:
    """Add coloured noise at a random signal-to-noise ratio in dB."""
    level = np.sqrt(np.mean(samples**2)) * 10.0 ** (-rng.uniform(*settings.noise_snr_db) / 20.0)
    return samples + level * coloured_noise(len(samples), rng)


def overdrive(samples: Waveform, rng: np.random.Generator, settings: Augmentation) -> Waveform:
    """Cut off whatever lies beyond full scale, which the peak of the clip exceeds by `clipping_db`."""
    limit = np.abs(samples).max(initial=0.0) * 10.0 ** (-rng.uniform(*settings.clipping_db) / 20.0)
    return np.clip(samples, -limit, limit).astype(np.float32)


def augment(
    samples: Waveform, rng: np.random.Generator, settings: Augmentation
) -> tuple[Waveform, Callable[[np.ndarray], np.ndarray]]:
    """All waveform augmentations in the order in which sound meets them: voice, room, microphone, gain.

    Also returns where a time of the original (seconds) lies in the new clip.
    """
    cut, cut_end = (rng.uniform(0.0, settings.cut_ms, size=2) * SAMPLE_RATE / 1000).astype(int)
    if cut + cut_end >= len(samples):  # nothing would be left of it
        cut, cut_end = 0, 0
    samples = samples[cut : len(samples) - cut_end]
    factor = float(np.exp(rng.uniform(*np.log(settings.speed))))
    samples = change_speed(samples, factor)
    before, after = (rng.uniform(*settings.silence_ms, size=2) * SAMPLE_RATE / 1000).astype(int)
    samples = np.pad(samples, (before, after))
    if rng.random() < settings.reverberation:
        samples = reverberate(samples, rng)
    if rng.random() < settings.noise:
        samples = add_noise(samples, rng, settings)
    samples = colour(samples, rng, settings)
    if rng.random() < settings.clipping:
        samples = overdrive(samples, rng, settings)
    gain = np.float32(10.0 ** (rng.uniform(-24.0, 0.0) / 20.0))
    return samples * gain, lambda seconds: (seconds - cut / SAMPLE_RATE) / factor + before / SAMPLE_RATE


def join(clips: list[Waveform], rng: np.random.Generator) -> Waveform:
    """Say clips one after another with pauses of 20 to 300 ms, each at its own level (0 to -8 dB)."""
    parts: list[Waveform] = []
    for clip in clips:
        level = np.float32(10.0 ** (rng.uniform(-8.0, 0.0) / 20.0) / (np.abs(clip).max() + 1e-6))
        parts += [clip * level, np.zeros(int(rng.uniform(0.02, 0.3) * SAMPLE_RATE), dtype=np.float32)]
    return np.concatenate(parts[:-1])


def stretch_formants(log_mel: Tensor, rng: np.random.Generator, settings: Sequence[Augmentation]) -> Tensor:
    """Move the bands of each clip of [P, F, 80] as a longer or shorter vocal tract would; a new tensor.

    settings: of each clip. Unlike `change_speed` it leaves tempo and pitch alone (vocal tract length
    perturbation, Jaitly and Hinton 2013, with linear interpolation between bands).
    """
    hz = band_centres(log_mel.shape[2])
    bands = np.arange(len(hz))
    mix = np.zeros((len(log_mel), len(hz), len(hz)), dtype=np.float32)
    for matrix, own in zip(mix, settings, strict=True):
        factor = np.exp(rng.uniform(*np.log(own.tract)))
        position = np.interp(hz * factor, hz, bands)
        low = position.astype(int)
        matrix[low, bands] = 1.0 - (position - low)
        matrix[np.minimum(low + 1, len(hz) - 1), bands] += position - low
    with torch.autocast(log_mel.device.type, enabled=False):
        return log_mel @ torch.from_numpy(mix)


def mask_features(
    log_mel: Tensor, frames: Tensor, rng: np.random.Generator, settings: Sequence[Augmentation]
) -> Tensor:
    """SpecAugment (arXiv 1904.08779) on features [P, F, 80] with `frames` [P] real ones; a new tensor.

    settings: of each clip.
    """
    masked = log_mel.clone()
    for clip, n, own in zip(masked, frames.tolist(), settings, strict=True):
        fill = clip[:n].mean()
        for _ in range(own.frequency_masks):
            width = int(rng.integers(0, own.frequency_width + 1))
            start = int(rng.integers(0, clip.shape[1] - width + 1))
            clip[:n, start : start + width] = fill
        for _ in range(own.time_masks):
            width = int(rng.integers(0, int(n * own.time_width) + 1))
            start = int(rng.integers(0, n - width + 1))
            clip[start : start + width] = fill
    return masked


@dataclass(frozen=True)
class Perturbation:
    """What the stages vary, off unless asked for: torchaudio's speed, noise and SpecAugment."""

    speeds: tuple[float, ...] = (1.0,)  # factors, one is drawn for each clip (Ko et al. 2015: 0.9, 1, 1.1)
    noise: float = 0.0  # probability, per clip
    noise_snr_db: tuple[float, float] = (5.0, 40.0)
    frequency_masks: int = 0
    frequency_width: int = 27  # at most so many mel bands each (arXiv 1904.08779, policy LD)
    time_masks: int = 0
    time_width: int = 100  # at most so many frames of 10 ms each
    time_share: float = 0.2  # at most this part of the clip each

    def waveform(
        self, samples: Waveform, rng: np.random.Generator, max_seconds: float | None = None
    ) -> Waveform:
        """The clip at another speed and with coloured noise; the same array where neither is on.

        A clip that would get longer than `max_seconds` keeps its speed.
        """
        with torch.autocast("cpu", enabled=False):  # the stages run in one, and sound is not for bf16
            return self._waveform(samples, rng, max_seconds)

    def _waveform(self, samples: Waveform, rng: np.random.Generator, max_seconds: float | None) -> Waveform:
        from torchaudio import functional

        factor = float(rng.choice(self.speeds))
        fits = max_seconds is None or len(samples) / factor <= max_seconds * SAMPLE_RATE - 1
        if factor != 1.0 and (factor > 1.0 or fits):
            samples = functional.speed(torch.from_numpy(samples), SAMPLE_RATE, factor)[0].numpy()
        if self.noise and rng.random() < self.noise:
            noise = torch.from_numpy(coloured_noise(len(samples), rng))
            snr = torch.tensor(rng.uniform(*self.noise_snr_db))
            samples = functional.add_noise(torch.from_numpy(samples), noise, snr).float().numpy()
        return samples

    def features(self, log_mel: Tensor, frames: Tensor, seeds: Sequence[int]) -> Tensor:
        """SpecAugment of each clip of [P, F, M] by its own seed, its `frames` [P] real ones alone."""
        if not self.frequency_masks and not self.time_masks:
            return log_mel
        from torchaudio.transforms import SpecAugment

        mask = SpecAugment(
            self.time_masks, self.time_width, self.frequency_masks, self.frequency_width, p=self.time_share
        )
        masked = log_mel.clone()
        with torch.random.fork_rng(devices=[]):  # torchaudio draws from the global generator
            for clip, n, seed in zip(masked, frames.tolist(), seeds, strict=True):
                torch.manual_seed(seed)
                clip[:n] = mask(clip[:n].T[None])[0].T
        return masked


PERTURBATIONS: dict[str, dict[str, Any]] = {
    "spec": {"frequency_masks": 2, "time_masks": 2},
    "speed": {"speeds": (0.9, 1.0, 1.1)},
    "noise": {"noise": 0.5},
}


def perturbation(names: Sequence[str]) -> Perturbation:
    """The named ones together; raises `UserError` that lists what there is."""
    chosen: dict[str, Any] = {}
    for name in names:
        if name not in PERTURBATIONS:
            raise UserError(f"unknown augmentation '{name}'; known: {', '.join(PERTURBATIONS)}")
        chosen |= PERTURBATIONS[name]
    return Perturbation(**chosen)
