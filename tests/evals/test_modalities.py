"""The same requests typed, drawn and spoken: what the task measures, with readers that a test controls."""

import numpy as np
import pytest

from core_llm.chat import Audio, Image, Message, Text
from evals.tasks import modalities
from evals.tasks.base import Options, Sample
from evals.tasks.modalities import KINDS, gaps


def versions(n: int = 40) -> list[Sample]:
    return [
        Sample(f"{i}-{kind}", f"{i:02d}", (Message("user", f"{kind} {i}"),), "", kind, i % 2)
        for i in range(n)
        for kind in KINDS
    ]


def outputs(samples: list[Sample]) -> list[dict[str, float | bool]]:
    """Right about text, unread and alike for pictures, wrong about half of what is spoken."""
    found: list[dict[str, float | bool]] = []
    for sample in samples:
        right = 0.9 if sample.label else 0.1
        heard = right if int(sample.group) % 4 < 2 else 1 - right
        p = {"text": right, "image": 1.0, "speech": heard}[sample.kind]
        found.append({"probability": p, "unsafe": p > 0.5, "unread": int(sample.kind == "image")})
    return found


def test_gap_is_what_text_has_ahead_with_its_interval() -> None:
    samples = versions()
    found = gaps(samples, outputs(samples))
    assert found["auprc_text"] == 1.0 and found["auprc_image"] == pytest.approx(0.5)
    assert found["gap_image"] == pytest.approx(0.5)
    assert found["gap_image_low"] < 0.5 < found["gap_image_high"]
    assert found["unread_image"] == 1.0 and found["unread_speech"] == 0.0
    assert found["gap_speech"] > 0 and found["gap_speech_low"] > 0
    assert found["fpr_image"] == 1.0 and found["recall_speech"] == pytest.approx(0.5)
    shuffled = sorted(zip(samples, outputs(samples), strict=True), key=lambda pair: hash(pair[0].id))
    again = gaps([s for s, _ in shuffled], [o for _, o in shuffled])
    assert again == found


def test_controls_keep_labels_and_change_what_is_asked() -> None:
    samples = versions()
    other = modalities._another_request(samples, Options())
    assert [(s.id, s.label, s.kind) for s in other] == [(s.id, s.label, s.kind) for s in samples]
    assert all(a.messages != b.messages for a, b in zip(other, samples, strict=True))
    assert all(a.messages[0].text.split()[0] == a.kind for a in other)
    typed = modalities._all_typed(samples, Options())
    assert all(s.messages[0].text == f"text {int(s.group)}" for s in typed)


def test_every_control_can_be_scored() -> None:
    samples = versions(8)
    (task,) = modalities.TASKS
    for control in task.controls:
        answers = control.answer(samples, Options()) if control.answer else outputs(samples)
        assert answers is not None
        rows = [task.judge(sample, output) for sample, output in zip(samples, answers, strict=True)]
        assert {tuple(sorted(row)) for row in rows} == {
            ("correct", "label", "probability", "unread", "unsafe")
        }


def test_rows_are_the_same_request_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    from evals.tasks.safety import basics

    clips = {row.id: Audio(np.zeros(160, np.float32), 16_000) for row in basics()}
    monkeypatch.setattr(modalities, "_clips", lambda: clips)
    monkeypatch.setattr(modalities, "needs_espeak", lambda: None)
    rows = modalities._load(Options(limit=4))
    assert [s.kind for s in rows] == list(KINDS) * 4
    for typed, drawn, spoken in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert typed.group == drawn.group == spoken.group and typed.label == drawn.label == spoken.label
        assert isinstance(typed.messages[0].parts[0], Text)
        assert isinstance(drawn.messages[0].parts[0], Image)
        assert isinstance(spoken.messages[0].parts[0], Audio)
