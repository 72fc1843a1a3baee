"""Several clips among text and pictures in one prompt, with the bundled models."""

from pathlib import Path

import pytest
import torch
from PIL import Image as PILImage

import speech_adapter
import vision_adapter
from core_llm.adapters import Assistant
from core_llm.chat import Audio, Image, Message, Part, Text
from core_llm.checkpoint import load_core

SAMPLES = Path(__file__).parents[2] / "evals" / "samples"


@pytest.fixture(scope="module")
def nano() -> Assistant:
    core, tokenizer = load_core("nano")
    return Assistant(core, tokenizer, [vision_adapter.load("nano", core), speech_adapter.load("nano", core)])


def clips() -> list[Audio]:
    return [Audio(SAMPLES / f"digits-{i:02}.ogg") for i in (0, 7, 21)]


def picture() -> Image:
    return Image(PILImage.new("RGB", (40, 30), (200, 30, 30)))


@torch.no_grad()
def placed(nano: Assistant, parts: tuple[Part, ...]) -> torch.Tensor:
    """What stands in the token stream, [T, C]."""
    request = nano.prepare([[Message("user", parts)]])
    assert request.embeddings is not None
    return request.embeddings[0, : int(request.lengths[0])]


@torch.no_grad()
def find(stream: torch.Tensor, vectors: torch.Tensor) -> list[int]:
    """Where the vectors stand, one after the other."""
    windows = stream.unfold(0, len(vectors), 1).transpose(1, 2)
    near = (windows - vectors).abs().amax(dim=(1, 2)) < 1e-3
    return near.nonzero().flatten().tolist()


@torch.no_grad()
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_every_clip_lands_at_its_own_placeholder(nano: Assistant, order: tuple[int, ...]) -> None:
    speech = nano.adapters[1]
    own = clips()
    alone = [speech.place(speech.encode(speech.preprocess([clip])))[0] for clip in own]
    assert min(len(vectors) for vectors in alone) > 0
    words = [Text(" the first is "), Text(" and red is "), Text(" plus ")]
    parts = (words[0], own[order[0]], picture(), words[1], own[order[1]], words[2], own[order[2]])
    stream = placed(nano, parts)
    spoken = [find(stream, alone[i]) for i in order]
    written = [find(stream, nano.core.embed(torch.tensor(nano.tokenizer.encode(w.text)))) for w in words]
    assert all(spoken) and all(len(where) == 1 for where in written)
    begins = [written[0][0], spoken[0][0], written[1][0], spoken[1][-1], written[2][0], spoken[2][-1]]
    assert begins == sorted(begins)
    # Nothing lies between a text and the clip behind it.
    for k in range(3):
        n = len(nano.tokenizer.encode(words[k].text))
        assert written[k][0] + n in spoken[k]


@torch.no_grad()
def test_the_order_of_clips_and_pictures_matters(nano: Assistant) -> None:
    one, two, _ = clips()
    question = Text("How many?")
    orders: list[tuple[Part, ...]] = [
        (question, one, picture(), two),
        (question, two, picture(), one),
        (picture(), question, one, two),
    ]
    scores = nano.loglikelihood([[Message("user", parts)] for parts in orders], ["three"] * 3)
    assert len({round(score, 4) for score in scores}) == 3
