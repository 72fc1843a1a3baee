"""Any encoder behind one protocol: against open_clip's own forward, the released encoder, nano's."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as Pillow
from torch import nn

from core_llm.adapters import Assistant
from core_llm.chat import Image, Message, Text
from core_llm.checkpoint import core_hash
from core_llm.data.scenes import sample_scene
from core_llm.errors import CheckpointError, MediaError, UserError
from core_llm.model import Llama
from core_llm.testing import tiny_core
from core_llm.tokenizer import Tokenizer
from vision_adapter.encoders import ImageEncoder
from vision_adapter.explain import attention_weights, explain, view
from vision_adapter.fusion import FusionAdapter, FusionConfig, load_fusion
from vision_adapter.mllama_adapter import MllamaAdapter
from vision_adapter.mllama_config import MllamaConfig
from vision_adapter.open_clip_encoder import OpenClipEncoder
from vision_adapter.scenes import draw
from vision_adapter.stages.answers import adapter_groups
from vision_adapter.stages.presets import StageConfig
from vision_adapter.stages.trainable import chosen_parts, trained_updates

NANO = {
    "image_size": 32, "stem_channels": [8, 8], "encoder_dim": 32, "encoder_layers": 1, "encoder_heads": 2,
    "encoder_ffn_dim": 48,
}  # fmt: skip
MLLAMA = {
    "image_size": 16, "patch_size": 8, "dim": 16, "n_layers": 2, "n_global_layers": 1, "n_heads": 2,
    "ffn_dim": 24, "intermediate_layers": [0, 1],
}  # fmt: skip
TOWERS: dict[str, dict[str, Any]] = {
    "tiny-vit": {"layers": 2, "width": 24, "patch_size": 8, "head_width": 12},
    "tiny-avg": {"layers": 1, "width": 24, "patch_size": 8, "head_width": 12, "pool_type": "avg",
                 "final_ln_after_pool": True},
    "tiny-resnet": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
    "tiny-timm": {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"},
    "tiny-timm-vit": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def tiny_towers(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Give open_clip architectures that are small enough to run, by its own way of adding some."""
    import open_clip

    for name, tower in TOWERS.items():
        path = tmp_path_factory.mktemp("towers") / f"{name}.json"
        text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
        size = 160 if "timm-vit" in name else 32
        config = {"embed_dim": 16, "vision_cfg": {"image_size": size, **tower}, "text_cfg": text}
        path.write_text(json.dumps(config))
        open_clip.add_model_config(path)


@pytest.fixture(scope="module")
def family() -> tuple[Llama, Tokenizer]:
    return tiny_core()


def config(kind: str) -> FusionConfig:
    settings: dict[str, dict[str, Any]] = {"nano": NANO, "mllama": MLLAMA}
    if kind in settings:
        return FusionConfig(kind, settings[kind], cross_layers=(0, 1), cross_ffn_dim=32)  # type: ignore[arg-type]
    return FusionConfig("open_clip", {"model": kind}, cross_layers=(0, 1), cross_ffn_dim=32)


def built(kind: str, core: Llama) -> FusionAdapter:
    """Random, with open gates, so that pictures matter."""
    torch.manual_seed(2)
    adapter = FusionAdapter(config(kind), core.config).eval().requires_grad_(False)
    for name, parameter in adapter.named_parameters():
        if name.endswith("_gate"):
            parameter.fill_(1.0)
        elif name.startswith("projector"):
            parameter.mul_(4)
    return adapter


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Pillow.Image:
    rng = random.Random(seed)
    return draw(sample_scene(rng, "several"), rng).resize(size)


def ask(*content: Any) -> list[Message]:
    return [Message("user", [Text(part) if isinstance(part, str) else Image(part) for part in content])]


KINDS = ["nano", "mllama", "tiny-vit", "tiny-resnet"]


@pytest.mark.parametrize("name", sorted(TOWERS))
def test_tokens_pooled_by_open_clip_itself_are_its_own_image_features(name: str) -> None:
    import open_clip

    torch.manual_seed(0)
    model: Any = open_clip.create_model(name).eval()
    encoder = OpenClipEncoder(name).eval()
    encoder.tower.load_state_dict(model.visual.state_dict())
    pixels = encoder.preprocess([picture(1), picture(2, (90, 40))])
    with torch.no_grad():
        found = encoder.encode(pixels)
        expected = model.encode_image(pixels)
        tokens = found.values.unflatten(0, (2, -1))
        tower = model.visual
        rows, columns = encoder.grid
        assert tokens.shape == (2, encoder.n_extra + rows * columns, encoder.width)
        assert found.counts == (tokens.shape[1],) * 2
        if name == "tiny-vit":
            pooled = tokens[:, 0] @ tower.proj
        elif name == "tiny-avg":
            pooled = tower.ln_post(tokens[:, 1:].mean(dim=1)) @ tower.proj
        elif name == "tiny-resnet":
            pooled = tower.attnpool(tokens.transpose(1, 2).unflatten(2, (rows, columns)))
        elif name == "tiny-timm":
            channels = tokens.transpose(1, 2).unflatten(2, (rows, columns))
            pooled = tower.head(tower.trunk.forward_head(channels))
        else:
            pooled = tower.head(tower.trunk.forward_head(tokens))
    assert torch.allclose(pooled, expected, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-3  # the pictures do matter


def test_preprocessing_is_the_towers_own() -> None:
    import open_clip

    _, _, transform = open_clip.create_model_and_transforms("tiny-vit")
    image = picture(3, (90, 40))
    assert torch.equal(OpenClipEncoder("tiny-vit").preprocess([image])[0], transform(image))  # type: ignore[operator]


@pytest.mark.parametrize("kind", KINDS)
def test_every_encoder_fits_the_protocol_and_a_batch_equals_its_pictures(
    kind: str, family: tuple[Llama, Tokenizer]
) -> None:
    encoder: Any = built(kind, family[0]).encoder
    assert isinstance(encoder, ImageEncoder) and isinstance(encoder, nn.Module)
    pictures = [picture(1), picture(2, (120, 20)), picture(3)]
    with torch.no_grad():
        together = encoder.encode(encoder.preprocess(pictures))
        alone = [encoder.encode(encoder.preprocess([one])) for one in pictures]
    assert together.values.shape == (sum(together.counts), encoder.width)
    assert together.counts == tuple(features.counts[0] for features in alone)
    assert torch.allclose(together.values, torch.cat([f.values for f in alone]), atol=1e-5)
    with pytest.raises(MediaError, match="gone"):
        encoder.preprocess(["gone.png"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_promises_of_an_adapter_hold_for_every_encoder(
    kind: str, family: tuple[Llama, Tokenizer], tmp_path: Path
) -> None:
    core, tokenizer = family
    adapter = built(kind, core)
    assistant = Assistant(core, tokenizer, [adapter])
    conversations = [
        ask(picture(1), "what is it?"),
        ask("no picture"),
        ask(picture(2, (90, 30)), picture(3), "so?"),
    ]
    together = assistant.logits(conversations)
    bare = Assistant(core, tokenizer).logits([conversations[1]])[0]
    assert torch.equal(assistant.logits([conversations[1]])[0], bare)
    request = assistant.prepare(conversations)
    assert request.embeddings is not None and request.interleave is not None
    layers = request.interleave(torch.arange(request.width).expand(3, -1))
    seeing = core.hidden(embeddings=request.embeddings, interleaved=layers)
    assert torch.equal(seeing[1], core.hidden(embeddings=request.embeddings)[1])
    for row, conversation in zip(together, conversations, strict=True):
        assert torch.allclose(row, assistant.logits([conversation])[0], atol=1e-4)
    other = assistant.logits([ask(picture(9), "what is it?")])[0]
    assert (other - together[0]).abs().max() > 1e-3
    adapter.bfloat16().float().save(tmp_path, core)
    again = Assistant(core, tokenizer, [load_fusion(tmp_path, core)]).logits(conversations)
    for row, saved in zip(assistant.logits(conversations), again, strict=True):
        assert torch.equal(row, saved)


def test_released_encoder_behind_the_protocol_equals_the_released_adapter(
    family: tuple[Llama, Tokenizer],
) -> None:
    core, tokenizer = family
    adapter = built("mllama", core)
    theirs = MllamaAdapter(MllamaConfig.from_dict({**MLLAMA, "cross_layers": [0, 1]}), core.config).eval()
    theirs.encoder.load_state_dict(adapter.encoder.tower.state_dict())  # type: ignore[operator, union-attr]
    theirs.projector.load_state_dict(adapter.projector.state_dict())
    theirs.cross_attention = adapter.cross_attention
    theirs.token_rows.data[:1] = adapter.token_rows.data
    conversation = ask(picture(4, (100, 30)), "and ", picture(5), "what?")
    found, wanted = view(adapter, 100, 30), view(theirs, 100, 30)
    assert torch.equal(found.index, wanted.index) and found.box == wanted.box
    expected = Assistant(core, tokenizer, [theirs]).logits([conversation])[0]
    assert torch.equal(Assistant(core, tokenizer, [adapter]).logits([conversation])[0], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_every_encoder_is_explained_at_its_own_places(kind: str, family: tuple[Llama, Tokenizer]) -> None:
    adapter = built(kind, family[0])
    assistant = Assistant(*family, [adapter])
    image = picture(6, (120, 50))
    found = explain(assistant, image, "what is it?", max_new_tokens=2)
    weights = attention_weights(assistant, adapter, ask(image, "what is it?"), (1,))
    assert found.view.index.unique().numel() == found.view.index.numel() <= weights[0].shape[-1]
    assert found.heat(found.maps[0]).shape == (50, 120)
    encoder: Any = adapter.encoder
    # A patch lights up where a change of the picture changes it: the two must be the same place.
    dark = Pillow.new("RGB", (120, 50))
    dot = dark.copy()
    dot.paste((255, 255, 255), (58, 2, 62, 6))
    left, top, right, bottom = found.view.box
    rows, columns = found.view.index.shape
    expected = (int((4 - top) / (bottom - top) * rows), int((60 - left) / (right - left) * columns))
    if kind == "mllama":  # attention spreads a change over all patches: look at the embedding
        difference = embedded(encoder, dot) - embedded(encoder, dark)
    elif kind == "tiny-vit":
        for block in encoder.tower.transformer.resblocks:
            block.attn.out_proj.weight.zero_()
        difference = seen(encoder, dot) - seen(encoder, dark)
    elif kind == "nano":
        for block in encoder.tower.blocks:
            block.o_proj.weight.zero_()
        difference = seen(encoder, dot) - seen(encoder, dark)
    else:
        return  # one patch: nothing to choose
    change = difference.abs().sum(-1)[found.view.index]
    place = divmod(int(change.argmax()), columns)
    assert abs(place[0] - expected[0]) <= 1 and abs(place[1] - expected[1]) <= 1
    assert columns > 2 and change.max() > 2 * change.median()


def seen(encoder: Any, image: Pillow.Image) -> torch.Tensor:
    with torch.no_grad():
        return encoder.encode(encoder.preprocess([image])).values


def embedded(encoder: Any, image: Pillow.Image) -> torch.Tensor:
    """What the released encoder's patch embedding makes of each position; class tokens stay zero."""
    tiles = encoder.preprocess([image])
    with torch.no_grad():
        patches = encoder.tower.patch_embedding(tiles.pixels).flatten(2).transpose(1, 2)
    return torch.cat([torch.zeros_like(patches[:, :1]), patches], dim=1).flatten(0, 1)


@pytest.mark.parametrize("part", ["encoder", "projector", "cross_attention", "core"])
def test_only_the_chosen_part_learns_and_the_core_never_changes(part: str) -> None:
    core, tokenizer = tiny_core()
    adapter = built("tiny-resnet", core)
    chosen = chosen_parts("core-lora" if part == "core" else part, "sft")
    config = StageConfig(1, 1, 0, lr=1.0, warmup=0, trained=chosen, lora_rank=2)
    before, parts = core_hash(core), {name: p.clone() for name, p in adapter.state_dict().items()}
    groups = adapter_groups(adapter.train(), config)
    lora = trained_updates("sft", adapter, core, config, 0)
    assert (lora is not None) == (part == "core")
    learning = [p for group in groups for p in group["params"]] + list(lora.parameters() if lora else [])
    optimizer = torch.optim.SGD(learning, lr=1.0)
    conversation = [*ask(picture(1), "what is it?"), Message("assistant", "a red circle")]
    for _ in range(2):  # the first step of LoRA moves B alone
        optimizer.zero_grad()
        Assistant(core, tokenizer, [adapter]).loss([conversation]).backward()
        optimizer.step()
    assert core_hash(core) == before
    assert all(p.grad is None for p in core.parameters())
    changed = {
        name.split(".")[0] for name, p in adapter.state_dict().items() if not torch.equal(p, parts[name])
    }
    if part == "core":
        assert lora is not None and any((p.grad != 0).any() for p in lora.parameters() if p.grad is not None)
        assert changed == set()
    else:
        assert changed == {part, "token_rows"} if part == "projector" else changed == {part}


def test_mistakes_are_named_in_one_line(
    family: tuple[Llama, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    with pytest.raises(UserError, match="no model 'ViT-nope'"):
        OpenClipEncoder("ViT-nope")
    with pytest.raises(UserError, match="tiny-vit: weights 'no-such-tag' cannot be loaded") as caught:
        OpenClipEncoder("tiny-vit", "no-such-tag")
    assert "\n" not in str(caught.value)

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("Name or service\nnot known")

    monkeypatch.setattr(open_clip, "create_model", unreachable)
    with pytest.raises(UserError, match="Name or service not known") as caught:
        OpenClipEncoder("tiny-vit", "some-tag")
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="unknown image encoder 'eye'"):
        FusionConfig("eye")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="model and"):
        FusionConfig("open_clip", {"name": "RN50"})
    with pytest.raises(CheckpointError, match="colour"):
        FusionConfig.from_dict({"colour": 1})


def test_placeholders_and_pictures_must_agree_in_both_directions(family: tuple[Llama, Tokenizer]) -> None:
    from core_llm.adapters import Spans

    core, _ = family
    for kind in ("nano", "mllama"):
        adapter = built(kind, core)
        memory = adapter.encode(adapter.preprocess([Image(picture(1)), Image(picture(2))]))
        for n in (0, 1, 3):
            places = torch.arange(n)
            spans = Spans(torch.zeros(n, dtype=torch.long), places, places + 9, torch.arange(5)[None])
            with pytest.raises(MediaError, match=f"{n} image placeholders but 2 images"):
                adapter.interleave(memory, spans)
