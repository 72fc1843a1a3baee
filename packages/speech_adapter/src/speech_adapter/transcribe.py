"""Speech recognition with the recognition prompt of the Llama 3 paper (section 8)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from core_llm.adapters import Assistant
from core_llm.chat import Audio, Message, Text
from core_llm.data.phrases import REPEAT_PROMPT
from core_llm.model import Llama
from core_llm.sampling import Sampling
from core_llm.tokenizer import Tokenizer
from speech_adapter.adapter import SpeechAdapter
from speech_adapter.alignment import Word, align
from speech_adapter.audio import SAMPLE_RATE, Source, blocks
from speech_adapter.long_audio import ChunkSettings, chunks, stitch

Decoder = Literal["core", "ctc"]
TOKENS_PER_SECOND = 8  # faster than anyone speaks; bounds what a core may write about a chunk
_SPARE_TOKENS = 16


@dataclass(frozen=True)
class Segment:
    """A stretch of speech: start and end in seconds, its text, and its words where they could be aligned."""

    start: float
    end: float
    text: str
    words: tuple[Word, ...] = ()


def recognition_request(audio: Audio) -> list[Message]:
    """The conversation that asks a core to write down a clip."""
    return [Message("user", (Text(REPEAT_PROMPT), audio))]


class Recogniser:
    """Writes down clips with a core and its speech adapter, and says when their words were spoken.

    decoder: "core" lets the core repeat what it hears; "ctc" reads the adapter's own CTC head, which knows no
    language but neither stops early nor loops.
    """

    def __init__(
        self,
        core: Llama,
        tokenizer: Tokenizer,
        adapter: SpeechAdapter,
        max_new_tokens: int | None = None,
        decoder: Decoder = "core",
    ) -> None:
        self.assistant = Assistant(core, tokenizer, [adapter])
        self.tokenizer, self.adapter = tokenizer, adapter
        self.max_new_tokens, self.decoder = max_new_tokens, decoder

    def text(self, samples: np.ndarray) -> str:
        """What is said in 16 kHz samples [N], no longer than the adapter takes."""
        if self.decoder == "ctc":
            return self._ctc(samples)
        room = _SPARE_TOKENS + round(TOKENS_PER_SECOND * len(samples) / SAMPLE_RATE)
        settings = Sampling(max_new_tokens=self.max_new_tokens or room)
        return self.assistant.generate([recognition_request(Audio(samples, SAMPLE_RATE))], settings)[0]

    @torch.inference_mode()
    def _ctc(self, samples: np.ndarray) -> str:
        memory = self.adapter.encode(self.adapter.preprocess([Audio(samples, SAMPLE_RATE)]))
        (ids,) = self.adapter.reader.decode(memory.vectors, memory.lengths)
        return " ".join(self.tokenizer.decode(ids).split())

    def words(self, samples: np.ndarray, text: str) -> list[Word]:
        """The words of `text` with their times in the clip; see `alignment.align`."""
        return align(self.adapter, self.tokenizer, samples, text)

    def segments(
        self, data: Source, rate: int | None = None, settings: ChunkSettings | None = None, times: bool = True
    ) -> Iterator[Segment]:
        """What is said in audio of any length, one stretch of speech after the other, in constant memory.

        times: align the words of every segment; without it only those are that must be joined over a seam.
        Raises MediaError for a bad file, after the segments before its damage.
        """
        settings = (settings or ChunkSettings()).within(self.adapter.config.max_seconds)
        waiting: Segment | None = None
        for chunk in chunks(blocks(data, rate), settings):
            start = chunk.start / SAMPLE_RATE
            text = self.text(chunk.samples)
            timed = times or chunk.overlap > 0 or chunk.goes_on
            words = [word.shifted(start) for word in self.words(chunk.samples, text)] if timed else []
            segment = Segment(start + chunk.speech[0], start + chunk.speech[1], text, tuple(words))
            if waiting is not None and chunk.overlap:
                waiting, segment = _joined(waiting, segment, start, start + chunk.overlap / SAMPLE_RATE)
            if waiting is not None and waiting.text:
                yield waiting
            waiting = segment
        if waiting is not None and waiting.text:
            yield waiting


def _joined(left: Segment, right: Segment, start: float, end: float) -> tuple[Segment, Segment]:
    """Two segments that both hold start to end in seconds, without what they would say twice."""
    if (left.text and not left.words) or (right.text and not right.words):
        return left, right  # could not be aligned: better twice than lost
    before, after = stitch(left.words, right.words, start, end)
    cut = (before[-1].end if before else start), (after[0].start if after else end)
    return (
        Segment(left.start, min(left.end, max(cut[0], left.start)), _text(before), tuple(before)),
        Segment(max(right.start, cut[1]), right.end, _text(after), tuple(after)),
    )


def _text(words: list[Word]) -> str:
    return " ".join(word.text for word in words)
