"""What `speech-adapter transcribe` prints: text, JSON lines or subtitles, of files or of a running stream."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core_llm.errors import MediaError, UserError
from speech_adapter import subtitles
from speech_adapter.alignment import Word
from speech_adapter.audio import blocks
from speech_adapter.live import LiveTranscriber, Meter, Update, first_interrupt, microphone, run
from speech_adapter.long_audio import ChunkSettings
from speech_adapter.transcribe import Recogniser, Segment

MICROPHONE = "microphone"


def write_files(
    recogniser: Recogniser,
    files: Sequence[Path],
    settings: ChunkSettings,
    timestamps: bool,
    as_json: bool,
    form: subtitles.Format | None,
) -> int:
    """Print what is said in each file; returns the number of bad files, each one line on stderr."""
    failed = 0
    for file in files:
        segments = recogniser.segments(file, settings=settings, times=bool(timestamps or as_json or form))
        try:
            if form:
                _show(subtitles.lines(segments, form))
            elif as_json:
                _show(_line({"file": str(file), **_segment(segment)}) for segment in segments)
            elif timestamps:
                _show(f"{file}: {line}" for segment in segments for line in _timed(segment))
            else:
                print(f"{file}: {' '.join(segment.text for segment in segments)}", flush=True)
        except MediaError as error:
            failed += 1
            print(f"error: {error}", file=sys.stderr)
    return failed


def write_stream(
    recogniser: Recogniser, source: Path, realtime: bool, timestamps: bool, as_json: bool
) -> None:
    """Print text while it comes, and at the end how late and how fast it came.

    Plain text shows final words only: nothing that is on the screen ever changes. Ctrl-C ends the sound, and
    the last words are still written down.
    """
    with first_interrupt() as stopped:
        _write_stream(recogniser, source, realtime, timestamps, as_json, stopped)


def _write_stream(
    recogniser: Recogniser,
    source: Path,
    realtime: bool,
    timestamps: bool,
    as_json: bool,
    stopped: Callable[[], bool],
) -> None:
    live = str(source) == MICROPHONE and not source.exists()
    pieces = microphone() if live else blocks(source)
    meter = Meter()
    begun = False
    for update in run(LiveTranscriber(recogniser), pieces, meter, realtime and not live, stopped):
        if as_json:
            print(_line(_update(update)), flush=True)
        elif timestamps:
            _show(_spoken(update.words))
        elif update.final or (update.ended and begun):
            print((" " if begun and update.final else "") + " ".join(update.final), end="", flush=True)
            begun = True
        if update.ended and begun and not (as_json or timestamps):
            print(flush=True)
            begun = False
    report = meter.report()
    if as_json:
        print(_line({"type": "report", **report}))
    else:
        print(_sentence(report), file=sys.stderr)


def check(stream: bool, realtime: bool, timestamps: bool, form: str | None, files: Sequence[Path]) -> None:
    """Refuse flags that contradict each other."""
    if not files:
        raise UserError("give at least one audio file: speech-adapter transcribe FILE...")
    if stream and (len(files) > 1 or form):
        raise UserError("--stream takes one file or 'microphone', and writes no subtitles")
    if not stream and (realtime or str(files[0]) == MICROPHONE and not files[0].exists()):
        raise UserError("--realtime and 'microphone' need --stream")
    if form and len(files) > 1:
        raise UserError("--subtitles takes one file")


def _show(lines: Iterator[str]) -> None:
    for line in lines:
        print(line, flush=True)


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False)


def _word(word: Word) -> dict[str, Any]:
    return {name: round(v, 3) if isinstance(v, float) else v for name, v in asdict(word).items()}


def _segment(segment: Segment) -> dict[str, Any]:
    times = {"start": round(segment.start, 3), "end": round(segment.end, 3)}
    return {**times, "text": segment.text, "words": [_word(word) for word in segment.words]}


def _update(update: Update) -> dict[str, Any]:
    return {
        "type": "end" if update.ended else "partial",
        "heard": round(update.heard, 3),
        "final": " ".join(update.final),
        "tentative": " ".join(update.tentative),
        "words": [_word(word) for word in update.words],
    }


def _timed(segment: Segment) -> Iterator[str]:
    if segment.words:
        yield from _spoken(segment.words)
    else:
        yield f"{segment.start:9.2f} {segment.end:9.2f}  {segment.text}"


def _spoken(words: Sequence[Word]) -> Iterator[str]:
    for word in words:
        yield f"{word.start:9.2f} {word.end:9.2f}  {word.text}"


def _sentence(report: dict[str, float]) -> str:
    text = f"{report['seconds']:.1f} s of sound, real-time factor {report['real_time_factor']:.3f}"
    if "first_p50_s" not in report:
        return f"{text}; nobody spoke"
    return (
        f"{text}; after the end of a word: shown {report['first_p50_s']:.2f} s "
        f"(p95 {report['first_p95_s']:.2f}), "
        f"final {report['final_p50_s']:.2f} s (p95 {report['final_p95_s']:.2f})"
    )
