"""Speech that is synthesised on the fly: which words and voices, the same every time, and without espeak."""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core_llm.chat import Audio
from core_llm.digests import conversation_digest
from core_llm.errors import UserError
from evals import run, runner
from evals.tasks import Options, find, registry, speech
from evals.tasks.base import Sample, Unavailable
from speech_adapter import synthesis
from speech_adapter.synthesis import HELD_OUT_VOICES, INSTALL_HINT

needs_espeak = pytest.mark.skipif(not synthesis.available(), reason="espeakng-loader is not installed")


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return registry()["spoken-commands"].load(Options())


def test_the_two_generators_know_a_closed_vocabulary() -> None:
    found = [set[str](), set[str]()]
    for words, n in zip(found, (8_000, 20_000), strict=True):
        for _, text in islice(speech.command_phrases(), n):
            words |= set(speech.words_of(text))
    assert found[0] == found[1] and len(found[1]) == 208


@needs_espeak
def test_three_hundred_different_phrases_in_held_out_voices(samples: list[Sample]) -> None:
    assert len({sample.target for sample in samples}) == len(samples) == 300
    assert Counter(sample.group for sample in samples) == dict.fromkeys(HELD_OUT_VOICES, 30)
    kinds = Counter(sample.kind for sample in samples)
    assert kinds["command"] > 2 * kinds["question"] > 60
    task = registry()["spoken-commands"]
    assert task.extras is not None and task.extras(samples, [])["distinct_words"] == 191
    for sample in samples:
        clip = sample.messages[0].parts[1]
        assert isinstance(clip, Audio) and isinstance(clip.data, np.ndarray) and clip.rate == 16_000
        # No faster than ten words a second, no slower than one.
        assert 0.1 < len(clip.data) / 16_000 / len(sample.target.split()) < 1.0
        assert np.abs(clip.data.astype(np.int32)).max() > 1_000


@needs_espeak
def test_the_sound_is_the_same_whatever_was_said_before(
    samples: list[Sample],
) -> None:
    synthesis.speak("something else", "en-us+f3")
    again = speech._command_samples.__wrapped__()
    assert [conversation_digest(s.messages) for s in again] == [
        conversation_digest(s.messages) for s in samples
    ]


@needs_espeak
def test_a_limit_takes_some_of_the_same_rows(samples: list[Sample]) -> None:
    chosen = registry()["spoken-commands"].load(Options(limit=7))
    known = {sample.id: conversation_digest(sample.messages) for sample in samples}
    assert len(chosen) == 7 and all(known[s.id] == conversation_digest(s.messages) for s in chosen)


@needs_espeak
def test_who_listens_beats_shuffled_audio_and_who_does_not_is_marked(
    fake: Any, samples: list[Sample], tmp_path: Path
) -> None:
    task = find(["spoken-commands"])[0]
    text_of = {conversation_digest(sample.messages): sample.target for sample in samples}
    listens = fake(lambda messages: text_of[conversation_digest(messages)])
    done = runner.evaluate(task, listens, Options(), tmp_path / "a")
    assert done.scored.estimates["wer"].value == 0.0 and done.without_evidence == []
    shuffled = next(c for c in done.controls if c.name == "shuffled audio")
    assert shuffled.estimates["wer"].value > 0.7
    deaf = runner.evaluate(task, fake(lambda messages: "the"), Options(), tmp_path / "b")
    assert "shuffled audio" in deaf.without_evidence


def test_without_espeak_other_tasks_still_run(
    fake: Any,
    data_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(synthesis, "available", lambda: False)
    monkeypatch.setattr(run, "open_model", lambda spec, **_: fake())
    chosen = find(["spoken-commands", "easy-vqa", "spoken-vqa"])
    output = tmp_path / "results.json"
    run.run_tasks(chosen, "nano", Options(data_root, "all", limit=4), tmp_path / "records", output)
    assert '"task": "easy-vqa"' in output.read_text() and "spoken" not in output.read_text()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped: ")]
    assert lines == [f"skipped: {name}: {INSTALL_HINT}" for name in ("spoken-commands", "spoken-vqa")]
    output.unlink()
    for tasks in (chosen[:1], [chosen[0], chosen[2]]):
        with pytest.raises(UserError, match="pip install|none of these"):
            run.run_tasks(tasks, "nano", Options(data_root), tmp_path / "records", output)
    assert not output.exists() and issubclass(Unavailable, UserError)
