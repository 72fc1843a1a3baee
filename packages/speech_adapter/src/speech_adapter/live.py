"""Text while somebody still speaks: the current utterance is heard again and again, and what two hearings
agree on is final. Source of the agreement: Liu et al. 2020 (arXiv 2005.11185), "local agreement".

An utterance ends at a pause or, when it gets too long, after the last final word, so that time and memory of
a hearing are bounded. Final words never change.
"""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from core_llm.errors import MediaError, UserError
from speech_adapter.alignment import Word
from speech_adapter.audio import SAMPLE_RATE, Resampler
from speech_adapter.transcribe import Recogniser
from speech_adapter.vad import FRAMES_PER_SECOND, VadSettings, VoiceActivity, runs, smooth

MIC_HINT = "no microphone support: install it with pip install 'speech-adapter[mic]' (it needs PortAudio)"


@dataclass(frozen=True)
class LiveSettings:
    """Times in seconds."""

    step_s: float = 0.32  # new sound between two hearings
    pause_s: float = 0.5  # silence that ends an utterance
    window_s: float = 12.0  # longest utterance
    margin_s: float = 0.3  # silence kept before one
    vad: VadSettings = VadSettings(look_ahead_ms=200)


@dataclass(frozen=True)
class Update:
    """What a hearing gave: newly final words, words that may still change, whether the utterance ended.

    heard: seconds of sound so far; words: all words of an ended utterance with their times.
    """

    final: tuple[str, ...]
    tentative: tuple[str, ...]
    ended: bool
    heard: float
    words: tuple[Word, ...] = ()


class LiveTranscriber:
    """Sound in pieces of any length in, updates out."""

    def __init__(self, recogniser: Recogniser, settings: LiveSettings | None = None) -> None:
        self.recogniser = recogniser
        self.settings = settings or LiveSettings()
        # A window may grow by a hearing's new sound before it is cut.
        limit = recogniser.adapter.config.max_seconds - self.settings.step_s
        if limit < self.settings.step_s:
            raise UserError(
                f"this adapter takes {limit + self.settings.step_s:g} s at most: too short to stream"
            )
        self.window_s = min(self.settings.window_s, limit)
        self.detector = VoiceActivity(self.settings.vad)
        self.samples = np.zeros(0, dtype=np.float32)
        self.decisions = np.zeros(0, dtype=bool)
        self.base = 0  # sample of the recording where the samples begin
        self.heard = 0  # samples so far
        self._next = round(self.settings.step_s * SAMPLE_RATE)
        self._final: list[str] = []
        self._before: list[str] = []

    def feed(self, samples: np.ndarray) -> Iterator[Update]:
        """16 kHz samples [n]; a hearing follows every `step_s` of them."""
        while len(samples):
            n = min(len(samples), self._next - self.heard)
            part, samples = samples[:n], samples[n:]
            self.samples = np.concatenate((self.samples, part))
            self.decisions = np.concatenate((self.decisions, self.detector.feed(part)))
            self.heard += n
            if self.heard == self._next:
                self._next += round(self.settings.step_s * SAMPLE_RATE)
                yield from self._hear(last=False)

    def finish(self) -> Iterator[Update]:
        """The recording has ended."""
        self.decisions = np.concatenate((self.decisions, self.detector.finish()))
        yield from self._hear(last=True)

    def _hear(self, last: bool) -> Iterator[Update]:
        s = self.settings
        pause, margin = (round(t * FRAMES_PER_SECOND) for t in (s.pause_s, s.margin_s))
        while True:
            speech = runs(smooth(self.decisions, s.vad))
            if not speech:
                if not self._final and not self._before:
                    self._drop(max(0, len(self.decisions) - margin))
                    return
                speech = [(0, len(self.decisions))]
            if not self._before:
                begin = max(0, speech[0][0] - margin)
                self._drop(begin)
                speech = [(a - begin, b - begin) for a, b in speech]
            end = speech[0][1]
            for a, b in speech[1:]:
                if a - end >= pause:
                    break
                end = b
            if last or end + pause <= len(self.decisions):
                yield self._ended(None if last else min(end + pause // 2, len(self.decisions)))
                if last and not len(self.samples):
                    return
                continue
            yield self._partial()
            if len(self.samples) > self.window_s * SAMPLE_RATE:
                yield self._shortened()
            return

    def _partial(self) -> Update:
        words = self.recogniser.text(self.samples).split()
        agreed = 0
        # The last word may be cut in two, so it never becomes final here.
        for a, b in zip(words[:-1], self._before, strict=False):
            if a != b:
                break
            agreed += 1
        new = words[len(self._final) : agreed]
        self._final += new
        self._before = words
        return Update(tuple(new), tuple(words[len(self._final) :]), False, self.heard / SAMPLE_RATE)

    def _ended(self, frames: int | None) -> Update:
        """Everything of the utterance becomes final; what was final stays as it was."""
        n = len(self.samples) if frames is None else frames * SAMPLE_RATE // FRAMES_PER_SECOND
        samples = self.samples[:n]
        new = self.recogniser.text(samples).split()[len(self._final) :]
        update = self._close(samples, self._final + new, tuple(new))
        self._drop(len(self.decisions) if frames is None else frames)
        if frames is None:
            self.samples = self.samples[:0]
        return update

    def _shortened(self) -> Update:
        """An utterance without a pause: close it after its last final word, and go on from there."""
        text = self._final or self._before
        new = () if self._final else tuple(self._before)
        known = self.recogniser.words(self.samples, " ".join(self._before))
        end = known[len(text) - 1].end if len(known) >= len(text) > 0 else len(self.samples) / SAMPLE_RATE
        frames = min(round(end * FRAMES_PER_SECOND), len(self.decisions))
        update = self._close(self.samples[: frames * SAMPLE_RATE // FRAMES_PER_SECOND], text, new)
        self._drop(frames)
        return update

    def _close(self, samples: np.ndarray, words: list[str], new: tuple[str, ...]) -> Update:
        start = self.base / SAMPLE_RATE
        timed = tuple(word.shifted(start) for word in self.recogniser.words(samples, " ".join(words)))
        self._final, self._before = [], []
        return Update(new, (), True, self.heard / SAMPLE_RATE, timed)

    def _drop(self, frames: int) -> None:
        n = frames * SAMPLE_RATE // FRAMES_PER_SECOND
        self.samples, self.decisions = self.samples[n:], self.decisions[frames:]
        self.base += n


@dataclass
class Meter:
    """Latency and speed of a stream.

    The clock is that of a listener at real time: it stands where the sound is, or later when the computing
    before took longer than the sound. A word's latency runs from the end of its sound to its appearance.
    """

    clock: float = 0.0
    busy: float = 0.0
    heard: float = 0.0
    first: list[float] = field(default_factory=list)  # seconds until a word first appeared, final or not
    final: list[float] = field(default_factory=list)  # until it was final
    _seen: dict[tuple[int, str], float] = field(default_factory=dict)
    _done: list[float] = field(default_factory=list)

    def note(self, update: Update, seconds: float) -> None:
        """An update that took `seconds` to compute."""
        self.busy += seconds
        self.heard = update.heard
        self.clock = max(self.clock, update.heard) + seconds
        shown = len(self._done)
        for i, word in enumerate((*update.final, *update.tentative)):
            self._seen.setdefault((shown + i, word), self.clock)
        self._done += [self.clock] * len(update.final)
        if update.ended:
            for i, timed in enumerate(update.words[: len(self._done)]):
                self.first.append(self._seen[i, timed.text] - timed.end)
                self.final.append(self._done[i] - timed.end)
            self._seen, self._done = {}, []

    def report(self) -> dict[str, float]:
        """Medians and 95th percentiles in seconds, and the real-time factor (computing per sound)."""
        figures = {"seconds": self.heard, "real_time_factor": self.busy / max(self.heard, 1e-9)}
        for name, values in (("first", self.first), ("final", self.final)):
            for share in (50, 95) if values else ():
                figures[f"{name}_p{share}_s"] = float(np.percentile(values, share))
        return {name: round(value, 3) for name, value in figures.items()}


@contextmanager
def first_interrupt() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed; the first is only noted, so that what was heard can be written down.

    The second interrupts as ever.
    """
    pressed: list[int] = []

    def note(number: int, frame: Any) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread may ask for signals
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def run(
    transcriber: LiveTranscriber,
    pieces: Iterator[np.ndarray],
    meter: Meter,
    realtime: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Update]:
    """Updates of a stream of 16 kHz pieces; `realtime` waits until each piece would have been spoken.

    Once `stopped` says so no more is heard; the last words still come.
    """
    began, spoken = time.monotonic(), 0
    for block in pieces:
        for i in range(0, len(block), _PIECE):
            if stopped():
                break
            piece = block[i : i + _PIECE]
            spoken += len(piece)
            if realtime:
                time.sleep(max(0.0, began + spoken / SAMPLE_RATE - time.monotonic()))
            yield from _timed(transcriber.feed(piece), meter)
        if stopped():
            break
    yield from _timed(transcriber.finish(), meter)


_PIECE = SAMPLE_RATE * 20 // 1000


def _timed(updates: Iterator[Update], meter: Meter) -> Iterator[Update]:
    while True:
        began = time.perf_counter()
        update = next(updates, None)
        if update is None:
            return
        meter.note(update, time.perf_counter() - began)
        yield update


def microphone() -> Iterator[np.ndarray]:
    """16 kHz pieces from the default input device until Ctrl-C; one clear error where there is none."""
    try:
        import sounddevice
    except (ImportError, OSError):  # OSError: the package is there, PortAudio is not
        raise UserError(MIC_HINT) from None
    pieces: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()

    def keep(data: np.ndarray, frames: int, when: Any, status: Any) -> None:
        pieces.put(data[:, 0].copy())

    try:
        rate = int(sounddevice.query_devices(kind="input")["default_samplerate"])
        stream = sounddevice.InputStream(samplerate=rate, channels=1, dtype="float32", callback=keep)
        stream.start()
    except (sounddevice.PortAudioError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise MediaError(f"microphone: no input device can be opened ({reason}): plug one in") from None
    resampler = Resampler(rate)
    with closing(stream):
        try:
            while True:
                yield resampler.feed(pieces.get())
        except KeyboardInterrupt:  # the normal end: what was said so far is still written down
            return
