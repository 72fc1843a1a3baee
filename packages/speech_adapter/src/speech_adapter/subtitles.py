"""Segments as SubRip (.srt) or WebVTT (.vtt) subtitles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

from speech_adapter.transcribe import Segment

Format = Literal["srt", "vtt"]
MAX_CHARACTERS = 84  # two lines of 42
MAX_SECONDS = 7.0


def cues(segments: Iterable[Segment]) -> Iterator[tuple[float, float, str]]:
    """Start, end in seconds and text of each cue: short enough to be read, never cut within a word."""
    for segment in segments:
        if not segment.words:
            yield segment.start, segment.end, segment.text
            continue
        group = [segment.words[0]]
        for word in segment.words[1:]:
            text = " ".join(w.text for w in (*group, word))
            if len(text) > MAX_CHARACTERS or word.end - group[0].start > MAX_SECONDS:
                yield group[0].start, group[-1].end, " ".join(w.text for w in group)
                group = []
            group.append(word)
        yield group[0].start, group[-1].end, " ".join(w.text for w in group)


def lines(segments: Iterable[Segment], form: Format) -> Iterator[str]:
    """The lines of a subtitle file, one cue after the other."""
    if form == "vtt":
        yield from ("WEBVTT", "")
    for i, (start, end, text) in enumerate(cues(segments), 1):
        if form == "srt":
            yield str(i)
        yield f"{clock(start, form)} --> {clock(end, form)}"
        # "-->" would end a cue, and < and & begin markup in WebVTT.
        text = text.replace("-->", "->")
        yield text.replace("&", "&amp;").replace("<", "&lt;") if form == "vtt" else text
        yield ""


def clock(seconds: float, form: Format) -> str:
    """00:00:01,500 (srt) or 00:00:01.500 (vtt)."""
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    separator = "," if form == "srt" else "."
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}{separator}{rest % 1000:03d}"
