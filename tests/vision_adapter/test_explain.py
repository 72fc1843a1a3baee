"""Where the answer looked: weights against what the layers really read, maps against the picture."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from core_llm.adapters import Assistant
from core_llm.chat import Image, Message, Text
from core_llm.checkpoint import load_core
from core_llm.data.scenes import sample_scene
from core_llm.errors import MediaError, UserError
from core_llm.sampling import Sampling
from core_llm.testing import tiny_core
from vision_adapter import cli, overlay
from vision_adapter.adapter import VisionAdapter, load
from vision_adapter.config import VisionConfig
from vision_adapter.encoders import View, nano_view
from vision_adapter.explain import Explanation, attention_weights, explain
from vision_adapter.scenes import draw, draw_layout, layout, patch_labels

CONFIG = VisionConfig(
    stem_channels=(8, 8), encoder_dim=32, encoder_layers=1, encoder_heads=2, encoder_ffn_dim=48,
    token_rows=3, cross_ffn_dim=32, cross_layers=(0, 1),
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny() -> Assistant:
    """A random family with open gates, so that pictures matter."""
    core, tokenizer = tiny_core()
    torch.manual_seed(1)
    adapter = VisionAdapter(CONFIG, core.config).eval().requires_grad_(False)
    for name, parameter in adapter.named_parameters():
        if name.endswith("_gate"):
            parameter.fill_(1.5)
        elif "stem" in name or "projector" in name:
            parameter.mul_(4)
    return Assistant(core, tokenizer, [adapter])


@pytest.fixture(scope="module")
def nano() -> Assistant:
    core, tokenizer = load_core("nano")
    return Assistant(core, tokenizer, [load("nano", core)])


def scene(seed: int) -> Pillow.Image:
    rng = random.Random(seed)
    return draw(sample_scene(rng, "several"), rng)


def ask(*content: Any) -> list[Message]:
    return [Message("user", [Text(part) if isinstance(part, str) else Image(part) for part in content])]


def vision(assistant: Assistant) -> VisionAdapter:
    adapter = assistant.adapters[0]
    assert isinstance(adapter, VisionAdapter)
    return adapter


def test_weights_times_values_are_what_the_layers_read(tiny: Assistant) -> None:
    adapter, tokens = vision(tiny), (5, 6, 7)
    read: dict[str, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}
    hooks = []
    for name, block in adapter.cross_attention.items():
        hooks.append(block.o_proj.register_forward_pre_hook(lambda m, x, n=name: read.update({n: x[0]})))  # type: ignore[operator, union-attr]
        hooks.append(block.v_proj.register_forward_hook(lambda m, x, y, n=name: values.update({n: y})))  # type: ignore[operator, union-attr]
    weights = attention_weights(tiny, adapter, ask(scene(3), "what is it?"), tokens)
    for hook in hooks:
        hook.remove()
    assert sorted(weights) == [0, 1]
    for layer, shares in weights.items():
        heads, _, positions = shares.shape
        own = values[str(layer)][0].double().unflatten(-1, (-1, tiny.core.config.head_dim))  # [S, G, D]
        assert len(own) == positions and heads > own.shape[1]
        own = own.repeat_interleave(heads // own.shape[1], dim=1)
        mixed = torch.einsum("hts,shd->thd", shares.double(), own).flatten(1)
        assert torch.allclose(mixed, read[str(layer)][0, -len(tokens) :].double(), atol=1e-5)
        assert shares.std() > 0.01 / positions  # not simply even


def test_queries_are_those_of_the_cached_decoding(tiny: Assistant) -> None:
    adapter, conversation = vision(tiny), ask(scene(4), "how many red shapes are there?")
    block = adapter.cross_attention["1"]
    made: list[torch.Tensor] = []
    hook = block.q_norm.register_forward_hook(lambda m, x, y: made.append(y[0, :, -1]))  # type: ignore[operator, union-attr]
    tokens = tiny.complete([conversation], Sampling(max_new_tokens=5))[0].tokens
    hook.remove()
    memory = adapter.encode(adapter.preprocess([conversation[0].parts[0]]))  # type: ignore[list-item]
    keys = memory.keys[1][0]
    expected = attention_weights(tiny, adapter, conversation, tokens)[1]
    assert len(tokens) > 1
    for step in range(len(tokens)):
        q = made[step].double()
        k = keys.repeat_interleave(len(q) // len(keys), dim=0).double()
        scores = (k @ q[:, :, None])[..., 0] / q.shape[-1] ** 0.5
        assert torch.allclose(scores.softmax(-1), expected[:, step].double(), atol=1e-5)


def test_maps_are_shares_and_the_answer_is_the_assistants_own(nano: Assistant) -> None:
    picture = scene(5)
    found = explain(nano, picture, "how many shapes are there?")
    assert found.answer == nano.generate([ask(picture, "how many shapes are there?")])[0]
    assert "".join(found.tokens).strip() == found.answer
    assert found.maps.shape == (len(found.tokens), 8, 8)
    assert torch.allclose(found.maps.sum((1, 2)), torch.ones(len(found.tokens)), atol=1e-5)


def test_nano_looks_at_the_shape_that_it_is_asked_about(nano: Assistant) -> None:
    rng = random.Random(7)
    on, chance, elsewhere = [], [], []
    places = []
    for number in range(12):
        plan = layout(sample_scene(rng, "single"), rng)
        question = ("what color is the shape?", "what shape is in the image?")[number % 2]
        found = explain(nano, draw_layout(plan, rng, 64), question)
        covered = patch_labels(plan, 8)["color"] > 0
        places.append(covered)
        mean = found.maps.mean(dim=0)
        on.append(float(mean[covered].sum()))
        chance.append(float(covered.float().mean()))
        elsewhere.append(float(mean[places[number - 1] & ~covered].sum()) if number else 0.0)
    assert np.mean(on) > 2 * np.mean(chance)
    assert sum(a > b for a, b in zip(on, chance, strict=True)) >= 10
    assert np.mean(elsewhere) < np.mean(chance)  # where another picture has its shape


def one_hot(width: int, height: int, row: int, column: int) -> np.ndarray:
    maps = torch.zeros(1, 8, 8)
    maps[0, row, column] = 1
    picture = Pillow.new("RGB", (width, height))
    found = Explanation("?", "!", ("!",), maps, nano_view(CONFIG, width, height), picture)
    return found.heat(maps[0])


@pytest.mark.parametrize("size", [(64, 64), (640, 320), (100, 400), (33, 21)])
def test_a_patch_lights_up_at_its_own_place_in_the_picture(size: tuple[int, int]) -> None:
    width, height = size
    patch = max(size) / 8
    for row, column in ((1, 1), (1, 0), (0, 1)):
        heat = one_hot(width, height, row, column)
        assert heat.shape == (height, width)
        y, x = np.unravel_index(heat.argmax(), heat.shape)
        assert column * patch - 1 <= x <= (column + 1) * patch + 1
        assert row * patch - 1 <= y <= (row + 1) * patch + 1
        assert heat.max() > 0.5 * 64 * min(1.0, patch / 8)


def test_attention_on_padding_is_cut_off() -> None:
    assert one_hot(640, 320, 7, 3).max() == 0
    assert one_hot(320, 640, 3, 7).max() == 0
    assert one_hot(640, 320, 3, 7).max() > 30


def test_overlay_is_bright_where_attention_is_and_has_a_panel_for_every_token() -> None:
    maps = torch.zeros(3, 8, 8)
    maps[:, 2, 5] = 1
    picture = Pillow.new("RGB", (64, 32), (128, 128, 128))
    tokens = ("two", " red", "\n")
    found = Explanation("what?", "two red", tokens, maps, nano_view(CONFIG, 64, 32), picture)
    sheet = overlay.draw(found)
    assert sheet.mode == "RGB" and sheet.width >= 5 * overlay.PANEL  # picture, mean, three tokens
    grey = np.asarray(sheet.convert("L"), float)
    third = grey[:, 4 * (overlay.PANEL + 12) + 12 :][:, : overlay.PANEL]
    spot = third[
        58 + round(2.5 * 22) - 4 : 58 + round(2.5 * 22) + 4, round(5.5 * 22) - 4 : round(5.5 * 22) + 4
    ]
    assert spot.min() > third[60 : 60 + 30, 10:60].max() + 30
    assert overlay.draw(Explanation("w" * 300, "x", tokens[:1], maps[:1], found.view, picture)).width <= 480


def test_what_cannot_be_explained_is_said_in_one_line(tiny: Assistant, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="question is empty"):
        explain(tiny, scene(1), "  ")
    with pytest.raises(UserError, match="no adapter"):
        explain(Assistant(tiny.core, tiny.tokenizer), scene(1), "what?")
    with pytest.raises(MediaError, match=r"gone\.png"):
        explain(tiny, tmp_path / "gone.png", "what?")
    for conversation in (ask("no picture"), ask(scene(1), "and", scene(2))):
        with pytest.raises(UserError, match="exactly one picture"):
            attention_weights(tiny, vision(tiny), conversation, (1,))
    hooked = [m for m in vision(tiny).modules() if m._forward_hooks]
    assert not hooked


def test_command_writes_the_overlay_and_names_a_wrong_ending(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene(2).save(tmp_path / "scene.png")
    out = tmp_path / "new" / "overlay.png"
    cli.explain(tmp_path / "scene.png", "how many shapes are there?", out)
    with Pillow.open(out) as sheet:
        assert sheet.width > overlay.PANEL
    assert str(out) in capsys.readouterr().out
    with pytest.raises(UserError, match=r"overlay\.txt"):
        cli.explain(tmp_path / "scene.png", "what?", tmp_path / "overlay.txt")


def test_a_view_of_less_than_a_pixel_is_drawn_as_one() -> None:
    maps = torch.full((1, 2, 2), 0.25)
    view = View(torch.arange(4).view(2, 2), (0.0, 499.5, 1.0, 500.5))  # of a crop from the middle
    heat = Explanation("?", "!", ("!",), maps, view, Pillow.new("RGB", (1, 1000))).heat(maps[0])
    assert heat.shape == (1000, 1) and (heat > 0).sum() == 1 and heat[500, 0] == pytest.approx(1.0)
