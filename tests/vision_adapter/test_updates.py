"""Adapters of every kind: created, trained with updates of the core and without, saved and loaded."""

import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as Pillow
from safetensors.torch import load_file, save_file
from torch import Tensor

from core_llm.adapters import Assistant
from core_llm.chat import Image, Message, Text
from core_llm.checkpoint import core_hash, load_core, save_core
from core_llm.errors import CheckpointError, UserError
from core_llm.lora import has_updates
from core_llm.model import Llama
from core_llm.testing import tiny_core
from core_llm.tokenizer import Tokenizer
from vision_adapter import cli
from vision_adapter.adapter import load, load_on_other_core, load_own
from vision_adapter.create import create
from vision_adapter.examples import Example, scene_examples
from vision_adapter.fusion import FusionAdapter
from vision_adapter.mllama_adapter import MllamaAdapter
from vision_adapter.stages.answers import AnswerTask
from vision_adapter.stages.presets import PARTS, StageConfig
from vision_adapter.stages.run import run_stage
from vision_adapter.stages.trainable import chosen_parts

NANO = {
    "image_size": 32, "stem_channels": [8, 8], "encoder_dim": 32, "encoder_layers": 1, "encoder_heads": 2,
    "encoder_ffn_dim": 48,
}  # fmt: skip
MLLAMA = {
    "image_size": 16, "patch_size": 8, "dim": 16, "n_layers": 2, "n_global_layers": 1, "n_heads": 2,
    "ffn_dim": 24, "intermediate_layers": [0, 1],
}  # fmt: skip
ENCODERS = {"nano": NANO, "mllama": MLLAMA, "open_clip:updates-resnet": {}, "llama-3.2-vision": MLLAMA}
KINDS = ["vision", *ENCODERS]
TINY = StageConfig(
    steps=3, batch=4, micro_batch=2, lr=1e-2, warmup=0, text_dim=16, text_layers=1, text_heads=2,
    text_length=24, embedding=16, lora_rank=2,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def tower(tmp_path_factory: pytest.TempPathFactory) -> None:
    import open_clip

    path = tmp_path_factory.mktemp("towers") / "updates-resnet.json"
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(path)


@pytest.fixture
def family() -> tuple[Llama, Tokenizer]:
    """New for every test: updates are attached to it."""
    return tiny_core()


def made(kind: str, core: Llama) -> Any:
    """Random, with open gates, of values that bf16 can express."""
    if kind == "vision":
        from vision_adapter.adapter import VisionAdapter
        from vision_adapter.config import VisionConfig

        torch.manual_seed(3)
        adapter: Any = VisionAdapter(VisionConfig.from_dict({**NANO, "cross_layers": [0, 1]}), core.config)
    else:
        settings = json.dumps(ENCODERS[kind]) if ENCODERS[kind] else ""
        adapter = create(kind, core.config, settings, (0, 1), seed=3)
    for name, parameter in adapter.named_parameters():
        if name.endswith("_gate"):
            parameter.data.fill_(1.0)
        elif name.startswith("projector"):
            parameter.data.mul_(4)
    return adapter.bfloat16().float().eval().requires_grad_(False)


def conversations() -> list[list[Message]]:
    red, blue = (Pillow.new("RGB", (40, 30), colour) for colour in ("red", "blue"))
    return [
        [Message("user", [Image(red), Text("what?")]), Message("assistant", "a red one")],
        [Message("user", [Text("no picture")]), Message("assistant", "none at all")],
        [Message("user", [Image(red), Text("and"), Image(blue), Text("so?")]), Message("assistant", "two")],
    ]


def answers(core: Llama, tokenizer: Tokenizer, *adapters: Any) -> list[Tensor]:
    with torch.inference_mode():
        return Assistant(core, tokenizer, adapters).logits(conversations())


def equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@dataclass(frozen=True, eq=False)
class Row(Example):
    """A row with any number of pictures."""

    messages: tuple[Message, ...] = ()

    def conversation(self, last: str | None = None) -> list[Message]:
        return list(self.messages)


@pytest.mark.parametrize("kind", KINDS)
def test_one_door_loads_every_kind_and_it_answers_as_before(
    kind: str, family: tuple[Llama, Tokenizer], tmp_path: Path
) -> None:
    adapter = made(kind, family[0])
    adapter.save(tmp_path / "eyes", family[0], "a card")
    again = load(tmp_path / "eyes", family[0])
    assert type(again) is type(adapter) and again.lora is None
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert equal(answers(*family, again), answers(*family, adapter))
    with pytest.raises(CheckpointError, match="was trained on another core"):
        load(tmp_path / "eyes", tiny_core(seed=4)[0])
    moved = load_on_other_core(tmp_path / "eyes", tiny_core(seed=4)[0])
    assert all(torch.equal(t, moved.state_dict()[name]) for name, t in adapter.state_dict().items())


def test_a_config_without_the_adapters_shape_is_one_line(
    family: tuple[Llama, Tokenizer], tmp_path: Path
) -> None:
    from core_llm.checkpoint import read_adapter_config

    core, _ = family
    (tmp_path / "config.json").write_text(json.dumps({"kind": "vision", "core_hash": core_hash(core)}))
    for door in (
        load,
        load_on_other_core,
        load_own,
        lambda folder, core: read_adapter_config(folder, "vision", core),
    ):
        with pytest.raises(CheckpointError, match="says nothing of the"):
            door(tmp_path, core)


def test_unknown_kinds_list_the_known_ones(family: tuple[Llama, Tokenizer], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"kind": "nose"}')
    with pytest.raises(
        CheckpointError, match="holds a nose, not an image adapter; known kinds: vision, mllama, fu"
    ):
        load(tmp_path, family[0])
    (tmp_path / "config.json").write_text('{"model_type": "mllama"}')
    with pytest.raises(
        CheckpointError, match="core and adapter in one; split it with `vision-adapter convert"
    ):
        load(tmp_path, family[0])
    save_core(tmp_path / "core", *family)
    with pytest.raises(CheckpointError, match="holds a core, not an image adapter"):
        load(tmp_path / "core", family[0])
    made("nano", family[0]).save(tmp_path / "eyes", family[0])
    with pytest.raises(CheckpointError, match="holds a fusion, not a vision"):
        load_own(tmp_path / "eyes", family[0])  # what video layers are trained with


@pytest.mark.parametrize("kind", KINDS)
def test_updates_of_the_core_learn_beside_it_and_are_stored_with_the_adapter(
    kind: str, family: tuple[Llama, Tokenizer], tmp_path: Path
) -> None:
    core, tokenizer = family
    bare, hashed = answers(*family, made(kind, core))[1], core_hash(core)
    adapter = made(kind, core)
    rows = [Row(f"r{i}", "", (), messages=tuple(messages)) for i, messages in enumerate(conversations())]
    config = replace(TINY, trained=chosen_parts("projector,cross_attention,core-lora", "sft"))
    before = copy.deepcopy(adapter.state_dict())
    trained, _ = run_stage("sft", core, tokenizer, adapter, (rows, []), tmp_path / "state", config)
    assert trained.lora is not None and core_hash(core) == hashed
    assert all(p.grad is None for p in core.parameters())
    assert all(update.abs().sum() > 0 for update in trained.lora.parameters())
    changed = {
        name.split(".")[0] for name, t in trained.state_dict().items() if not torch.equal(t, before[name])
    }
    assert changed == {"projector", "token_rows", "cross_attention"}
    trained.eval()
    trained.save(tmp_path / "eyes", core)
    trained.lora.detach()
    assert torch.equal(answers(core, tokenizer, trained)[1], bare)  # text, with the updates off

    fresh, _ = tiny_core()
    again = load(tmp_path / "eyes", fresh)
    assert again.lora is not None and not any(p.requires_grad for p in again.lora.parameters())
    for module in (trained, trained.lora):
        module.bfloat16().float()  # as stored
    trained.lora.attach()
    found = answers(fresh, tokenizer, again)
    assert equal(found, answers(core, tokenizer, trained)) and not torch.equal(found[1], bare)
    again.lora.merge()
    for ours, merged in zip(found, answers(fresh, tokenizer, again), strict=True):
        assert torch.allclose(ours, merged, atol=1e-4)
    again.lora.detach()
    assert torch.equal(answers(fresh, tokenizer, again)[1], bare) and core_hash(fresh) == hashed


def test_a_stage_continues_with_the_updates_it_finds(family: tuple[Llama, Tokenizer], tmp_path: Path) -> None:
    core, tokenizer = family
    rows = [Row("r", "", (), messages=tuple(conversations()[0]))]
    config = replace(TINY, trained=("core-lora",), batch=1)
    adapter, _ = run_stage("sft", core, tokenizer, made("nano", core), (rows, []), tmp_path / "a", config)
    adapter.save(tmp_path / "eyes", core)
    assert adapter.lora is not None
    other, _ = tiny_core()
    again: Any = load(tmp_path / "eyes", other)
    kept = [p.clone() for p in again.lora.parameters()]
    run_stage("sft", other, tokenizer, again, (rows, []), tmp_path / "b", replace(config, trained=PARTS))
    assert equal(kept, list(again.lora.parameters()))
    run_stage("sft", other, tokenizer, again, (rows, []), tmp_path / "c", config)
    assert not equal(kept, list(again.lora.parameters()))
    whole = {name: p.clone() for name, p in again.lora.state_dict().items()}
    third, _ = tiny_core()
    resumed: Any = load(tmp_path / "eyes", third)
    run_stage("sft", third, tokenizer, resumed, (rows, []), tmp_path / "c", config)  # nothing is left to do
    assert all(torch.equal(p, whole[name]) for name, p in resumed.lora.state_dict().items())


def test_updates_that_do_not_belong_are_refused(family: tuple[Llama, Tokenizer], tmp_path: Path) -> None:
    core, tokenizer = family
    adapter = made("nano", core)
    task = AnswerTask("sft", core, tokenizer, adapter, [], [], replace(TINY, trained=("core-lora",)))
    assert task.lora is adapter.lora and has_updates(core)
    assert copy.deepcopy(adapter).lora is adapter.lora
    assert not any("lora" in name for name in adapter.state_dict())
    folder = tmp_path / "eyes"
    adapter.save(folder, core)
    with pytest.raises(UserError, match="low-rank updates attached already"):
        load(folder, core)
    with pytest.raises(CheckpointError, match="it cannot move to another"):
        load_on_other_core(folder, core)
    path = folder / "lora" / "model.safetensors"
    stored = load_file(path)
    save_file({name: tensor + 1 for name, tensor in stored.items()}, path)
    fresh, _ = tiny_core()
    with pytest.raises(CheckpointError, match="not those that the adapter was saved with"):
        load(folder, fresh)
    path.unlink()
    with pytest.raises(CheckpointError, match="the core's updates that belong to this adapter are missing"):
        load(folder, fresh)
    adapter.hold(None)
    adapter.save(folder, core)
    assert not (folder / "lora").exists() and load(folder, fresh).lora is None


@pytest.mark.parametrize("kind", ["open_clip:updates-resnet", "mllama", "llama-3.2-vision"])
def test_any_encoder_learns_from_captions(kind: str, family: tuple[Llama, Tokenizer], tmp_path: Path) -> None:
    examples = scene_examples(6, "updates", 32)
    adapter = made(kind, family[0])
    before = copy.deepcopy(adapter.state_dict())
    trained, figures = run_stage("contrastive", *family, adapter, (examples, examples[:3]), tmp_path, TINY)
    changed = {name for name, t in trained.state_dict().items() if not torch.equal(t, before[name])}
    assert {name.split(".")[0] for name in changed} == {"encoder"} and figures["held_out_loss"] > 0
    assert not any("running_" in name for name in changed)  # the tower's statistics


def test_parts_are_chosen_by_name() -> None:
    assert chosen_parts("", "sft") == PARTS
    assert chosen_parts("projector, core-lora", "sft") == ("projector", "core-lora", "token_rows")
    with pytest.raises(UserError, match="contrastive trains the encoder alone"):
        chosen_parts("projector", "contrastive")
    with pytest.raises(UserError, match="unknown part 'nose'; known: encoder, .*core-lora"):
        replace(TINY, trained=chosen_parts("nose", "sft"))


def test_dpo_does_not_train_the_core(family: tuple[Llama, Tokenizer], tmp_path: Path) -> None:
    examples = scene_examples(4, "updates", 32)
    config = replace(TINY, trained=("core-lora",))
    with pytest.raises(UserError, match="dpo does not train core-lora"):
        run_stage("dpo", *family, made("nano", family[0]), (examples, []), tmp_path, config)


@pytest.mark.parametrize(
    ("encoder", "settings", "message"),
    [
        ("eye", "", "unknown encoder 'eye'; known: nano, mllama, open_clip:MODEL"),
        ("open_clip:", "", "write open_clip:MODEL"),
        ("open_clip:no-such-model", "", "open_clip has no model 'no-such-model'"),
        ("mllama", "{", "--settings is not JSON"),
        ("mllama", "[1]", "--settings is not a JSON object"),
        ("mllama", '{"colour": 1}', "unknown vision configuration keys: colour"),
    ],
)
def test_mistakes_in_creating_one_are_named(encoder: str, settings: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        create(encoder, tiny_core()[0].config, settings)


def test_commands_create_train_and_ask(
    family: tuple[Llama, Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["vision-adapter", *arguments])
        cli.main()
        return str(capsys.readouterr().out)

    small = {"small": dict.fromkeys(("sft",), replace(TINY, image_size=64))}
    monkeypatch.setattr("vision_adapter.stages.presets.PRESETS", small)
    core, eyes, out = (str(tmp_path / name) for name in ("core", "eyes", "vision_adapter"))
    save_core(Path(core), *family)
    hashed = core_hash(load_core(core)[0])
    settings = json.dumps(MLLAMA)
    assert "cross_attention" in call(
        "create", eyes, "--encoder", "mllama", "--settings", settings, "--core", core, "--cross-ffn-dim", "32"
    )
    with pytest.raises(SystemExit):
        call("create", eyes, "--encoder", "mllama", "--core", core)
    assert "is not empty" in capsys.readouterr().err
    parts = ("--trainable", "projector,cross_attention,core-lora", "--lora-rank", "3")
    said = call("stage", "sft", "scenes", out, "--core", core, "--adapter", eyes, "--steps", "2", *parts)
    assert "held_out_loss" in said
    assert (
        json.loads((tmp_path / "vision_adapter" / "lora" / "config.json").read_text())["adapter"]["rank"] == 3
    )
    Pillow.new("RGB", (50, 20), "green").save(tmp_path / "p.png")
    ask = (str(tmp_path / "p.png"), "what?", "--core", core, "--adapter", out, "--max-new-tokens", "3")
    first = call("answer", *ask)
    assert first == call("answer", *ask) and core_hash(load_core(core)[0]) == hashed
    assert first.strip() in call("explain", *ask, "--out", str(tmp_path / "o.png"))

    from evals.models import Subject

    subject = Subject(tmp_path)
    assistant = subject.assistant
    assert isinstance(assistant.adapters[0], FusionAdapter | MllamaAdapter)
    conversation = [[Message("user", [Text("no picture")])]]
    with torch.inference_mode():
        plain = Assistant(load_core(core)[0], family[1]).logits(conversation)
        assert equal(subject.bare.logits(conversation), plain)
        assert not equal(assistant.logits(conversation), plain)  # the updates are on
        quantized = Subject(tmp_path, "int8")
        off = (quantized.assistant.logits(conversation)[0] - assistant.logits(conversation)[0]).abs().max()
        assert off < (plain[0] - assistant.logits(conversation)[0]).abs().max()
    before = subject.part_hashes["image"]
    (tmp_path / "vision_adapter" / "lora" / "config.json").write_text("{}")
    assert Subject(tmp_path).part_hashes["image"] != before


def test_settings_of_a_wrong_kind_are_named(family: tuple[Llama, Tokenizer]) -> None:
    core, _ = family
    for encoder, settings, message in (
        ("mllama", {"dim": "big"}, 'dim is "big"'),
        ("mllama", {"n_heads": 0}, "n_heads is 0; whole numbers from 1"),
        ("mllama", {"n_layers": 2.5}, "n_layers is 2.5"),
        ("mllama", {"intermediate_layers": 3}, "intermediate_layers is 3, not a list"),
        ("llama-3.2-vision", {"intermediate_layers": ["x"]}, "intermediate_layers is"),
        ("nano", {"encoder_dim": None}, "encoder_dim is null"),
        ("nano", {"stem_channels": [7, 8]}, "do not fit together"),
        ("nano", {"stem_channels": [8, 8, 8]}, "do not fit together"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            create(encoder, core.config, json.dumps(settings))
        assert "\n" not in str(caught.value)
