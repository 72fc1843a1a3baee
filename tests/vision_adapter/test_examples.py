"""Rows with several pictures, and which rows are held out together."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as Pillow

from core_llm.adapters import Assistant
from core_llm.chat import Text
from core_llm.data.tables import held_out
from core_llm.errors import DataError
from core_llm.testing import tiny_core
from vision_adapter.adapter import VisionAdapter
from vision_adapter.config import VisionConfig
from vision_adapter.curate_run import CurationConfig, curate
from vision_adapter.examples import Example, load_examples
from vision_adapter.stages.answers import AnswerTask
from vision_adapter.stages.contrastive import ContrastiveTask
from vision_adapter.stages.presets import StageConfig

VISION = VisionConfig(
    stem_channels=(8, 8), encoder_dim=32, encoder_layers=1, encoder_heads=2, encoder_ffn_dim=48,
    token_rows=3, cross_ffn_dim=32, cross_layers=(0, 1), image_size=32,
)  # fmt: skip
CONFIG = StageConfig(steps=2, batch=2, micro_batch=0, lr=1e-3, warmup=0)
COLOURS = ("red", "green", "blue", "black")


def table(root: Path, *rows: dict[str, Any]) -> str:
    root.mkdir(exist_ok=True)
    for colour in COLOURS:
        Pillow.new("RGB", (32, 32), colour).save(root / f"{colour}.png")
    (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(root)


def shown(example: Example) -> list[list[str]]:
    """Per message its texts, and the names of its pictures."""
    return [
        [part.text if isinstance(part, Text) else Path(str(part.data)).stem for part in message.parts]  # type: ignore[union-attr]
        for message in example.conversation()
    ]


def test_pictures_stand_at_their_marks_or_first(tmp_path: Path) -> None:
    two = ["red.png", "blue.png"]
    rows = (
        {"images": two, "question": "which is red?", "answer": "the first"},
        {"images": two, "question": "is <image>\nlike <image> or not?", "answer": "no"},
        {"images": two, "turns": [["<image> what?", "red"], ["and <image>?", "blue"]]},
        {"images": ["red.png"], "question": "what is it?\n<image>", "answer": "red"},
        {"image": "red.png", "conversations": [{"value": "<image>\nwhat?"}, {"value": "red"}]},
    )
    found = load_examples(table(tmp_path / "in", *rows), split="all")
    assert [len(example.pictures) for example in found] == [2, 2, 2, 1, 1]
    assert [shown(example) for example in found] == [
        [["red", "blue", "which is red?"], ["the first"]],
        [["is", "red", "like", "blue", "or not?"], ["no"]],
        [["red", "what?"], ["red"], ["and", "blue", "?"], ["blue"]],
        [["red", "what is it?"], ["red"]],
        [["red", "what?"], ["red"]],
    ]


def test_marks_and_pictures_must_be_as_many(tmp_path: Path) -> None:
    for question, marks in (("<image>?", 1), ("<image><image><image>?", 3)):
        row = {"images": ["red.png", "blue.png"], "question": question, "answer": "no"}
        with pytest.raises(DataError, match=f"row 1: 2 images, but {marks} marks"):
            load_examples(table(tmp_path / "in", row), split="all")
    for images in ("red.png", ["red.png", 3]):
        with pytest.raises(DataError, match="row 1 names no picture"):
            load_examples(table(tmp_path / "in", {"images": images, "caption": "x"}), split="all")


def test_a_stage_learns_from_rows_of_several_pictures(tmp_path: Path) -> None:
    rows = [
        {
            "id": f"r{i}",
            "images": [f"{a}.png", f"{b}.png"],
            "question": "what <image> then <image>?",
            "answer": a,
        }
        for i, (a, b) in enumerate(zip(COLOURS, COLOURS[1:], strict=False))
    ]
    examples = load_examples(table(tmp_path / "in", *rows), split="all")
    core, tokenizer = tiny_core()
    torch.manual_seed(0)
    adapter = VisionAdapter(VISION, core.config)
    for name, parameter in adapter.named_parameters():
        if name.endswith("_gate"):
            parameter.data.fill_(1.0)
    task = AnswerTask("sft", core, tokenizer, adapter, examples, examples, CONFIG)
    loss, _ = task.loss(examples)
    assert loss.item() == pytest.approx(
        Assistant(core, tokenizer, [adapter]).loss([e.conversation() for e in examples]).item(), abs=1e-5
    )
    loss.backward()
    grads = [p.grad for p in adapter.parameters()]
    assert all(g is not None and g.isfinite().all() for g in grads)
    swapped = Example("s", examples[0].others[0], examples[0].turns, None, (examples[0].image,))
    assert task.loss([swapped])[0].item() != pytest.approx(task.loss(examples[:1])[0].item(), abs=1e-4)
    with torch.no_grad():
        figures = task.evaluate()
    assert figures["held_out_loss_shuffled"] != pytest.approx(figures["held_out_loss"], abs=1e-5)
    with pytest.raises(DataError, match="r0: has several pictures; contrastive reads pairs"):
        ContrastiveTask(tokenizer, adapter, examples, [], CONFIG)
    with pytest.raises(DataError, match="r0: has several pictures; curate reads pairs"):
        curate(examples, tmp_path / "out", CurationConfig())


def test_the_control_shows_another_picture_than_the_texts_own(tmp_path: Path) -> None:
    rows = [
        {"id": f"{colour}-{i}", "image": f"{colour}.png", "caption": f"{colour} {i}"}
        for colour in COLOURS[:3]
        for i in range(3)
    ]
    examples = load_examples(table(tmp_path / "in", *rows), split="all")
    core, tokenizer = tiny_core()
    task = AnswerTask("sft", core, tokenizer, VisionAdapter(VISION, core.config), examples, examples, CONFIG)
    batches: list[list[Example]] = []

    def noted(batch: list[Example]) -> tuple[torch.Tensor, dict[str, float]]:
        batches.append(batch)
        return torch.zeros(()), {}

    task.loss = noted  # type: ignore[method-assign, assignment]
    task.evaluate()
    plain, moved = batches
    assert plain == examples and [e.turns for e in moved] == [e.turns for e in plain]
    assert all(a.image != b.image for a, b in zip(plain, moved, strict=True))


def test_rows_about_one_picture_are_held_out_together(tmp_path: Path) -> None:
    root = table(tmp_path / "in")
    rows = []
    for n in range(80):
        Pillow.new("RGB", (8, 8), (n, n, n)).save(Path(root) / f"{n}.png")
        rows += [{"id": f"{n}-{i}", "image": f"{n}.png", "caption": f"caption {i}"} for i in range(3)]
    rows.append({"id": "alone", "image": "red.png", "caption": "red"})
    table(tmp_path / "in", *rows)
    train, dev = ({str(e.image) for e in load_examples(root, split=s)} for s in ("train", "dev"))
    assert dev and not train & dev and len(train | dev) == 81
    assert (str(Path(root) / "red.png") in dev) == held_out("alone")
    assert any(held_out(row["id"]) != held_out(row["image"]) for row in rows)  # ids alone would part them


def test_an_empty_cell_of_a_dataset_is_named(tmp_path: Path) -> None:
    import datasets

    Pillow.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = {"image": [str(tmp_path / "a.png"), None], "caption": ["one", "two"]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(
        str(tmp_path / "saved")
    )
    with pytest.raises(DataError, match="row 1 of all has nothing in 'image'"):
        load_examples(str(tmp_path / "saved"), split="all")
