"""Pointers lie on what the question names; the loss is the attention that falls there."""

import random

import pytest
import torch

from core_llm.data.levels import ask
from core_llm.data.scenes import Item, Scene
from core_llm.testing import tiny_core
from vision_adapter.pointing import ANSWER, MENTION, cells, pointers, pointing_loss
from vision_adapter.samples import Sample, pack
from vision_adapter.scenes import layout

SCENE = Scene(
    (
        Item("circle", "red", "large", "top", "left"),
        Item("circle", "blue", "large", "bottom", "right"),
        Item("triangle", "red", "large", "middle", "center"),
    )
)
PLAN = layout(SCENE, random.Random(0))


def cells_of(patches: torch.Tensor) -> set[int]:
    return {3 * (i // 8 * 3 // 8) + i % 8 * 3 // 8 for i in patches.nonzero()[:, 0].tolist()}


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("where is the blue circle?", "bottom right", [("blue circle", {8}), (None, {8})]),
        ("how many circles are there?", "two", [("circles", {0, 8}), (None, {0, 8})]),
        ("how many red shapes are there?", "two", [("red shapes", {0, 4}), (None, {0, 4})]),
        ("what is at the top left?", "red circle", [("top left", {0}), (None, {0})]),
        ("what is at the center?", "red triangle", [("center", {4}), (None, {4})]),
        ("what is above the blue circle?", "red triangle", [("blue circle", {8}), (None, {4})]),
        (
            "is the red circle left of the blue circle?",
            "yes",
            [("red circle", {0}), ("blue circle", {8})],
        ),
        ("is there a green shape?", "no", []),
        ("what is the red triangle?", "triangle", [("red triangle", {4}), (None, {4})]),
    ],
)
def test_words_and_answers_point_at_what_they_name(
    question: str, answer: str, expected: list[tuple[str | None, set[int]]]
) -> None:
    found = pointers(question, answer, PLAN, 8)
    assert len(found) == len(expected)
    for pointer, (words, where) in zip(found, expected, strict=True):
        assert (pointer.end is None) == (words is None)
        assert words is None or question[: pointer.end].endswith(words)
        assert cells_of(pointer.patches) == where


@pytest.mark.parametrize("skill", ["word", "chart", "count", "relation", "position", "presence"])
def test_every_question_of_the_generator_points_somewhere_or_nowhere_but_never_fails(skill: str) -> None:
    for seed in range(100):
        rng = random.Random(f"{skill} {seed}")
        scene, (question,) = ask(rng, 2, skill)
        for pointer in pointers(question.text, question.answer, layout(scene, rng), 8):
            assert pointer.patches.any() and not pointer.patches.all()
            assert skill != "word" or pointer.end is None


def test_packed_pointers_stand_on_the_last_token_of_their_words_and_before_the_answer() -> None:
    _, tokenizer = tiny_core()
    turn = (" what is above the blue circle?", "red triangle")
    packed = pack([Sample(torch.zeros(3, 64, 64), [[turn], [turn]], PLAN)], tokenizer, 3)
    for number in (1, 2):
        own = packed.documents[0] == number
        kinds, tokens = packed.pointers[0][own], packed.tokens[0][own].tolist()
        (mention,), (answer,) = (kinds == MENTION).nonzero(), (kinds == ANSWER).nonzero()
        assert tokenizer.decode(tokens[: int(mention) + 1]).endswith("above the blue circle")
        assert packed.loss_mask[0][own].nonzero()[0, 0] == answer + 1
    assert (packed.regions.any(-1) == (packed.pointers > 0)).all()


def test_loss_is_the_attention_on_the_right_patches() -> None:
    torch.manual_seed(0)
    b, t, s, d = 2, 4, 9, 8
    queries = {1: torch.randn(b, 4, t, d), 3: torch.randn(b, 4, t, d)}
    keys = {1: torch.randn(b, 2, s, d), 3: torch.randn(b, 2, s, d)}
    regions = torch.zeros(b, t, s, dtype=torch.bool)
    regions[0, 1, 2:4] = regions[1, 3, 5] = True
    kinds = torch.zeros(b, t, dtype=torch.long)
    kinds[0, 1], kinds[1, 3] = MENTION, ANSWER
    expected = []
    for layer, marked in ((1, [(0, 1)]), (3, [(0, 1), (1, 3)])):  # the answer is asked of the later half
        losses = []
        for row, position in marked:
            for head in range(2):  # both belong to the first group of keys
                weights = (keys[layer][row, 0] @ queries[layer][row, head, position] / d**0.5).softmax(-1)
                losses.append(-weights[regions[row, position]].sum().log())
        expected.append(torch.stack(losses).mean())
    loss, share = pointing_loss(queries, keys, regions, kinds)
    assert torch.allclose(loss, torch.stack(expected).mean(), atol=1e-6) and 0 < share < 1
    nothing, _ = pointing_loss(queries, keys, regions, torch.zeros_like(kinds))
    assert nothing == 0


def test_cells_are_those_of_the_drawn_items() -> None:
    for seed in range(60):
        rng = random.Random(seed)
        scene, _ = ask(rng, 1, "position")
        (item,) = scene.items
        plan = layout(scene, rng)
        (pointer, _) = pointers(f"where is the {item.name}?", item.place, plan, 8)
        x, y = plan.boxes[0].centre
        near = {3 * int(b * 3 / 64) + int(a * 3 / 64) for a in (x - 4, x, x + 4) for b in (y - 4, y, y + 4)}
        assert int(cells(pointer.patches[None])) in near  # patches are 8 of 64 wide
