from speech_adapter.alignment import Word
from speech_adapter.subtitles import MAX_SECONDS, clock, cues, lines
from speech_adapter.transcribe import Segment


def test_clocks() -> None:
    assert clock(3661.0015, "srt") == "01:01:01,002" and clock(0.5, "vtt") == "00:00:00.500"
    assert clock(59.9996, "vtt") == "00:01:00.000"


def test_a_subtitle_file() -> None:
    segments = [Segment(0.5, 1.5, "a < b & c"), Segment(2.0, 3.0, "hello", (Word("hello", 2.1, 2.9, 1.0),))]
    assert list(lines(segments, "srt")) == [
        *("1", "00:00:00,500 --> 00:00:01,500", "a < b & c", ""),
        *("2", "00:00:02,100 --> 00:00:02,900", "hello", ""),
    ]
    vtt = list(lines(segments, "vtt"))
    assert vtt[:2] == ["WEBVTT", ""] and vtt[3] == "a &lt; b &amp; c"


def test_long_segments_become_short_cues_with_all_words() -> None:
    words = tuple(Word(f"word{i}", i * 0.5, i * 0.5 + 0.4, 1.0) for i in range(60))
    found = list(cues([Segment(0.0, 30.0, " ".join(w.text for w in words), words)]))
    assert " ".join(text for _, _, text in found).split() == [word.text for word in words]
    assert all(end - start <= MAX_SECONDS and len(text) <= 84 for start, end, text in found)
