"""Where in a recording somebody speaks: adaptive noise floors in mel bands, with hysteresis and hangover.

Every band's noise floor is the minimum of its smoothed power over the last seconds (minimum statistics,
Martin 2001). A frame's score is the mean over the bands of how far it stands above that floor; a frame is
speech above one threshold, and stays it down to a lower one. Works at any level, in constant memory.

Axes: N samples at 16 kHz, F frames of 10 ms, K bands.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from speech_adapter.audio import SAMPLE_RATE
from speech_adapter.features import HOP, N_FFT, mel_filters

FRAMES_PER_SECOND = SAMPLE_RATE // HOP
_BLOCK = 10  # frames that are decided together
_SMOOTHING = 0.7  # of a band's power from frame to frame, for the floor only
_TINY = 1e-14  # power of what is only digital zero


@dataclass(frozen=True)
class VadSettings:
    """Decisions and their smoothing; times in milliseconds, levels in decibels."""

    on_db: float = 4.0  # mean height above the floors where speech begins
    off_db: float = 2.0  # and where it ends
    ceiling_db: float = 15.0  # no band counts for more
    bias_db: float = 3.0  # by which a minimum of noise lies below its mean
    range_db: float = 45.0  # below the loudest band of the last `memory_s`: not meant to be heard
    floor_s: float = 2.0  # seconds over which the minimum is taken
    memory_s: float = 10.0
    look_ahead_ms: int = 500  # of the floor; a decision comes this much later
    gap_ms: int = 200  # a shorter hole in speech is speech: closures of plosives
    min_speech_ms: int = 50  # a shorter burst is a click
    padding_ms: int = 60  # added at both ends: weak onsets and fading ends


class VoiceActivity:
    """Blocks of samples in, raw decisions of 10 ms frames out; frame f is samples 160 f to 160 f + 160.

    Decisions come `look_ahead_ms` and up to 100 ms after their samples; `finish` gives the rest.
    """

    def __init__(self, settings: VadSettings | None = None) -> None:
        self.settings = settings or VadSettings()
        filters = mel_filters().numpy().astype(np.float32)
        # Four neighbours make a band: a single mel band of noise jumps too much.
        self._filters = filters.reshape(-1, 4, filters.shape[1]).sum(axis=1).T
        self._window = np.hanning(N_FFT + 1)[:N_FFT].astype(np.float32)
        # The first window is centred on the first frame.
        self._rest = np.zeros((N_FFT - HOP) // 2, dtype=np.float32)
        self._power = np.zeros((0, self._filters.shape[1]), dtype=np.float32)
        self._smooth: np.ndarray | None = None
        n_floor = round(self.settings.floor_s * FRAMES_PER_SECOND / _BLOCK)
        self._ahead = round(self.settings.look_ahead_ms / 1000 * FRAMES_PER_SECOND / _BLOCK)
        self._minima: deque[np.ndarray] = deque(maxlen=n_floor + self._ahead)
        self._maxima: deque[float] = deque(maxlen=round(self.settings.memory_s * FRAMES_PER_SECOND / _BLOCK))
        self._waiting: deque[np.ndarray] = deque()
        self._speaking = False
        self._samples = self._decided = 0

    def feed(self, samples: np.ndarray) -> np.ndarray:
        """Samples [n] → the decisions that are certain by now, bool [f]."""
        self._samples += len(samples)
        return self._advance(samples, last=False)

    def finish(self) -> np.ndarray:
        """The remaining decisions, bool [f]; all together there is one for every started 10 ms."""
        missing = -(-self._samples // HOP) - self._decided
        edge = np.zeros(N_FFT, dtype=np.float32)
        decisions = self._advance(edge, last=True)[:missing]
        return np.pad(decisions, (0, missing - len(decisions)))

    def _advance(self, samples: np.ndarray, last: bool) -> np.ndarray:
        self._power = np.concatenate((self._power, self._spectrum(samples)))
        found = []
        while len(self._power) >= _BLOCK or (last and len(self._power)):
            block, self._power = self._power[:_BLOCK], self._power[_BLOCK:]
            self._remember(block)
            if len(self._waiting) > self._ahead:
                found.append(self._decide(self._waiting.popleft()))
        if last:
            found += [self._decide(block) for block in self._waiting]
            self._waiting.clear()
        decisions = np.concatenate(found) if found else np.zeros(0, dtype=bool)
        self._decided += len(decisions)
        return decisions

    def _spectrum(self, samples: np.ndarray) -> np.ndarray:
        """New samples [n] → band powers of the frames that they complete [f, K]."""
        signal = np.concatenate((self._rest, samples.astype(np.float32, copy=False)))
        n = max(0, (len(signal) - N_FFT) // HOP + 1)
        self._rest = signal[n * HOP :]
        if n == 0:
            return np.zeros((0, self._filters.shape[1]), dtype=np.float32)
        frames = np.lib.stride_tricks.sliding_window_view(signal, N_FFT)[: n * HOP : HOP]
        parts = []
        for i in range(0, n, 1000):  # bounded memory for a long block
            spectrum = np.fft.rfft(frames[i : i + 1000] * self._window)
            parts.append((spectrum.real**2 + spectrum.imag**2) @ self._filters)
        return np.concatenate(parts).astype(np.float32)

    def _remember(self, block: np.ndarray) -> None:
        smooth = np.empty_like(block)
        state = block[0] if self._smooth is None else self._smooth
        for i, power in enumerate(block):
            state = _SMOOTHING * state + (1 - _SMOOTHING) * power
            smooth[i] = state
        self._smooth = state
        self._minima.append(smooth.min(axis=0))
        self._maxima.append(float(block.max()))
        self._waiting.append(block)

    def _decide(self, block: np.ndarray) -> np.ndarray:
        settings = self.settings
        floor = np.min(self._minima, axis=0) * 10 ** (settings.bias_db / 10)
        floor = np.maximum(floor, max(max(self._maxima) * 10 ** (-settings.range_db / 10), _TINY))
        height = 10 * np.log10(np.maximum(block, _TINY) / floor)
        scores = height.clip(0.0, settings.ceiling_db).mean(axis=1)
        decisions = np.empty(len(scores), dtype=bool)
        for i, score in enumerate(scores):
            self._speaking = bool(score > (settings.off_db if self._speaking else settings.on_db))
            decisions[i] = self._speaking
        return decisions


def smooth(decisions: np.ndarray, settings: VadSettings | None = None) -> np.ndarray:
    """Raw decisions [F] → the same without clicks and short holes, and with padded ends, bool [F]."""
    settings = settings or VadSettings()
    result = decisions.copy()
    for start, end in runs(result):
        if (end - start) * 10 < settings.min_speech_ms:
            result[start:end] = False
    for start, end in runs(~result):
        if start > 0 and end < len(result) and (end - start) * 10 < settings.gap_ms:
            result[start:end] = True
    padding = settings.padding_ms // 10
    for start, end in runs(result):
        result[max(0, start - padding) : end + padding] = True
    return result


def runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """Begin and end (exclusive) of every run of True in bool [F]."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def speech_segments(
    samples: np.ndarray | Iterable[np.ndarray], settings: VadSettings | None = None
) -> list[tuple[float, float]]:
    """Start and end in seconds of every stretch of speech in 16 kHz samples [N] or blocks of them."""
    decisions = np.concatenate(list(_decisions(samples, settings)))
    return [
        (start / FRAMES_PER_SECOND, end / FRAMES_PER_SECOND)
        for start, end in runs(smooth(decisions, settings))
    ]


def _decisions(
    samples: np.ndarray | Iterable[np.ndarray], settings: VadSettings | None
) -> Iterator[np.ndarray]:
    detector = VoiceActivity(settings)
    for block in [samples] if isinstance(samples, np.ndarray) else samples:
        yield detector.feed(block)
    yield detector.finish()
