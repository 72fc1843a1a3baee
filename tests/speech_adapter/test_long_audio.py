import json
import subprocess
import sys
from pathlib import Path

import jiwer
import numpy as np
import pytest

from core_llm.checkpoint import load_core
from core_llm.errors import UserError
from speech_adapter.adapter import load
from speech_adapter.alignment import Word
from speech_adapter.audio import SAMPLE_RATE, decode
from speech_adapter.long_audio import ChunkSettings, chunks, stitch
from speech_adapter.transcribe import Recogniser

SAMPLES = Path(__file__).parents[2] / "evals" / "samples"
ROWS = json.loads((SAMPLES / "clips.json").read_text())["digits"][:24]
CLIPS = [decode(SAMPLES / row["file"]) for row in ROWS]
SAID = " ".join(row["text"] for row in ROWS)
PAUSE = np.zeros(SAMPLE_RATE * 8 // 10, dtype=np.float32)


@pytest.fixture(scope="module")
def recogniser() -> Recogniser:
    core, tokenizer = load_core("nano")
    return Recogniser(core, tokenizer, load("nano", core))


def laid() -> np.ndarray:
    return np.concatenate([part for clip in CLIPS for part in (clip, PAUSE)])


def test_clips_with_pauses_give_what_they_give_one_by_one(recogniser: Recogniser) -> None:
    one_by_one = [recogniser.text(clip) for clip in CLIPS]
    segments = list(recogniser.segments(laid(), SAMPLE_RATE))
    # One chunk per clip; the silence beside a word may tip a doubtful one over.
    assert len(segments) == len(CLIPS)
    same = sum(segment.text == text for segment, text in zip(segments, one_by_one, strict=True))
    assert same >= len(CLIPS) - 2
    assert jiwer.wer(SAID, " ".join(s.text for s in segments)) <= jiwer.wer(SAID, " ".join(one_by_one)) + 0.02
    at = 0.0
    for clip, segment in zip(CLIPS, segments, strict=True):
        assert at - 0.15 < segment.start < segment.end < at + len(clip) / SAMPLE_RATE + 0.15
        assert all(segment.start - 0.1 <= word.start < word.end for word in segment.words)
        at += (len(clip) + len(PAUSE)) / SAMPLE_RATE


def test_a_short_file_is_heard_whole(recogniser: Recogniser) -> None:
    for row, clip in zip(ROWS[:6], CLIPS[:6], strict=True):
        (segment,) = recogniser.segments(SAMPLES / row["file"], times=False)
        assert segment.text == recogniser.text(clip)


class Oracle(Recogniser):
    """Hears every word that is whole in a chunk, at about its time, and nonsense where one is cut in two."""

    def __init__(self, sound: np.ndarray, words: list[Word], recogniser: Recogniser) -> None:
        self.sound, self.said, self.adapter = sound.tobytes(), words, recogniser.adapter
        self.rng = np.random.default_rng(0)

    def text(self, samples: np.ndarray) -> str:
        start = self.sound.find(samples.tobytes()) / 4 / SAMPLE_RATE
        end = start + len(samples) / SAMPLE_RATE
        self.heard = []
        for word in self.said:
            if word.start < end and word.end > start:
                whole = start <= word.start and word.end <= end
                near = word.shifted(float(self.rng.uniform(-0.05, 0.05)) - start)
                self.heard.append(near if whole else Word("half", max(0.0, near.start), near.end, 0.1))
        return " ".join(word.text for word in self.heard)

    def words(self, samples: np.ndarray, text: str) -> list[Word]:
        return self.heard


@pytest.mark.parametrize("window, overlap", [(3.0, 1.0), (4.0, 1.2), (6.0, 2.0), (20.0, 2.0)])
def test_seams_without_a_pause_lose_and_double_no_words(
    recogniser: Recogniser, window: float, overlap: float
) -> None:
    joined = np.concatenate(CLIPS * 2)
    words, at = [], 0.0
    for row, clip in zip(ROWS * 2, CLIPS * 2, strict=True):
        parts = row["text"].split()
        length = len(clip) / SAMPLE_RATE / len(parts)
        words += [Word(p, at + i * length, at + (i + 1) * length, 1.0) for i, p in enumerate(parts)]
        at += len(clip) / SAMPLE_RATE
    # Pauses within the clips must not help: every cut is a seam.
    settings = ChunkSettings(pause_s=1.0, short_pause_s=9.0, window_s=window, overlap_s=overlap)
    assert sum(chunk.overlap > 0 for chunk in chunks([joined], settings)) >= 2
    oracle = Oracle(joined, words, recogniser)
    found = [
        word.text for segment in oracle.segments(joined, SAMPLE_RATE, settings) for word in segment.words
    ]
    assert found == [word.text for word in words]


def test_chunks_cover_all_sound_and_no_longer_than_a_window() -> None:
    rng = np.random.default_rng(0)
    sound = np.concatenate(CLIPS)
    settings = ChunkSettings(window_s=4.0, overlap_s=1.0)
    found = list(chunks([sound], settings))
    for chunk in found:
        assert len(chunk.samples) <= (4.0 + 2 * settings.margin_s) * SAMPLE_RATE
        np.testing.assert_array_equal(chunk.samples, sound[chunk.start : chunk.start + len(chunk.samples)])
    covered = np.zeros(len(sound), dtype=bool)
    for chunk in found:
        covered[chunk.start : chunk.start + len(chunk.samples)] = True
    loud = np.abs(sound) > 0.1 * np.abs(sound).max()
    assert covered[loud].all()
    # However the sound comes in.
    cuts = np.sort(rng.integers(0, len(sound), 50))
    again = list(chunks(np.split(sound, cuts), settings))
    assert [(c.start, len(c.samples), c.overlap) for c in again] == [
        (c.start, len(c.samples), c.overlap) for c in found
    ]


def test_silence_and_nothing_give_no_chunks() -> None:
    assert list(chunks([])) == []
    assert list(chunks([np.zeros(50 * SAMPLE_RATE, dtype=np.float32)])) == []


def word(text: str, start: float) -> Word:
    return Word(text, start, start + 0.3, 1.0)


def test_stitching_joins_at_the_common_word_nearest_to_the_middle() -> None:
    left = [word("a", 7.0), word("b", 8.2), word("c", 9.0), word("d", 9.8)]
    right = [word("x", 8.0), word("b", 8.25), word("c", 9.05), word("dee", 9.75), word("e", 10.5)]
    before, after = stitch(left, right, 8.0, 10.0)
    assert [w.text for w in before + after] == ["a", "b", "c", "dee", "e"]
    # The same word twice in a row is told apart by time.
    twice = [word("no", 8.2), word("no", 9.0)]
    before, after = stitch(twice, [word("no", 8.25), word("no", 9.05), word("no", 9.9)], 8.0, 10.0)
    assert len(before + after) == 3
    # Nothing in common: cut in the middle.
    before, after = stitch([word("a", 8.1), word("b", 9.6)], [word("c", 8.1), word("d", 9.2)], 8.0, 10.0)
    assert [w.text for w in before + after] == ["a", "d"]


def test_impossible_windows_are_refused() -> None:
    with pytest.raises(UserError):
        ChunkSettings(window_s=3.0, overlap_s=2.0)
    assert ChunkSettings().within(5.0).window_s < 5.0


PEAK = """
import resource, sys
import numpy as np
from pathlib import Path
from core_llm.checkpoint import load_core
from speech_adapter.adapter import load
from speech_adapter.transcribe import Recogniser
core, tokenizer = load_core("nano")
recogniser = Recogniser(core, tokenizer, load("nano", core), decoder="ctc")
n = sum(len(segment.words) for segment in recogniser.segments(Path(sys.argv[1])))
print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)
"""


def peak_mb(times: int, folder: Path) -> tuple[int, float]:
    """Words found in the clips laid out so many times, and the peak memory of that process in MB."""
    import soundfile

    path = folder / f"{times}.wav"
    sound = laid()
    with soundfile.SoundFile(path, "w", SAMPLE_RATE, 1, subtype="PCM_16") as file:
        for _ in range(times):
            file.write(sound)
    done = subprocess.run([sys.executable, "-c", PEAK, str(path)], check=True, capture_output=True, text=True)
    words, peak = done.stdout.split()
    return int(words), float(peak)


@pytest.mark.parametrize("minutes", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_length(tmp_path: Path, minutes: int) -> None:
    times = round(60 * SAMPLE_RATE / len(laid()))
    few, small = peak_mb(times, tmp_path)
    many, large = peak_mb(times * minutes, tmp_path)
    assert 0.98 * minutes * few < many < 1.02 * minutes * few
    assert large < small + 25, f"{small:.0f} MB for 1 minute, {large:.0f} MB for {minutes}"
