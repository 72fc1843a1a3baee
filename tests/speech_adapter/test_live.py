import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import jiwer
import numpy as np
import pytest

from core_llm.checkpoint import load_core
from core_llm.errors import MediaError, UserError
from speech_adapter import live
from speech_adapter.adapter import load
from speech_adapter.alignment import Word
from speech_adapter.audio import SAMPLE_RATE, decode
from speech_adapter.live import LiveSettings, LiveTranscriber, Meter, Update, first_interrupt, run
from speech_adapter.transcribe import Recogniser

SAMPLES = Path(__file__).parents[2] / "evals" / "samples"
ROWS = json.loads((SAMPLES / "clips.json").read_text())["digits"][:8]
CLIPS = [decode(SAMPLES / row["file"]) for row in ROWS]
PAUSE = np.zeros(SAMPLE_RATE, dtype=np.float32)
SOUND = np.concatenate([part for clip in CLIPS for part in (clip, PAUSE)])


@pytest.fixture(scope="module")
def recogniser() -> Recogniser:
    core, tokenizer = load_core("nano")
    return Recogniser(core, tokenizer, load("nano", core), decoder="ctc")


def updates(recogniser: Recogniser, sound: np.ndarray, settings: LiveSettings | None = None) -> list[Update]:
    return list(run(LiveTranscriber(recogniser, settings), iter([sound]), Meter()))


def test_a_stream_says_what_the_file_says(recogniser: Recogniser) -> None:
    found = updates(recogniser, SOUND)
    assert sum(update.ended for update in found) == len(CLIPS)
    text = " ".join(word for update in found for word in update.final)
    expected = " ".join(segment.text for segment in recogniser.segments(SOUND, SAMPLE_RATE))
    assert jiwer.wer(expected, text) <= 0.1


def test_final_words_never_change(recogniser: Recogniser) -> None:
    final: list[str] = []
    for update in updates(recogniser, SOUND):
        final += update.final
        if update.ended:
            assert [word.text for word in update.words] == final
            final = []
        else:
            assert not update.words
    assert final == []


def test_an_utterance_without_end_is_bounded(recogniser: Recogniser) -> None:
    sound = np.concatenate(CLIPS)
    transcriber = LiveTranscriber(recogniser, LiveSettings(window_s=2.5, pause_s=9.0))
    text = []
    for update in run(transcriber, iter([sound]), Meter()):
        text += update.final
        assert len(transcriber.samples) <= 3.2 * SAMPLE_RATE
    assert len(text) >= 0.7 * sum(len(row["text"].split()) for row in ROWS)


def test_silence_and_nothing_say_nothing(recogniser: Recogniser) -> None:
    for sound in (np.zeros(0, dtype=np.float32), np.zeros(5 * SAMPLE_RATE, dtype=np.float32)):
        assert [word for update in updates(recogniser, sound) for word in update.final] == []


def test_latency_runs_from_the_end_of_a_word_at_real_time() -> None:
    meter = Meter()
    meter.note(Update((), ("one",), False, 1.0), 0.5)  # clock 1.5
    meter.note(Update(("one",), ("two",), False, 1.2), 0.1)  # computing is behind: 1.6
    words = (Word("one", 0.4, 0.9, 1.0), Word("two", 1.0, 1.4, 1.0))
    meter.note(Update(("two",), (), True, 2.0, words), 0.2)  # 2.2
    assert meter.first == pytest.approx([0.6, 0.2]) and meter.final == pytest.approx([0.7, 0.8])
    assert meter.report()["real_time_factor"] == pytest.approx(0.4)


def test_real_time_paces_the_stream(recogniser: Recogniser, monkeypatch: pytest.MonkeyPatch) -> None:
    slept = []
    monkeypatch.setattr(live.time, "sleep", slept.append)
    list(run(LiveTranscriber(recogniser), iter([PAUSE]), Meter(), realtime=True))
    assert len(slept) == 50 and max(slept) > 0.5


def test_no_microphone_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(UserError, match=r"speech-adapter\[mic\]"):
        next(live.microphone())


def test_a_microphone_that_cannot_start_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class PortAudioError(Exception):
        pass

    class Stream:
        def __init__(self, **settings: object) -> None: ...

        def start(self) -> None:
            raise PortAudioError("device\nbusy")

    fake = ModuleType("sounddevice")
    fake.PortAudioError, fake.InputStream = PortAudioError, Stream  # type: ignore[attr-defined]
    fake.query_devices = lambda kind: {"default_samplerate": 44_100.0}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    with pytest.raises(MediaError, match="device busy.*plug one in"):
        next(live.microphone())


def test_a_window_stays_within_what_the_adapter_takes(
    recogniser: Recogniser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recogniser.adapter, "config", replace(recogniser.adapter.config, max_seconds=3.0))
    found = updates(recogniser, np.concatenate(CLIPS), LiveSettings(pause_s=9.0))  # a longer clip raises
    assert sum(update.ended for update in found) > 1
    monkeypatch.setattr(recogniser.adapter, "config", replace(recogniser.adapter.config, max_seconds=0.5))
    with pytest.raises(UserError, match="too short to stream"):
        LiveTranscriber(recogniser)


def test_an_interrupt_ends_the_sound_and_keeps_the_last_words(recogniser: Recogniser) -> None:
    def pieces() -> Iterator[np.ndarray]:
        yield CLIPS[0]
        os.kill(os.getpid(), signal.SIGINT)
        yield CLIPS[1]
        raise AssertionError("heard on after the interrupt")

    before = signal.default_int_handler
    inherited = signal.signal(signal.SIGINT, before)  # a shell starts what runs in its background without it
    try:
        with first_interrupt() as stopped:
            found = list(run(LiveTranscriber(recogniser), pieces(), Meter(), stopped=stopped))
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, inherited)
    said = [word for update in found for word in update.final]
    assert found[-1].ended and said
    assert said == recogniser.text(CLIPS[0]).split()
