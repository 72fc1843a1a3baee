"""Audio of any length in chunks that an adapter can take: cut at pauses, overlapping where nobody pauses.

Frames are 10 ms of 16 kHz samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from core_llm.errors import UserError
from speech_adapter.alignment import Word
from speech_adapter.features import HOP
from speech_adapter.vad import FRAMES_PER_SECOND, VadSettings, VoiceActivity, runs, smooth

_SAME_WORD_S = 0.3  # the two hearings of one word in an overlap begin at most so far apart


@dataclass(frozen=True)
class ChunkSettings:
    """Where to cut; times in seconds."""

    pause_s: float = 0.4  # silence that ends an utterance
    window_s: float = 20.0  # longest utterance; one that goes on is cut
    overlap_s: float = 2.0  # of two windows where there is no pause to cut at; longer than a word
    margin_s: float = 0.3  # silence kept around an utterance
    short_pause_s: float = 0.1  # good enough to cut a too long utterance
    vad: VadSettings = VadSettings()

    def __post_init__(self) -> None:
        if not self.overlap_s > 0 or self.window_s < 3 * self.overlap_s:
            raise UserError("a window must be at least three times as long as its overlap, and that positive")

    def within(self, max_seconds: float) -> ChunkSettings:
        """The same with windows, margins included, that an adapter with this limit takes."""
        window = min(self.window_s, max_seconds - 2 * self.margin_s)
        return replace(self, window_s=window, overlap_s=min(self.overlap_s, window / 3))


@dataclass(frozen=True, eq=False)
class Chunk:
    """Samples [N] from sample `start` of the recording, with speech from `speech[0]` to `speech[1]` seconds.

    overlap: how many of its first samples are the last ones of the chunk before; goes_on: whether the next
    chunk overlaps with this one.
    """

    start: int
    samples: np.ndarray
    speech: tuple[float, float]
    overlap: int = 0
    goes_on: bool = False


def chunks(blocks: Iterable[np.ndarray], settings: ChunkSettings | None = None) -> Iterator[Chunk]:
    """16 kHz blocks → chunks with all speech that is in them; what is silent is left out.

    How the recording is cut into blocks does not matter. Memory holds one window.
    """
    chunker = _Chunker(settings or ChunkSettings())
    for block in blocks:
        # Small steps: what waits for a decision stays bounded for blocks of any size.
        for i in range(0, len(block), _STEP):
            yield from chunker.feed(block[i : i + _STEP])
    yield from chunker.finish()


_STEP = HOP * FRAMES_PER_SECOND


class _Chunker:
    def __init__(self, settings: ChunkSettings) -> None:
        self.settings = settings
        self.detector = VoiceActivity(settings.vad)
        self.samples = np.zeros(0, dtype=np.float32)
        self.decisions = np.zeros(0, dtype=bool)  # of the samples' first frames
        self.base = 0  # frame of the recording where both begin
        self.overlap = 0  # frames at their begin that an earlier chunk has too
        self.inside = False  # the utterance began before them

    def feed(self, samples: np.ndarray) -> Iterator[Chunk]:
        self.samples = np.concatenate((self.samples, samples))
        self.decisions = np.concatenate((self.decisions, self.detector.feed(samples)))
        yield from self._cut(last=False)

    def finish(self) -> Iterator[Chunk]:
        self.decisions = np.concatenate((self.decisions, self.detector.finish()))
        yield from self._cut(last=True)

    def _cut(self, last: bool) -> Iterator[Chunk]:
        s = self.settings
        pause, margin, window = (_frames(t) for t in (s.pause_s, s.margin_s, s.window_s))
        # The last decisions can still change when their successors are smoothed with them.
        unsure = 0 if last else (s.vad.gap_ms + s.vad.padding_ms + s.vad.min_speech_ms) // 10
        while True:
            known = len(self.decisions) - unsure
            if known <= 0:
                return
            speech = runs(smooth(self.decisions, s.vad)[:known])
            if not speech and not self.inside:
                self._drop(known if last else max(0, known - margin))
                return
            begin = 0 if self.inside else max(0, speech[0][0] - margin)
            self._drop(begin)
            known -= begin
            end = _end_of_utterance([(a - begin, b - begin) for a, b in speech], pause)
            if end <= window and (last or end + pause <= known):
                # The margins of two utterances share the silence between them.
                trail = end + (min(margin, known - end) if last else min(margin, pause // 2))
                yield self._chunk(trail, end)
                self._drop(trail)
                self.inside, self.overlap = False, 0
            elif known > window + pause or (last and end > window):
                yield self._window(window)
            else:
                return

    def _window(self, window: int) -> Chunk:
        """Cut an utterance that is too long: at its longest short pause, else with an overlap."""
        s = self.settings
        first = window // 2
        holes = runs(~self.decisions[first:window])
        longest = max(holes, key=lambda run: run[1] - run[0], default=(0, 0))
        if longest[1] - longest[0] >= _frames(s.short_pause_s):
            cut = first + sum(longest) // 2
            chunk = self._chunk(cut, cut)
            self._drop(cut)
            self.overlap = 0
        else:
            chunk = replace(self._chunk(window, window), goes_on=True)
            self.overlap = _frames(s.overlap_s)
            self._drop(window - self.overlap)
        self.inside = True
        return chunk

    def _chunk(self, end: int, speech_end: int) -> Chunk:
        flags = smooth(self.decisions[:end], self.settings.vad)
        first = int(flags.argmax()) if flags.any() else 0
        samples = self.samples[: end * HOP].copy()
        times = first / FRAMES_PER_SECOND, speech_end / FRAMES_PER_SECOND
        return Chunk(self.base * HOP, samples, times, self.overlap * HOP)

    def _drop(self, frames: int) -> None:
        self.samples, self.decisions = self.samples[frames * HOP :], self.decisions[frames:]
        self.base += frames


def _frames(seconds: float) -> int:
    return round(seconds * FRAMES_PER_SECOND)


def _end_of_utterance(speech: Sequence[tuple[int, int]], pause: int) -> int:
    """The end of the first run and of those that follow it without a pause; 0 where there is none."""
    end = speech[0][1] if speech else 0
    for start, stop in speech[1:]:
        if start - end >= pause:
            break
        end = stop
    return end


def stitch(
    left: Sequence[Word], right: Sequence[Word], start: float, end: float
) -> tuple[list[Word], list[Word]]:
    """Words of two windows that both hold start to end in seconds → the same without what stands in both.

    Where both heard the same word at the same time they are joined there, at the one nearest to the middle;
    else in the middle, where neither window had cut a word in two.
    """
    middle = (start + end) / 2
    pairs = [
        (abs((word.start + word.end) / 2 - middle), i, j)
        for i, word in enumerate(left)
        for j, other in enumerate(right)
        if word.text == other.text and abs(word.start - other.start) <= _SAME_WORD_S and word.end > start
    ]
    if pairs:
        _, i, j = min(pairs)
        return list(left[: i + 1]), list(right[j + 1 :])
    return (
        [word for word in left if (word.start + word.end) / 2 < middle],
        [word for word in right if (word.start + word.end) / 2 >= middle],
    )
