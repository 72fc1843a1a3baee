"""Packing, the two tasks, and the command line."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image as Pillow

from core_llm.adapters import Assistant
from core_llm.chat import Image
from core_llm.checkpoint import core_hash, save_core
from core_llm.data.levels import LEVELS, SKILLS
from core_llm.data.scenes import Bar, Scene, sample_scene
from core_llm.errors import DataError
from core_llm.testing import tiny_core
from vision_adapter import cli, images
from vision_adapter.adapter import VisionAdapter, load
from vision_adapter.config import VisionConfig
from vision_adapter.samples import (
    KINDS,
    Sample,
    conversation,
    easy_vqa,
    ordered_description,
    pack,
    scene_sample,
    vary,
)
from vision_adapter.scenes import draw
from vision_adapter.train import EncoderTask, Recipe, VisionTask, skill_samples, train

CONFIG = VisionConfig(
    stem_channels=(8, 8), encoder_dim=32, encoder_layers=1, encoder_heads=2, encoder_ffn_dim=48,
    token_rows=3, cross_ffn_dim=32,
)  # fmt: skip
LEVEL_SKILLS = tuple(f"{level}-{skill}" for level, shape in LEVELS.items() for skill in shape.skills)
SMALL = Recipe(steps=3, warm_up_steps=2, warm_up_pictures=4, pictures=4, dialogues=3, held_out=3)


def opened(core: object) -> VisionAdapter:
    torch.manual_seed(0)
    adapter = VisionAdapter(CONFIG, core.config)  # type: ignore[attr-defined]
    for name, parameter in adapter.named_parameters():
        if name.endswith("_gate"):
            parameter.data.fill_(1.0)
    return adapter


def fake_easy_vqa(root: Path, n: int = 30) -> None:
    folder = root / "easy_vqa"
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(n):
        rng = random.Random(i)
        scene = sample_scene(rng, "single")
        draw(scene, rng).save(folder / "images" / f"{i}.png")
        rows += [["what color is the shape?", scene.items[0].color, i], ["is there a circle?", "no", i]]
    (folder / "questions.json").write_text(json.dumps(rows))


def test_packed_loss_equals_the_loss_of_separate_conversations() -> None:
    core, tokenizer = tiny_core()
    adapter = opened(core)
    rng = random.Random(0)
    pictures = [draw(sample_scene(rng, "several"), rng) for _ in range(2)]
    dialogues = [
        [[("where is it?", "top left"), ("what is it?", "circle")], [(" how many?", "two")]],
        [[("describe the image.", "a small red circle at the top.")]],
    ]
    samples = [
        Sample(images.tile(picture, 64), turns) for picture, turns in zip(pictures, dialogues, strict=True)
    ]
    task = VisionTask(core, tokenizer, adapter, {}, 0, SMALL)
    _, figures = task.loss(pack(samples, tokenizer, CONFIG.token_rows))
    separate = [
        conversation(turns, Image(picture))
        for picture, of_picture in zip(pictures, dialogues, strict=True)
        for turns in of_picture
    ]
    expected = Assistant(core, tokenizer, [adapter]).loss(separate)
    assert figures["answer_loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert 0 <= figures["token_accuracy"] <= 1


def test_exact_match_reads_the_logits_of_the_assistant() -> None:
    core, tokenizer = tiny_core()
    adapter = opened(core).eval()
    task = VisionTask(core, tokenizer, adapter, {}, 0, SMALL)
    rng = random.Random(0)
    pictures = [draw(sample_scene(rng, "several"), rng) for _ in range(3)]
    samples = [Sample(images.tile(picture, 64), [[("what is it?", "zebra")]]) for picture in pictures]
    with torch.no_grad():
        logits, targets, dialogue = task.answer_logits(pack(samples, tokenizer, CONFIG.token_rows))
        assert task.exact_match(samples) == 0.0
    first = [(dialogue == number).nonzero()[0, 0] for number in dialogue.unique()]
    asked = [conversation([("what is it?", "")], Image(picture))[:1] for picture in pictures]
    for n, expected in zip(first, Assistant(core, tokenizer, [adapter]).logits(asked), strict=True):
        assert torch.allclose(logits[n], expected[-1], atol=1e-4)
        assert targets[n] == tokenizer.encode("zebra")[0]


def test_shuffled_control_gives_each_row_another_picture() -> None:
    core, tokenizer = tiny_core()
    task = VisionTask(core, tokenizer, opened(core).eval(), {}, 0, SMALL)
    rng = random.Random(1)
    samples = [vary(scene_sample(KINDS["several"], rng, 64), rng, 1) for _ in range(3)]
    moved = [replace(sample, tile=samples[(i + 1) % 3].tile) for i, sample in enumerate(samples)]
    with torch.no_grad():
        shuffled, _, _ = task.answer_logits(pack(samples, tokenizer, 3), shuffled=True)
        expected, _, _ = task.answer_logits(pack(moved, tokenizer, 3))
    assert torch.allclose(shuffled, expected, atol=1e-5)


def test_batches_are_a_pure_function_of_the_step() -> None:
    core, tokenizer = tiny_core()
    adapter = opened(core)
    for task in (
        VisionTask(core, tokenizer, adapter, {}, 0, SMALL),
        EncoderTask(adapter.encoder, 64, 0, SMALL),
    ):
        first, again, other = (flatten(task.batch(step)) for step in (5, 5, 6))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[0], other[0])


def flatten(batch: object) -> list[torch.Tensor]:
    return list((batch if isinstance(batch, dict) else vars(batch)).values())


def test_asked_presence_is_marked_on_the_word_itself() -> None:
    _, tokenizer = tiny_core()
    turns = [
        ("is there a red shape?", "yes", 1),
        (" is there not a circle?", "yes", 0),
        ("does the image not contain a teal shape?", "no", 1),
        ("what color is the circle?", "red", None),
        ("how many red shapes are there?", "two", None),
    ]
    sample = Sample(torch.zeros(3, 64, 64), [[(question, answer)] for question, answer, _ in turns])
    packed = pack([sample], tokenizer, 3)
    for number, (question, _, label) in enumerate(turns, start=1):
        own = packed.documents[0] == number
        marked = packed.present[0][own]
        if label is None:
            assert (marked == -1).all()
        else:
            end = int((marked >= 0).nonzero()[0])
            assert marked[end] == label and (marked >= 0).sum() == 1
            said = tokenizer.decode(packed.tokens[0][own][: end + 1].tolist())
            assert said.endswith(("red", "circle", "teal")) and question.startswith(said)


def test_description_in_reading_order_says_what_the_core_knows() -> None:
    assert ordered_description(Scene((), "cat")) == "the word cat."
    assert ordered_description(Scene((), "cat sun")) == "the words cat sun."
    bars = Scene((), None, (Bar("red", 3), Bar("blue", 1)))
    assert ordered_description(bars) == "a red bar of three, a blue bar of one."
    for seed in range(20):
        scene = sample_scene(random.Random(seed), "several")
        text = ordered_description(scene)
        assert all(f"{item.size} {item.name} at the {item.place}" in text for item in scene.items)
        assert text == ordered_description(Scene(scene.items[::-1]))


def test_kinds_ask_for_every_skill_and_follow_their_weights() -> None:
    assert {skill for kind in KINDS.values() for skill in kind.skills} == set(SKILLS)
    assert len(KINDS) == len(Recipe().kind_shares)
    rng = random.Random(0)
    for kind in KINDS.values():
        sample = scene_sample(kind, rng, 64, describe_share=1.0)
        turns = [turn for dialogue in sample.dialogues for turn in dialogue]
        assert len(turns) >= kind.questions - 1 and turns[-1][0] == "Describe the image."
    plain = [scene_sample(KINDS["one"], rng, 64, negated_share=0.0) for _ in range(50)]
    asked = [turn[0] for sample in plain for dialogue in sample.dialogues for turn in dialogue]
    assert not any(" not " in question or " no " in question for question in asked)


def test_skill_samples_hold_every_skill_and_never_change() -> None:
    first, again = skill_samples(64, 0, 3), skill_samples(64, 0, 3)
    assert tuple(first) == LEVEL_SKILLS and all(len(samples) == 3 for samples in first.values())
    assert [s.dialogues for v in first.values() for s in v] == [
        s.dialogues for v in again.values() for s in v
    ]


def test_training_leaves_the_core_alone_and_repeats_exactly(tmp_path: Path) -> None:
    core, tokenizer = tiny_core()
    before = core_hash(core)
    fake_easy_vqa(tmp_path)
    runs = []
    for name in ("a", "b"):
        torch.manual_seed(0)
        adapter = VisionAdapter(CONFIG, core.config)
        figures = train(core, tokenizer, adapter, tmp_path / name, tmp_path, 0, SMALL)
        runs.append((adapter.state_dict(), figures))
    assert core_hash(core) == before
    assert all(torch.equal(tensor, runs[1][0][key]) for key, tensor in runs[0][0].items())
    assert {"easy_vqa", "easy_vqa_shuffled", *LEVEL_SKILLS} <= set(runs[0][1])
    assert any(gate != 0 for gate in adapter.gates().values())
    assert not set(core.state_dict()) & set(
        torch.load(tmp_path / "a" / "vision.state.pt")["modules"]["adapter"]
    )


def test_easy_vqa_rows_of_one_picture_come_together(tmp_path: Path) -> None:
    fake_easy_vqa(tmp_path)
    samples = easy_vqa(tmp_path, "all", 64)
    assert len(samples) == 30 and all(len(sample.dialogues) == 2 for sample in samples)
    assert len(easy_vqa(tmp_path, "all", 64, limit=4)) == 4
    with pytest.raises(DataError, match="easy_vqa"):
        easy_vqa(tmp_path / "elsewhere", "all", 64)


def test_command_trains_saves_and_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vision_adapter.config.VisionConfig", lambda: CONFIG)
    monkeypatch.setattr(
        "vision_adapter.train.skill_samples", lambda size, seed, n: skill_samples(size, seed, 2)
    )
    core, tokenizer = tiny_core()
    save_core(tmp_path / "core", core, tokenizer)
    cli.train(tmp_path / "out", str(tmp_path / "core"), None, steps=2, warm_up_steps=1, pictures=2)
    said = capsys.readouterr().out
    assert "drawn scenes alone" in said and "word" in said
    assert "| skill | score | shuffled |" in (tmp_path / "out" / "README.md").read_text()
    Pillow.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    cli.answer(tmp_path / "red.png", "what color?", str(tmp_path / "core"), str(tmp_path / "out"), 3)
    assert capsys.readouterr().out.endswith("\n")
    assert load(tmp_path / "out", core_of(tmp_path)).config == replace(CONFIG, cross_layers=(0, 1))


def test_an_encoder_trained_before_there_is_a_core_gives_the_same_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vision_adapter.config.VisionConfig", lambda: CONFIG)
    monkeypatch.setattr("vision_adapter.train.skill_samples", lambda size, seed, n: {})
    monkeypatch.setattr("vision_adapter.train.Recipe", lambda: replace(SMALL, steps=1))
    core, tokenizer = tiny_core()
    save_core(tmp_path / "core", core, tokenizer)
    cli.train_encoder(tmp_path / "a")
    for name in ("a", "b"):
        cli.train(tmp_path / name, str(tmp_path / "core"))
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()
    lines = (tmp_path / "a" / "state" / "encoder.metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 2, 2]  # trained once, measured twice


def core_of(folder: Path) -> object:
    from core_llm.checkpoint import load_core

    return load_core(folder / "core")[0]


def test_command_line_errors_are_one_line(tmp_path: Path) -> None:
    core, tokenizer = tiny_core()
    save_core(tmp_path / "core", core, tokenizer)
    opened(core).save(tmp_path / "eyes", core)
    flags = ["--core", str(tmp_path / "core"), "--adapter", str(tmp_path / "eyes")]
    command = [sys.executable, "-c", "from vision_adapter.cli import main; main()", "answer"]
    run = subprocess.run(
        [*command, str(tmp_path / "no.png"), "what?", *flags], capture_output=True, text=True
    )
    assert run.returncode == 2 and run.stderr.startswith("error: image") and run.stderr.count("\n") == 1
    assert "no.png" in run.stderr and not run.stdout


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from vision_adapter import cli; assert not {'torch', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
