import os
import sys
from pathlib import Path

import numpy as np
import pytest

from speech_adapter import synthesis
from speech_adapter.synthesis import (
    HELD_OUT_VOICES,
    TRAIN_VOICES,
    SynthesisError,
    Utterance,
    in_processes,
    speak,
    speak_all,
)

needs_espeak = pytest.mark.skipif(not synthesis.available(), reason="espeakng-loader is not installed")


def test_training_and_held_out_voices_share_no_timbre() -> None:
    def timbres(voices: tuple[str, ...]) -> set[str]:
        return {voice.partition("+")[2] for voice in voices}

    assert not timbres(TRAIN_VOICES) & timbres(HELD_OUT_VOICES)
    assert len(set(TRAIN_VOICES)) == len(TRAIN_VOICES) >= 100


@needs_espeak
def test_speech_is_float_mono_and_nearly_repeatable() -> None:
    samples, rate = speak("what color is the shape?", HELD_OUT_VOICES[0])
    speak("something else", "en-us+f3")
    again, _ = speak("what color is the shape?", HELD_OUT_VOICES[0])
    assert rate == 22_050 and samples.dtype == np.float32 and samples.ndim == 1
    assert 0.5 < len(samples) / rate < 4 and 0.05 < np.abs(samples).max() <= 1
    assert abs(len(samples) - len(again)) < 0.005 * rate  # espeak's flutter runs on


@needs_espeak
def test_voice_speed_and_pitch_change_the_sound() -> None:
    plain, _ = speak("seven three one")
    fast, _ = speak("seven three one", speed=300)
    assert len(fast) < 0.8 * len(plain)
    for other, _ in (speak("seven three one", pitch=90), speak("seven three one", voice="en-us+f3")):
        assert len(other) != len(plain) or not np.array_equal(other, plain)


@needs_espeak
@pytest.mark.parametrize("voice", HELD_OUT_VOICES)
def test_every_held_out_voice_speaks(voice: str) -> None:
    samples, rate = speak("two", voice)
    assert len(samples) > 0.1 * rate and np.abs(samples).max() > 0.02


@needs_espeak
def test_unknown_voice_is_one_line_that_names_known_ones() -> None:
    with pytest.raises(SynthesisError, match="no-such-voice.*en-us"):
        speak("hello", "no-such-voice")


@needs_espeak
def test_many_are_spoken_once_and_then_read_from_the_cache(tmp_path: Path) -> None:
    wanted = [
        Utterance("one two"),
        Utterance("is there a circle?", TRAIN_VOICES[3], 200, 70),
        Utterance("nine"),
    ]
    first = speak_all(wanted, tmp_path, processes=1)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    second = speak_all(wanted, tmp_path, processes=1)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.samples, b.samples)
        np.testing.assert_array_equal(a.starts, b.starts)
        assert a.samples.dtype == np.int16 and len(a.samples) > 3_000


@needs_espeak
def test_many_are_spoken_alike_into_another_cache(tmp_path: Path) -> None:
    wanted = [Utterance(f"word {i}", voice) for i, voice in enumerate((*HELD_OUT_VOICES, "en+klatt"))]
    first, second = (speak_all(wanted, tmp_path / name, processes=1) for name in "ab")
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.samples, b.samples)


@needs_espeak
def test_phonemes_are_in_order_and_inside_the_clip(tmp_path: Path) -> None:
    (clip,) = speak_all([Utterance("seven")], tmp_path, processes=1)
    assert list(clip.phonemes[:3]) == ["s", "E", "v"]
    assert (np.diff(clip.starts) >= 0).all() and clip.starts[-1] <= len(clip.samples) / 16_000 + 0.01


def test_without_the_optional_dependency_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    synthesis._engine.cache_clear()
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    try:
        assert not synthesis.available()
        with pytest.raises(SynthesisError, match=r"pip install 'speech-adapter\[espeak\]'"):
            speak("hello")
    finally:
        synthesis._engine.cache_clear()


def _fails(job: int) -> int:
    if job == 2:
        os._exit(3)
    return job * 10


def test_a_process_that_dies_is_one_line_and_no_endless_wait() -> None:
    assert sorted(in_processes(_fails, [0, 1, 3], 2, fresh=True)) == [0, 10, 30]
    for fresh in (True, False):
        with pytest.raises(SynthesisError, match="has died.*__main__"):
            list(in_processes(_fails, [2], 1, fresh))


def test_a_damaged_cache_file_is_named_and_spoken_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (first,) = speak_all([Utterance("seven")], tmp_path, processes=1)
    (file,) = tmp_path.glob("*.npz")
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:200] + b"?" * 64 + whole[264:]):
        file.write_bytes(damaged)
        (again,) = speak_all([Utterance("seven")], tmp_path, processes=1)
        np.testing.assert_array_equal(again.samples, first.samples)
        assert f"warning: {file}: damaged" in capsys.readouterr().err
