"""Speech recognition with the recognition prompt of the Llama 3 paper (section 8)."""

from __future__ import annotations

from pathlib import Path

from core_llm.adapters import Assistant
from core_llm.chat import Audio, Message, Text
from core_llm.data.phrases import REPEAT_PROMPT
from core_llm.model import Llama
from core_llm.sampling import Sampling
from core_llm.tokenizer import Tokenizer
from speech_adapter.adapter import SpeechAdapter


def recognition_request(audio: Audio) -> list[Message]:
    """The conversation that asks a core to write down a clip."""
    return [Message("user", (Text(REPEAT_PROMPT), audio))]


def transcribe_file(
    file: Path, core: Llama, tokenizer: Tokenizer, adapter: SpeechAdapter, max_new_tokens: int = 64
) -> str:
    """What is said in one audio file; raises MediaError that names a bad one."""
    assistant = Assistant(core, tokenizer, [adapter])
    settings = Sampling(max_new_tokens=max_new_tokens)
    return assistant.generate([recognition_request(Audio(file))], settings)[0].strip()
