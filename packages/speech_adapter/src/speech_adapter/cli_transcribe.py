"""The command `speech-adapter transcribe`. Heavy modules load inside it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from core_llm.cli_tools import Switch
from core_llm.errors import UserError


def transcribe(
    files: Annotated[tuple[Path, ...], tyro.conf.Positional],
    core: str = "nano",
    adapter: str = "nano",
    decoder: Literal["core", "ctc"] = "core",
    max_new_tokens: int = 0,
    window_seconds: float = 20.0,
    timestamps: Switch = 0,
    json: Switch = 0,
    subtitles: Literal["srt", "vtt"] | None = None,
    stream: Switch = 0,
    realtime: Switch = 0,
) -> None:
    """Write down what is said in audio files of any length (WAV, FLAC, OGG, Opus, MP3): one line per file.

    Args:
        files: audio files; with --stream one file, or "microphone".
        core: "nano" or a folder with a core.
        adapter: "nano" or a folder with a speech adapter for that core.
        decoder: "core" lets the core repeat what it hears; "ctc" reads the adapter's own CTC head: quicker,
            and better where nobody pauses for longer than the core was trained on.
        max_new_tokens: longest transcript of a stretch of speech, in tokens of the core; 0: as its length
            allows.
        window_seconds: speech that goes on for longer without a pause is cut, with overlap.
        timestamps: one line per word: its start and end in seconds.
        json: JSON lines, one per stretch of speech (with --stream one per update), with word times.
        subtitles: print SubRip or WebVTT subtitles.
        stream: print words as soon as they are final, and how late they came at the end.
        realtime: with --stream and a file, at the pace of speaking instead of as fast as possible.
    """
    from speech_adapter import write_down

    write_down.check(bool(stream), bool(realtime), bool(timestamps), subtitles, files)
    if max_new_tokens < 0:
        raise UserError("--max-new-tokens must be 0 or more")
    from core_llm.checkpoint import load_core
    from speech_adapter.adapter import load
    from speech_adapter.long_audio import ChunkSettings
    from speech_adapter.transcribe import Recogniser

    if not window_seconds >= 1:
        raise UserError("--window-seconds must be at least 1")
    settings = ChunkSettings(window_s=window_seconds, overlap_s=min(2.0, window_seconds / 3))
    llama, tokenizer = load_core(core)
    recogniser = Recogniser(llama, tokenizer, load(adapter, llama), max_new_tokens or None, decoder)
    if stream:
        write_down.write_stream(recogniser, files[0], bool(realtime), bool(timestamps), bool(json))
    elif write_down.write_files(recogniser, files, settings, bool(timestamps), bool(json), subtitles):
        sys.exit(2)
