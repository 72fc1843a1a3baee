"""When each word of a transcript was said: forced alignment over the adapter's CTC head.

Axes: N samples at 16 kHz, T adapter frames (80 ms), L tokens of the text, U distinct ones of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core_llm.chat import Audio
from core_llm.tokenizer import Tokenizer
from speech_adapter.adapter import SpeechAdapter
from speech_adapter.audio import SAMPLE_RATE
from speech_adapter.ctc import FRAME_SECONDS
from speech_adapter.features import HOP
from speech_adapter.vad import runs

STEP = 2 * FRAME_SECONDS  # seconds per adapter frame
# Adapter frame t is a convolution centred on encoder frame 2t, whose middle lies half a frame on.
_CENTRE = FRAME_SECONDS / 2
_QUIET_DB, _NOISE_DB = 35.0, 6.0  # quiet: so far below the loudest frame, or so near the noise
_PARTING, _CLOSURE = 3, 12  # frames of 10 ms: a quiet stretch between two words; longer than in any word
# Where between two CTC peaks words part, and what it costs to lie elsewhere: CTC says a word soon after it
# begins. Chosen on 96 utterances of four digits in held-out voices.
_PLACE, _LONGER, _LOUDER = 0.8, 0.4, 0.6  # part of the way; frames of quiet per frame; dB per frame


@dataclass(frozen=True)
class Word:
    """A word with its start and end in seconds, and the geometric mean probability of its frames."""

    text: str
    start: float
    end: float
    score: float

    def shifted(self, seconds: float) -> Word:
        """The same word, later."""
        return Word(self.text, self.start + seconds, self.end + seconds, self.score)


@torch.inference_mode()
def align(adapter: SpeechAdapter, tokenizer: Tokenizer, samples: np.ndarray, text: str) -> list[Word]:
    """The words of `text` as they were said in 16 kHz samples [N], in order; [] where they cannot fit.

    A text with more tokens than the clip has frames of 80 ms cannot have been said in it. Words are what
    white space separates.
    """
    ids, groups = _words_of(text, tokenizer)
    if not ids:
        return []
    memory = adapter.encode(adapter.preprocess([Audio(samples, SAMPLE_RATE)]))
    scores = adapter.reader(memory.vectors)[0, : int(memory.lengths[0])]
    spans = _spans(scores.cpu(), ids, adapter.reader.blank_id)
    if not spans:
        return []
    shift = _CENTRE - STEP / 2 - adapter.config.edge_ms / 1000
    peaks = [(spans[a][0] * STEP + shift, spans[b][1] * STEP + shift) for _, a, b in groups]
    words = []
    for (name, a, b), (start, end) in zip(groups, _boundaries(samples, peaks), strict=True):
        mean = sum(span[2] for span in spans[a : b + 1]) / (b + 1 - a)
        words.append(Word(name, start, end, float(np.exp(mean))))
    return words


def _boundaries(samples: np.ndarray, peaks: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Where words start and end, in seconds, around the frames in which CTC says them.

    CTC says a word in a frame or two in its midst. Between two of them the words part at the longest quiet
    stretch or, where there is none, at the quietest point, but rather shortly before the second than within
    the first, whose plosives are quiet too. The first and the last word reach to where it is quiet for longer
    than a plosive's closure.
    """
    level = _level(samples)
    quiet = level < max(level.max() - _QUIET_DB, float(np.quantile(level, 0.05)) + _NOISE_DB)
    n = len(level)
    frames = [(min(max(round(a * 100), 0), n - 1), min(max(round(b * 100), 1), n)) for a, b in peaks]
    starts, ends = [_outwards(quiet[: frames[0][0]][::-1], frames[0][0], -1)], []
    for (_, before), (after, _) in zip(frames, frames[1:], strict=False):
        start, end = _parting(level, quiet, before, max(after, before))
        ends.append(start)
        starts.append(end)
    ends.append(_outwards(quiet[frames[-1][1] :], frames[-1][1], 1))
    seconds = len(samples) / SAMPLE_RATE
    return [(min(a / 100, seconds), min(b / 100, seconds)) for a, b in zip(starts, ends, strict=True)]


def _parting(level: np.ndarray, quiet: np.ndarray, before: int, after: int) -> tuple[int, int]:
    """Where one word ends and the next begins, frames between the peaks `before` and `after`."""
    expected = before + _PLACE * (after - before)
    pauses = [(before + a, before + b) for a, b in runs(quiet[before:after]) if b - a >= _PARTING]
    if pauses:
        return max(pauses, key=lambda run: run[1] - run[0] - _LONGER * abs(sum(run) / 2 - expected))
    if after == before:
        return before, before
    away = np.abs(np.arange(before, after) - expected)
    quietest = before + int((level[before:after] + _LOUDER * away).argmin())
    return quietest, quietest


def _outwards(quiet: np.ndarray, origin: int, direction: int) -> int:
    """The frame where the sound ends for good, looking at `quiet` away from `origin`."""
    for start, end in runs(quiet):
        if end - start >= _CLOSURE or end == len(quiet):
            return origin + direction * start
    return origin + direction * len(quiet)


def _level(samples: np.ndarray) -> np.ndarray:
    """Level in dB of each 10 ms with its neighbours; high frequencies raised for the fricatives."""
    raised = np.diff(samples, prepend=samples[:1] * 0)
    n = -(-len(raised) // HOP)
    power = np.pad(raised, (0, n * HOP - len(raised))).reshape(n, HOP)
    smooth = np.convolve(np.square(power, dtype=np.float64).mean(axis=1), np.ones(3) / 3, mode="same")
    return 10 * np.log10(np.maximum(smooth, 1e-20))


def _words_of(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[tuple[str, int, int]]]:
    """Token ids of a text and, per word, its name and the indices of its first and last token."""
    ids: list[int] = []
    groups = []
    for word in text.split():
        # As in training, where every word follows a space.
        tokens = tokenizer.encode(" " + word)
        groups.append((word, len(ids), len(ids) + len(tokens) - 1))
        ids += tokens
    return ids, groups


def _spans(scores: Tensor, ids: Sequence[int], blank: int) -> list[tuple[int, int, float]]:
    """Log-probabilities [T, V + 1] → per token its first frame, the one after its last, and mean score."""
    import torchaudio.functional as audio

    repeats = sum(a == b for a, b in zip(ids, ids[1:], strict=False))
    if len(ids) + repeats > len(scores):
        return []
    # The alignment looks at the text's own tokens only: U + 1 columns instead of the vocabulary.
    distinct = sorted(set(ids))
    columns = scores[:, [blank, *distinct]].float().contiguous()
    place = {token: i + 1 for i, token in enumerate(distinct)}
    targets = torch.tensor([[place[token] for token in ids]])
    path, frame_scores = audio.forced_align(columns[None], targets, blank=0)
    tokens = audio.merge_tokens(path[0], frame_scores[0], blank=0)
    return [(span.start, span.end, span.score) for span in tokens]
