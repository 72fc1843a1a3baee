"""Frames from files, the temporal resampler, and video layers beside a frozen core and image adapter."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core_llm.adapters import Assistant, Spans
from core_llm.chat import Image, Message, Text, Video, render
from core_llm.checkpoint import core_hash
from core_llm.errors import CheckpointError, MediaError
from core_llm.model import Llama
from core_llm.sampling import Sampling
from core_llm.testing import tiny_core
from core_llm.tokenizer import Tokenizer
from vision_adapter.adapter import VisionAdapter
from vision_adapter.config import VisionConfig
from vision_adapter.stages.video import ResamplerTask, VideoRecipe, VideoTask, train_video
from vision_adapter.video import frames, spread
from vision_adapter.video_adapter import VideoAdapter, VideoConfig, load_video, video_schedule
from vision_adapter.video_clips import DIRECTIONS, QUESTION, moving_shape, write_video

VISION = VisionConfig(
    stem_channels=(8, 8), encoder_dim=32, encoder_layers=1, encoder_heads=2, encoder_ffn_dim=48,
    token_rows=3, cross_ffn_dim=32, cross_layers=(0, 1), image_size=32,
)  # fmt: skip
CONFIG = VideoConfig(frames=4, merged=2, latents=3, dim=16, heads=2, depth=1, token_rows=2, cross_ffn_dim=32)
TINY = VideoRecipe(warm_up_steps=2, steps=3, clips=4, pool=6, held_out=4)
Family = tuple[Llama, Tokenizer, VisionAdapter, VideoAdapter]


def opened(module: torch.nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if name.endswith("_gate"):
            parameter.data.fill_(1.5)


@pytest.fixture(scope="module")
def family() -> Family:
    core, tokenizer = tiny_core()
    torch.manual_seed(1)
    vision = VisionAdapter(VISION, core.config).eval()
    video = VideoAdapter(CONFIG, core.config, vision).eval().requires_grad_(False)
    opened(vision)
    opened(video)
    return core, tokenizer, vision, video


def clip(seed: int, n: int = 4) -> list:  # type: ignore[type-arg]
    return moving_shape(random.Random(seed), n).frames


def asked(*parts: object) -> list[Message]:
    return [Message("user", [*parts, Text(QUESTION)])]  # type: ignore[list-item]


def test_frames_are_spread_from_first_to_last() -> None:
    assert spread(10, 4) == [0, 3, 6, 9] and spread(2, 4) == [0, 0, 1, 1] and spread(9, 1) == [4]
    assert spread(1, 3) == [0, 0, 0]


def test_a_written_video_gives_back_the_frames_that_were_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    shades = [20 * i for i in range(12)]
    write_video([as_grey(shade) for shade in shades], path)
    for source in (path, str(path), path.read_bytes()):
        found = frames(source, 4)
        assert [abs(f.getpixel((8, 8))[0] - shades[i]) <= 6 for f, i in zip(found, (0, 4, 7, 11))] == [
            True
        ] * 4
        assert all(frame.size == (32, 32) and frame.mode == "RGB" for frame in found)
    assert [f.getpixel((8, 8))[0] // 20 for f in frames([as_grey(s) for s in shades], 3)] == [0, 6, 11]


def as_grey(shade: int):  # type: ignore[no-untyped-def]
    from PIL import Image as Pillow

    return Pillow.new("RGB", (32, 32), (shade, shade, shade))


def test_broken_videos_are_named_in_one_line(tmp_path: Path) -> None:
    good = tmp_path / "good.mp4"
    write_video(clip(0, 8), good)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("no video at all")
    (tmp_path / "cut.mp4").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    expected = {
        "empty.mp4": "is empty", "text.mp4": "not a video", "cut.mp4": "damaged", "none.mp4": "not exist",
        ".": "not an ordinary file",
    }  # fmt: skip
    for name, words in expected.items():
        with pytest.raises(MediaError, match=words) as caught:
            frames(tmp_path / name, 2)
        assert "\n" not in str(caught.value) and (name == "." or name in str(caught.value))
    with pytest.raises(MediaError, match="no frames"):
        frames([], 2)
    with pytest.raises(MediaError, match="0 bytes|is empty"):
        frames(b"", 2)


def test_a_file_without_a_picture_track_says_so(tmp_path: Path) -> None:
    import wave

    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(b"\0\0" * 800)
    with pytest.raises(MediaError, match="no picture track"):
        frames(tmp_path / "sound.wav", 2)


def test_a_clip_backwards_is_a_clip_of_the_other_direction() -> None:
    seen = set()
    for seed in range(12):
        moved = moving_shape(random.Random(seed), 4)
        seen.add(moved.direction)
        ink = [[x for x in range(64) if darkest(f, x) < 600] for f in moved.frames]
        centres = [sum(columns) / len(columns) for columns in ink]
        rising = sorted(centres) == centres
        assert rising == (moved.direction == "right") and centres[0] != centres[-1]
    assert seen == set(DIRECTIONS)


def darkest(frame, x: int) -> int:  # type: ignore[no-untyped-def]
    return min(sum(frame.getpixel((x, y))) for y in range(64))


def test_video_layers_stand_before_every_fourth_image_layer(family: Family) -> None:
    assert video_schedule((3, 7, 11, 15, 19, 23, 27, 31)) == (15, 31)
    assert video_schedule((1, 3, 5)) == (1, 3, 5)
    core, tokenizer, vision, video = family
    called: list[str] = []
    hooks = [
        adapter.cross_attention["0"].register_forward_hook(lambda *_, name=name: called.append(name))
        for name, adapter in (("video", video), ("image", vision))
    ]
    Assistant(core, tokenizer, [video, vision]).logits([asked(Video(clip(0)), Image(clip(1)[0]))])
    for hook in hooks:
        hook.remove()
    assert called == ["video", "image"]


def test_a_video_takes_one_placeholder_of_the_one_message_type(family: Family) -> None:
    _, tokenizer, _, _ = family
    part = Video(clip(0))
    rendered = render(asked(part), tokenizer)
    assert [p for _, p in rendered.parts] == [part]
    assert rendered.ids[rendered.parts[0][0]] == tokenizer.image_id
    assert Message("user", part).parts == (part,)


def test_the_resampler_tells_the_order_of_frames(family: Family) -> None:
    core, _, _, video = family
    features = video.features(video.preprocess([Video(clip(0))]))
    assert features.shape == (1, 4, VISION.n_patches, 32)
    memory = video.resampler(features)
    assert memory.shape == (1, 2 * 3, core.config.dim)
    assert (memory - video.resampler(features.flip(1))).abs().max() > 1e-3
    still = features[:, :1].expand(-1, 4, -1, -1)  # the control: equal frames have no order
    assert torch.equal(video.resampler(still), video.resampler(still.flip(1)))


def test_answers_depend_on_the_order_and_text_rows_stay_the_cores(family: Family) -> None:
    core, tokenizer, vision, video = family
    assistant = Assistant(core, tokenizer, [video, vision])
    text = asked()
    batch = [asked(Video(clip(0))), asked(Video(clip(0)[::-1])), asked(Video(clip(0)), Video(clip(2))), text]
    together = assistant.logits(batch)
    assert not torch.allclose(together[0][-1], together[1][-1], atol=1e-3)
    for row, conversation in zip(together, batch, strict=True):
        assert torch.allclose(row, assistant.logits([conversation])[0], atol=1e-4)
    tokens = torch.tensor([render(text, tokenizer).ids])
    with torch.inference_mode():
        bare = core.logits(core.hidden(tokens))[0]
    assert torch.equal(assistant.logits([text])[0], bare)
    n = tokens.shape[1]
    request = assistant.prepare([batch[0], text])
    assert request.interleave is not None
    layers = request.interleave(torch.arange(request.width).expand(2, -1))
    hidden = torch.randn(2, request.width, core.config.dim)
    with torch.inference_mode():
        assert torch.equal(layers[0](hidden)[1], hidden[1]) and not torch.equal(
            layers[0](hidden)[0], hidden[0]
        )
    assert request.lengths.tolist()[1] == n


def test_frames_are_encoded_once_per_request(family: Family) -> None:
    core, tokenizer, vision, video = family
    calls: list[int] = []
    hook = vision.encoder.register_forward_hook(lambda *_: calls.append(1))
    Assistant(core, tokenizer, [video]).generate([asked(Video(clip(0)))] * 2, Sampling(max_new_tokens=4))
    hook.remove()
    assert len(calls) == 2  # one per video


def test_too_few_videos_for_the_text_are_an_error(family: Family) -> None:
    _, _, _, video = family
    memory = video.encode(video.preprocess([Video(clip(0))]))
    nowhere = torch.zeros(0, dtype=torch.long)
    with pytest.raises(MediaError, match="0 video placeholders, 1"):
        video.interleave(memory, Spans(nowhere, nowhere, nowhere, torch.zeros(1, 3, dtype=torch.long)))


def test_only_video_parameters_train(family: Family, tmp_path: Path) -> None:
    core, tokenizer, vision, _ = family
    torch.manual_seed(0)
    video = VideoAdapter(CONFIG, core.config, vision)
    before = core_hash(core), core_hash(vision), core_hash(video)
    figures = train_video(core, tokenizer, video, tmp_path, 0, TINY)
    assert (core_hash(core), core_hash(vision)) == before[:2] and core_hash(video) != before[2]
    assert set(figures) == {"direction", "direction_shuffled", "direction_backwards"}
    task = VideoTask(core, tokenizer, video, 0, TINY)
    video.requires_grad_(True)
    for parameter in [*core.parameters(), *vision.parameters(), *video.parameters()]:
        parameter.grad = None
    task.loss(task.batch(0))[0].backward()
    assert all(p.grad is None for p in [*core.parameters(), *vision.parameters()])
    lacking = [name for name, p in video.named_parameters() if p.grad is None or not p.grad.any()]
    assert not lacking
    own = {id(p) for group in task.parameter_groups() for p in group["params"]}
    assert own == {id(p) for p in video.parameters()}
    assert not any(name.startswith("vision") or "encoder" in name for name in video.state_dict())


def test_batches_of_clips_are_a_pure_function_of_the_step(family: Family) -> None:
    core, tokenizer, _, video = family
    task = VideoTask(core, tokenizer, video, 0, TINY)
    for each in (task, ResamplerTask(task)):
        first, again = each.batch(3), each.batch(3)
        assert [way for _, way in first] == [way for _, way in again]
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))


def test_saved_video_layers_load_with_their_own_image_adapter_alone(family: Family, tmp_path: Path) -> None:
    core, _, vision, video = family
    video.save(tmp_path / "video", core)
    loaded = load_video(tmp_path / "video", core, vision)
    for name, tensor in video.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(torch.bfloat16).float()), name
    torch.manual_seed(5)
    with pytest.raises(CheckpointError, match="another image adapter"):
        load_video(tmp_path / "video", core, VisionAdapter(VISION, core.config))
    with pytest.raises(CheckpointError, match="cannot be merged"):
        replace(CONFIG, frames=5)
    with pytest.raises(CheckpointError, match="unknown video configuration keys: nope"):
        VideoConfig.from_dict({"nope": 1})


@pytest.mark.slow
def test_trained_video_layers_tell_left_from_right_by_the_order_of_frames(tmp_path: Path) -> None:
    from core_llm.checkpoint import load_core
    from vision_adapter.adapter import load

    core, tokenizer = load_core()
    torch.manual_seed(0)
    video = VideoAdapter(VideoConfig(), core.config, load("nano", core))
    figures = train_video(core, tokenizer, video, tmp_path)
    assert figures["direction"] > 0.8 and figures["direction_backwards"] < 0.2
    assert figures["direction"] > figures["direction_shuffled"] + 0.2
