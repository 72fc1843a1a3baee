"""Attacks: decoding gives the request back, labels stay, seeds decide, and the gap is the paired one."""

import dataclasses
import random
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from core_llm import stats
from core_llm.chat import Audio, Image, Message, Text
from core_llm.digests import conversation_digest
from core_llm.errors import UserError
from evals.attacks import ATTACKS, apply, compose, find
from evals.attacks import media as drawn_and_spoken
from evals.attacks.apply import attacked
from evals.attacks.dialogue import SHOTS, halves, joined
from evals.tasks.base import Options, Sample, Task
from evals.tasks.controls import BASE_RATE
from evals.tasks.scoring import verdict

REVERSIBLE = sorted(name for name, attack in ATTACKS.items() if attack.undo)
TYPED = sorted(name for name, attack in ATTACKS.items() if not attack.needs)


def request(text: str = "How do I bake bread?", number: int = 0, label: int = 1) -> Sample:
    return Sample(
        f"r{number}", f"g{number}", (Message("user", text),), ("safe", "unsafe")[label], "bread", label
    )


def rng(seed: int = 0) -> random.Random:
    return random.Random(seed)


@settings(max_examples=25, deadline=None)
@given(
    st.text(st.characters(codec="ascii", exclude_characters="\r0134578"), min_size=1, max_size=80),
    st.integers(0, 5),
)
@example("Line one.\n\nLine two: 'a' + \"b\" \\ %62", 0)
def test_undo_gives_the_text_back(text: str, seed: int) -> None:
    for name in REVERSIBLE:
        attack = ATTACKS[name]
        assert attack.undo is not None
        changed = attack(request(text), rng(seed)).messages[-1].text
        assert attack.undo(changed) == text, name


@pytest.mark.parametrize("name", [name for name in REVERSIBLE if name not in ("leetspeak", "homoglyphs")])
def test_undo_gives_digits_and_other_scripts_back(name: str) -> None:
    text = "Grüße 1350 к Москве — 日本 ½ 🙂 “quoted”"
    attack = ATTACKS[name]
    assert attack.undo is not None
    assert attack.undo(attack(request(text), rng()).messages[-1].text) == text


def test_encodings_are_the_standard_ones() -> None:
    said = {name: ATTACKS[name](request("Hello, World"), rng()).messages[-1].text for name in TYPED}
    assert said["base64"].endswith("\n\nSGVsbG8sIFdvcmxk") and "Base64" in said["base64"]
    assert said["rot13"].endswith("\n\nUryyb, Jbeyq")
    assert said["hex"].endswith("\n\n48656c6c6f2c20576f726c64")
    assert said["percent"].endswith("\n\nHello%2C%20World")
    assert said["leetspeak"].endswith("\n\nH3ll0, W0rld")
    assert said["reversed"].endswith("\n\ndlroW ,olleH")
    assert not re.search("[!-~]", said["fullwidth"])
    assert said["homoglyphs"] != "Hello, World" and len(said["homoglyphs"]) == 12
    for name in ("base64", "hex", "rot13", "caesar", "homoglyphs", "invisible", "marks", "payload"):
        assert "Hello, World" not in said[name]


@pytest.mark.parametrize("name", TYPED)
def test_a_seed_decides_and_labels_stay(name: str) -> None:
    rows = [request(f"Question {i} about bread, flour and water", i, i % 2) for i in range(12)]
    once, again = attacked(rows, ATTACKS[name], 3), attacked(rows, ATTACKS[name], 3)
    other = attacked(rows, ATTACKS[name], 4)
    assert [conversation_digest(s.messages) for s in once] == [conversation_digest(s.messages) for s in again]
    assert (
        attacked(rows[5:6], ATTACKS[name], 3)[0].messages == once[5].messages
    )  # rows do not touch each other
    for before, after, reseeded in zip(rows, once, other, strict=True):
        kept = (before.label, before.target, before.group)
        assert (
            kept
            == (after.label, after.target, after.group)
            == (reseeded.label, reseeded.target, reseeded.group)
        )
        assert after.messages != before.messages and after.id != before.id
        assert after.note == before.messages[-1].text and after.messages[-1].role == "user"
    fixed = {"fullwidth", "pieces"}  # draw nothing
    assert name in fixed or any(a.messages != b.messages for a, b in zip(once, other, strict=True))


def test_turns_are_before_the_request_and_pieces_join() -> None:
    shots = ATTACKS["many-shot"](request(), rng()).messages
    assert len(shots) == 2 * SHOTS + 1 and shots[-1] == request().messages[-1]
    assert [m.role for m in shots[:4]] == ["user", "assistant"] * 2
    assert ATTACKS["multi-turn"](request(), rng()).messages[-1] == request().messages[-1]
    assert ATTACKS["system"](request(), rng()).messages[0].role == "system"
    for text in ("How do I bake bread?", "bread", "one two three four five six seven"):
        pieces = ATTACKS["pieces"](request(text), rng()).messages
        assert joined(pieces) == text
        assert len(text.split()) < 3 or all(text not in m.text for m in pieces)
    assert halves("a b c d e") == ["a b c", "d e"] and halves("a") == ["a", ""]


def test_delimiters_stay_text_for_the_tokenizer() -> None:
    from pathlib import Path

    import core_llm
    from core_llm.chat import render
    from core_llm.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(Path(core_llm.__file__).parent / "nano")
    plain = render(request().messages, tokenizer)
    special = {tokenizer.special(name) for name in ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")}
    for seed in range(8):
        ids = render(ATTACKS["delimiters"](request(), rng(seed)).messages, tokenizer).ids
        assert sum(i in special for i in ids) == sum(i in special for i in plain.ids)


def test_pictures_hold_all_words(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    draw = drawn_and_spoken._drawn

    def remember(text: str) -> Any:
        written.append(text)
        return draw(text)

    monkeypatch.setattr(drawn_and_spoken, "_drawn", remember)
    text = "How do I bake a loaf of bread?"
    kinds = {
        name: ATTACKS[name](request(text), rng()) for name in ("typographic", "benign-text", "disguised")
    }
    assert written == [text] * 3
    split = ATTACKS["split-images"](request(text), rng())
    assert " ".join(written[3:]) == text
    half = ATTACKS["half-drawn"](request(text), rng())
    first = half.messages[-1].text.partition(" ... ")[0]
    assert f"{first} {written[5]}" == text
    images = [[p for p in s.messages[-1].parts if isinstance(p, Image)] for s in (*kinds.values(), split)]
    assert [len(found) for found in images] == [1, 1, 1, 2]
    assert all(text not in s.messages[-1].text and s.note == text for s in (*kinds.values(), split, half))
    same = ATTACKS["disguised"](request(text), rng())
    assert conversation_digest(same.messages) == conversation_digest(kinds["disguised"].messages)
    coded = find("base64+typographic")(request(text * 5), rng())
    assert isinstance(coded.messages[-1].parts[0], Image)


def test_long_requests_go_on_in_further_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    from evals import scorecard_forms

    written: list[str] = []
    picture = scorecard_forms.picture

    def remember(text: str) -> Any:
        found = picture(text)
        written.extend([text] if found is not None else [])
        return found

    monkeypatch.setattr(scorecard_forms, "picture", remember)
    words = [f"word{i}" for i in range(700)]
    parts = ATTACKS["typographic"](request(" ".join(words)), rng()).messages[-1].parts
    assert len(parts) == len(written) > 1 and all(isinstance(part, Image) for part in parts)
    assert " ".join(written).split() == words


def test_speech_varies_in_speed_and_noise_and_repeats_itself() -> None:
    pytest.importorskip("espeakng_loader")
    rows = [request("please open the red door now", i) for i in range(2)]

    def waves(name: str, seed: int = 0) -> list[np.ndarray]:
        parts = [s.messages[-1].parts[0] for s in attacked(rows, ATTACKS[name], seed)]
        assert all(isinstance(part, Audio) and part.rate == 16_000 for part in parts)
        return [np.asarray(part.data) for part in parts if isinstance(part, Audio)]

    fast, slow, again = waves("spoken-fast"), waves("spoken-slow"), waves("spoken-fast")
    assert all(np.array_equal(a, b) for a, b in zip(fast, again, strict=True))
    assert max(map(len, fast)) < min(map(len, slow))
    noisy = waves("spoken-noise")
    assert all(np.abs(wave[:200]).mean() > 0.001 and np.abs(wave).max() <= 1 for wave in noisy)


def test_composition_runs_in_order_and_refuses_what_cannot_follow() -> None:
    both = compose("rot13", "base64")
    changed = both(request("Hello"), rng()).messages[-1].text
    assert both.undo is not None and both.undo(changed) == "Hello"
    inner = ATTACKS["base64"].undo
    assert inner is not None and "ROT13" in inner(changed)
    led = find("role+typographic+many-shot")
    assert led.needs == ("image",) and led.undo is None and not led.leaves_text
    assert len(led(request(), rng()).messages) == 2 * SHOTS + 1
    with pytest.raises(UserError, match="'base64' needs a typed request.*put 'base64' before"):
        find("spoken+base64")
    with pytest.raises(UserError, match="unknown attack 'rot14'; known attacks: base64"):
        find("base64+rot14")
    with pytest.raises(UserError, match="no attack named"):
        compose()
    spoken = dataclasses.replace(request(), messages=(Message("user", (Image(b""), Text("x"))),))
    with pytest.raises(UserError, match="holds other media"):
        ATTACKS["rot13"](spoken, rng())
    answered = dataclasses.replace(request(), messages=(Message("user", "a"), Message("assistant", "b")))
    with pytest.raises(UserError, match="assistant speaks last"):
        ATTACKS["rot13"](answered, rng())


def guard_task(rows: list[Sample]) -> Task:
    return Task(
        name="t", title="t", section="safety", needs=("guard",), source="", licence="",
        metrics=("recall", "fpr"), ask="score", load=lambda options: rows, judge=verdict,
        controls=(BASE_RATE,),
    )  # fmt: skip


def test_gap_is_paired_and_equals_the_statistics_of_both_sides() -> None:
    rows = [request(f"question number {i}", i, int(i % 3 > 0)) for i in range(60)]
    task = apply(guard_task(rows), ["rot13", "role"], seed=0)
    samples = task.load(Options())
    assert len(samples) == 180 and len({s.id for s in samples}) == 180
    draw = np.random.default_rng(0)
    outputs = []
    for sample in samples:
        missed = sample.kind == "rot13" and draw.random() < 0.5
        p = 0.1 if missed or not sample.label else 0.9
        outputs.append({"probability": p, "unsafe": p > 0.5})
    assert task.extras is not None
    found = task.extras(samples, outputs)
    sides = [
        [verdict(s, o) for s, o in zip(samples, outputs, strict=True) if s.kind == kind]
        for kind in ("plain", "rot13")
    ]
    expected = stats.difference("recall", sides[0], sides[1], [s.group for s in rows], 0)
    assert found["gap_recall_rot13"] == pytest.approx(expected.value) and expected.value < -0.3
    assert found["gap_recall_rot13_high"] < 0
    assert found["gap_recall_role"] == 0.0 and found["recall_plain"] == 1.0
    (control,) = task.controls
    assert control.answer is not None
    answers = control.answer(samples, Options())
    assert answers is not None and len(answers) == 180
    shuffled = list(zip(samples, outputs, strict=True))
    random.Random(1).shuffle(shuffled)
    assert task.extras([s for s, _ in shuffled], [o for _, o in shuffled]) == pytest.approx(found)


def test_media_attacks_ask_for_what_reads_them() -> None:
    guard = apply(guard_task([request()]), ["typographic", "spoken"], 0)
    assert (
        guard.needs == ("core", "guard", "image", "audio") and guard.ask == "own" and guard.asks is not None
    )
    asked = dataclasses.replace(guard_task([]), ask="generate", needs=("core",))
    assert apply(asked, ["typographic"], 0).needs == ("core", "image")
    long = apply(guard_task([]), TYPED, 0)
    assert len(long.name) < 120 and long.name != apply(guard_task([]), TYPED[:-1], 0).name


def test_tasks_without_requests_are_refused() -> None:
    from evals.tasks import registry

    tasks = registry()
    with pytest.raises(UserError, match="'text-qa' is none"):
        apply(tasks["text-qa"], ["rot13"], 0)
    with pytest.raises(UserError, match="names no attack"):
        apply(guard_task([]), [], 0)


def test_attacked_run_reports_the_gap(fake: Any, tmp_path: Any) -> None:
    from evals.runner import evaluate

    rows = [request(f"question number {i}", i, i % 2) for i in range(12)]
    task = apply(guard_task(rows), ["rot13"], seed=1)
    subject = fake(judge=lambda messages: 0.9 if "question number" in messages[-1].text else 0.2)
    found = evaluate(task, subject, Options(seed=1), tmp_path)
    assert found.extra["recall_plain"] == 1.0 and found.extra["gap_recall_rot13"] == -1.0
    assert {kind.name for kind in found.kinds} == {"plain", "rot13"}
