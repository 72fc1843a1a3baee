"""Drawn scenes show what their symbols say."""

import random

import numpy as np
import pytest

from core_llm.data.scenes import COLORS, COLUMNS, KINDS, ROWS, SHAPES, WORDS, Item, Scene, sample_scene
from vision_adapter.scenes import RGB, draw, draw_layout, layout, patch_labels


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_gives_the_same_bytes(kind: str) -> None:
    def picture(seed: int) -> bytes:
        rng = random.Random(seed)
        return draw(sample_scene(rng, kind), rng).tobytes()

    assert [picture(seed) for seed in range(20)] == [picture(seed) for seed in range(20)]
    assert len({picture(seed) for seed in range(20)}) == 20


@pytest.mark.parametrize("size", [64, 160])
def test_picture_has_the_asked_size_and_a_light_background(size: int) -> None:
    for seed in range(20):
        rng = random.Random(seed)
        image = draw(sample_scene(rng, "single"), rng, size)
        assert image.mode == "RGB" and image.size == (size, size)
        values, counts = np.unique(np.asarray(image).reshape(-1, 3), axis=0, return_counts=True)
        assert values[counts.argmax()].min() >= 230


def test_centre_of_every_item_lies_in_its_cell_and_items_do_not_touch() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        scene = sample_scene(rng, KINDS[seed % 2])
        covered = np.zeros((64, 64), int)
        for box in layout(scene, rng).boxes:
            across, down = box.centre
            row, column = ROWS[int(down * 3 / 64)], COLUMNS[int(across * 3 / 64)]
            assert isinstance(box.item, Item) and (row, column) == (box.item.row, box.item.column)
            assert min(box.left, box.top) >= 0 and max(box.left + box.width, box.top + box.height) <= 64
            covered[box.top : box.top + box.height, box.left : box.left + box.width] += 1
        assert covered.max() == 1


def test_drawn_colour_and_shape_are_the_items() -> None:
    for shape in SHAPES:
        for color in COLORS:
            scene = Scene((Item(shape, color, "large", "middle", "center"),))
            rng = random.Random(f"{shape} {color}")
            box = layout(scene, random.Random(f"{shape} {color}")).boxes[0]
            pixels = np.asarray(draw(scene, rng)).astype(int)
            inside = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
            near = np.abs(inside - np.array(RGB[color])).max(axis=-1) <= 24
            expected = {"circle": np.pi / 4, "rectangle": 1.0, "triangle": 0.5}[shape]
            assert abs(near.mean() - expected) < 0.12


def test_every_word_fits_into_the_picture_and_differs_from_the_others() -> None:
    seen = set()
    for word in WORDS:
        for seed in range(6):
            pixels = np.asarray(draw(Scene((), word), random.Random(seed))).astype(int)
            ink = (np.abs(pixels - pixels[32, 0]).max(axis=-1) > 60).sum()
            assert 20 < ink < 1500
        seen.add(draw(Scene((), word), random.Random(0)).tobytes())
    assert len(seen) == len(WORDS)


def test_patch_labels_mark_each_item_where_it_is() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        plan = layout(sample_scene(rng, "several"), rng)
        labels = patch_labels(plan, 8)
        colors, shapes = labels["color"], labels["shape"]
        assert ((colors > 0) == (shapes > 0)).all()
        assert not any(labels[name].any() for name in ("letter", "word", "height"))
        items = [box.item for box in plan.boxes if isinstance(box.item, Item)]
        for box, item in zip(plan.boxes, items, strict=True):
            column, row = (int(place / 8) for place in box.centre)
            assert COLORS[colors[row, column] - 1] == item.color
            assert SHAPES[shapes[row, column] - 1] == item.shape
            assert labels["color_count"][row, column] == [i.color for i in items].count(item.color)
            assert labels["shape_count"][row, column] == [i.shape for i in items].count(item.shape)
        assert set(colors[colors > 0].tolist()) == {COLORS.index(item.color) + 1 for item in items}


def test_letter_boxes_hold_the_ink_from_left_to_right() -> None:
    for word in WORDS:
        rng = random.Random(word)
        plan = layout(Scene((), word), rng)
        pixels = np.asarray(draw_layout(plan, rng, 256)).astype(int)
        ink = np.abs(pixels - pixels[0, 0]).max(axis=-1) > 60
        assert "".join(str(box.item) for box in plan.letters) == word
        covered = np.zeros_like(ink)
        for box in plan.letters:
            left, top, right, bottom = (
                round(4 * place) for place in (box.left, box.top, box.left + box.width, box.top + box.height)
            )
            covered[max(0, top - 3) : bottom + 3, max(0, left - 3) : right + 3] = True
        assert (ink & covered).sum() > 0.97 * ink.sum() > 0
        letters, words = patch_labels(plan, 8)["letter"], patch_labels(plan, 8)["word"]
        assert ((letters > 0) == (words > 0)).all()
        assert set(words[words > 0].tolist()) == {WORDS.index(word) + 1}
        assert len(set(letters[letters > 0].tolist())) > len(set(word)) / 2
