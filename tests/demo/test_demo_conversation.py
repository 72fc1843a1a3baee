"""The demo without a browser: what was typed and dropped becomes messages; mistakes change nothing."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from core_llm.adapters import Assistant
from core_llm.chat import Audio, Image, Message, Text
from core_llm.errors import MediaError, UserError
from core_llm.testing import tiny_core
from demo import app, conversation, views

torch.set_num_threads(2)


class Says:
    """An assistant that always says the same."""

    adapters = ()

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def stream(self, messages: Sequence[Message], settings: Any = None) -> Iterator[str]:
        yield from self.pieces

    def generate(self, conversations: Any, settings: Any = None) -> list[str]:
        return ["".join(self.pieces) for _ in conversations]


class Guards:
    """A guard that dislikes one word."""

    def __init__(self, word: str) -> None:
        self.word = word

    def classify(self, conversations: Sequence[Sequence[Message]], batch_size: int = 32) -> list[Any]:
        found = [float(self.word in messages[-1].text) for messages in conversations]
        return [
            SimpleNamespace(unsafe=p > 0.5, probability=p, mass=1.0, categories={"S1": p, "S10": 0.0})
            for p in found
        ]


def last(turns: Iterator[conversation.Turn]) -> conversation.Turn:
    return list(turns)[-1]


def test_image_comes_first_then_sound_then_text() -> None:
    message = conversation.user_message(" what? ", ["question.wav", "picture.PNG"])
    assert [type(part) for part in message.parts] == [Image, Audio, Text]
    assert message.text == "what?"


def test_file_of_another_kind_and_empty_message_are_refused() -> None:
    with pytest.raises(MediaError, match=r"notes\.pdf"):
        conversation.user_message("read this", ["notes.pdf"])
    with pytest.raises(UserError, match="type something"):
        conversation.user_message("  ", [])


def test_answer_streams_piece_by_piece() -> None:
    turns = list(conversation.answer(Says("a ", "red ", "one"), None, [Message("user", "x")], frozenset()))
    assert [turn.text for turn in turns] == ["a ", "a red ", "a red one"]


def test_guard_withholds_unsafe_questions_and_answers() -> None:
    guard, both = Guards("bad"), frozenset({"input", "output"})
    asked = last(conversation.answer(Says("fine"), guard, [Message("user", "bad")], both))
    assert asked.withheld
    assert asked.input_verdict.unsafe
    assert "fine" not in asked.text
    answered = last(conversation.answer(Says("bad"), guard, [Message("user", "x")], both))
    assert answered.withheld and answered.blocked == "output"
    assert answered.output_verdict.unsafe and "the answer was blocked" in views.guard_line(answered)
    assert "bad" not in answered.text
    clean = last(conversation.answer(Says("fine"), guard, [Message("user", "x")], both))
    assert (clean.text, clean.withheld) == ("fine", False)
    assert not clean.output_verdict.unsafe


def test_guard_that_is_switched_off_is_not_asked() -> None:
    turn = last(conversation.answer(Says("bad"), Guards("bad"), [Message("user", "bad")], frozenset()))
    assert turn == conversation.Turn("bad")


def respond(
    assistant: Any, guard: Any, payload: dict[str, Any], history: list[Message], sides: list[str]
) -> Any:
    import gradio

    return list(app._respond(gradio, assistant, guard, payload, [], history, sides))[-1]


def test_turn_is_shown_and_remembered() -> None:
    _, shown, history, line = respond(Says("blue"), None, {"text": "what color?", "files": []}, [], [])
    assert [entry["content"] for entry in shown] == ["what color?", "blue"]
    assert [(m.role, m.text) for m in history] == [("user", "what color?"), ("assistant", "blue")]
    assert line == ""


def test_refused_turn_is_shown_but_not_remembered() -> None:
    sides = ["check what I say"]
    _, shown, history, line = respond(Says("blue"), Guards("bad"), {"text": "bad"}, [], sides)
    assert len(shown) == 2
    assert history == []
    assert "your message was blocked" in line and "<summary>scores" in line


def test_corrupt_image_leaves_the_conversation_as_it_was(tmp_path: Path) -> None:
    from vision_adapter.adapter import VisionAdapter
    from vision_adapter.config import VisionConfig

    (tmp_path / "broken.png").write_bytes(b"not an image")
    core, tokenizer = tiny_core()
    assistant = Assistant(core, tokenizer, [VisionAdapter(VisionConfig(), core.config)])
    before = [Message("user", "hello"), Message("assistant", "hi")]
    payload = {"text": "what is this?", "files": [str(tmp_path / "broken.png")]}
    _, shown, history, _ = respond(assistant, None, payload, before, [])
    assert shown == []
    assert history == before


def test_bars_show_every_category_of_the_taxonomy() -> None:
    shown = views.bars(Guards("bad").classify([[Message("user", "bad")]])[0])
    assert shown.count('class="bar category"') == 14
    assert "width:100.0%" in shown


def test_scorecard_shows_own_runs_before_committed_ones(tmp_path: Path) -> None:
    entry = {
        "task": "scenes",
        "n": 10,
        "section": "vision",
        "title": "t",
        "metrics": {"exact_match": {"value": 0.9, "ci95": [0.8, 1.0]}},
        "controls": {},
        "provenance": {"model": "nano", "date": "today", "command": "evals quickstart"},
    }
    path = tmp_path / "runs" / "quickstart" / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps([entry]))
    assert views.results_files(tmp_path)[0] == path
    assert "0.900" in views.scorecard([path])
    path.write_text("{}")
    assert "not a results file" in views.scorecard([path])


def test_app_builds_for_a_model_that_has_only_a_core() -> None:
    built = app.build(Says("x"), None)
    labels = [block.label for block in built.blocks.values() if type(block).__name__ == "Tab"]
    assert labels == ["Chat", "Attention", "Transcription", "Moderation", "Scorecard"]


def test_attention_is_drawn_for_a_picture_and_mistakes_are_said(tmp_path: Path) -> None:
    from core_llm.checkpoint import load_core
    from evals.tasks.vision import bundled_scene
    from vision_adapter.adapter import load

    core, tokenizer = load_core("nano")
    assistant = Assistant(core, tokenizer, [load("nano", core)])
    path = tmp_path / "scene.png"
    bundled_scene(0)[1].save(path)
    sheet = conversation.attention(assistant, str(path), "what color is the shape?")
    assert sheet.mode == "RGB" and sheet.width > sheet.height
    for model, asked in ((assistant, " "), (Assistant(core, tokenizer), "what?")):
        with pytest.raises(UserError):
            conversation.attention(model, str(path), asked)
