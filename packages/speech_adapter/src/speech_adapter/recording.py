"""An adapter that disturbs features on their way in, and keeps the encoded clips for another loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from core_llm.adapters import Spans
from core_llm.chat import Audio
from speech_adapter.adapter import SpeechAdapter, SpeechInputs, SpeechMemory


class RecordingAdapter:
    """An Adapter for training: `disturb` changes the features, `memory` holds the last encoded clips."""

    part: type = Audio

    def __init__(self, adapter: SpeechAdapter, disturb: Callable[[SpeechInputs], SpeechInputs]) -> None:
        self.adapter, self.disturb = adapter, disturb
        self.memory: SpeechMemory | None = None

    def preprocess(self, parts: Sequence[Any]) -> SpeechInputs:
        """Disturbed features."""
        return self.disturb(self.adapter.preprocess(parts))

    def encode(self, inputs: SpeechInputs) -> SpeechMemory:
        """Encode and remember."""
        self.memory = self.adapter.encode(inputs)
        return self.memory

    def place(self, memory: SpeechMemory) -> list[Tensor]:
        """As the adapter does."""
        return self.adapter.place(memory)

    def interleave(self, memory: SpeechMemory, spans: Spans) -> Mapping[int, Any]:
        """As the adapter does."""
        return self.adapter.interleave(memory, spans)
