"""Draws the symbolic scenes of `core_llm.data.scenes` as pixels.

Single shapes look as in easy-VQA: plain colours on a light background, 9 to 34 of 64 pixels across. Fonts
come with Pillow, so the same seed gives the same picture everywhere.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from core_llm.data.levels import TALLEST
from core_llm.data.scenes import COLORS, COLUMNS, NUMBERS, ROWS, SHAPES, WORDS, Bar, Item, Scene

RGB = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "black": (0, 0, 0),
    "teal": (0, 128, 128),
}
FORMS = (*SHAPES, "bar")
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
_INKS = ("black", "blue", "red", "brown", "teal")  # of words
_REFERENCE = 64  # font size in pixels at which words are measured
_SUPERSAMPLING = 4  # smooth pictures are drawn this much larger, then scaled down
# Extents in 64ths of the picture's side: of a shape alone in the picture, and in a cell of 21 beside others.
_EXTENT = {
    (True, "small"): (9, 16),
    (True, "large"): (17, 34),
    (False, "small"): (9, 13),
    (False, "large"): (15, 19),
}


@dataclass(frozen=True)
class Box:
    """Where an item, a bar or a letter is drawn, in 64ths of the picture's side."""

    item: Item | Bar | str
    left: float
    top: float
    width: float
    height: float

    @property
    def centre(self) -> tuple[float, float]:
        """Across and down."""
        return self.left + self.width / 2, self.top + self.height / 2


@dataclass(frozen=True)
class Lettering:
    """A written word: the point where its line box begins, in 64ths, and its font size in the same unit."""

    text: str
    left: float
    top: float
    font_size: float


@dataclass(frozen=True)
class Layout:
    """Everything in a picture with its place."""

    boxes: tuple[Box, ...]  # of items and bars
    lettering: tuple[Lettering, ...] = ()
    letters: tuple[Box, ...] = ()
    grid: tuple[float, ...] = ()  # of a chart: heights of its base line and of each unit above it


def draw(scene: Scene, rng: random.Random, size: int = 64) -> Image.Image:
    """The scene as an RGB picture of size × size pixels."""
    return draw_layout(layout(scene, rng), rng, size)


def layout(scene: Scene, rng: random.Random) -> Layout:
    """A place for everything: an item's centre lies in its cell of the 3 × 3 grid, and no two items touch."""
    if scene.bars:
        return _place_bars(scene.bars, rng)
    if scene.word is not None:
        words = scene.word.split()
        lettering = tuple(_place_word(word, i, len(words), rng) for i, word in enumerate(words))
        return Layout((), lettering, tuple(box for word in lettering for box in _letter_boxes(word)))
    return Layout(tuple(_place(item, len(scene.items) == 1, rng) for item in scene.items))


def _place_bars(bars: Sequence[Bar], rng: random.Random) -> Layout:
    """Bars of one width on one base line; a unit is the same everywhere in the picture."""
    unit = rng.uniform(7.0, 9.0)
    base = rng.uniform(unit * TALLEST + 3, 61)
    left, right = rng.uniform(2, 8), rng.uniform(56, 62)
    slot = (right - left) / len(bars)
    width = slot * rng.uniform(0.5, 0.8)
    boxes = tuple(
        Box(bar, left + slot * i + (slot - width) / 2, base - unit * bar.height, width, unit * bar.height)
        for i, bar in enumerate(bars)
    )
    return Layout(boxes, grid=tuple(base - unit * i for i in range(TALLEST + 1)))


def _place(item: Item, alone: bool, rng: random.Random) -> Box:
    low, high = _EXTENT[alone, item.size]
    width = height = rng.randint(low, high)
    if item.shape == "rectangle":
        shorter = rng.randint(9 if alone else low, width)
        width, height = (width, shorter) if rng.random() < 0.5 else (shorter, width)
    if item.shape == "triangle":
        height = round(width * 0.87)  # equilateral
    left = _start(COLUMNS.index(item.column), width, alone, rng)
    top = _start(ROWS.index(item.row), height, alone, rng)
    return Box(item, left, top, width, height)


def _start(cell: int, extent: int, alone: bool, rng: random.Random) -> int:
    """First pixel of an item in cell 0, 1 or 2 of 64 pixels; a lone item may reach beyond its cell."""
    first, last = 64 * cell / 3, 64 * (cell + 1) / 3
    if alone:
        low, high = max(0.0, first + 2 - extent / 2), min(64.0 - extent, last - 2 - extent / 2)
    else:
        low, high = first + 1, last - 1 - extent
    return round(rng.uniform(low, max(low, high)))


def draw_layout(plan: Layout, rng: random.Random, size: int = 64) -> Image.Image:
    """Draw what is laid out. Half of the pictures have hard edges and pure colours, as in easy-VQA; the
    others smooth edges and colours that vary a little, as in pictures scaled down."""
    smooth = rng.random() < 0.5
    scale = size / 64 * (_SUPERSAMPLING if smooth else 1)
    background = tuple(rng.randint(230, 255) for _ in range(3))
    side = round(64 * scale)
    image = Image.new("RGB", (side, side), background)
    pen = ImageDraw.Draw(image)
    for i, height in enumerate(plan.grid):
        shade = (90, 90, 90) if i == 0 else (205, 205, 205)
        pen.line([(0, round(height * scale)), (side, round(height * scale))], fill=shade, width=round(scale))
    for box in plan.boxes:
        assert isinstance(box.item, (Item, Bar))
        _draw_item(pen, box, scale, _shade(RGB[box.item.color], 24 if smooth else 0, rng))
    for word in plan.lettering:
        color = RGB[rng.choice(_INKS)]
        start = (round(word.left * scale), round(word.top * scale))
        pen.text(start, word.text, fill=color, font=_font(max(1, round(word.font_size * scale))))
    return image.resize((size, size), Image.Resampling.BOX) if smooth else image


def _shade(color: tuple[int, int, int], spread: int, rng: random.Random) -> tuple[int, ...]:
    return tuple(min(255, max(0, channel + rng.randint(-spread, spread))) for channel in color)


def _draw_item(pen: ImageDraw.ImageDraw, box: Box, scale: float, color: tuple[int, ...]) -> None:
    left, top = round(box.left * scale), round(box.top * scale)
    right, bottom = round((box.left + box.width) * scale) - 1, round((box.top + box.height) * scale) - 1
    shape = box.item.shape if isinstance(box.item, Item) else "bar"
    if shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=color)
    elif shape in ("rectangle", "bar"):
        pen.rectangle((left, top, right, bottom), fill=color)
    else:
        pen.polygon([((left + right) / 2, top), (right, bottom), (left, bottom)], fill=color)


@lru_cache
def _font(pixels: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(pixels)


def _place_word(word: str, line: int, lines: int, rng: random.Random) -> Lettering:
    """Lower case or capitals, at most 90 % of the width and a third of the height, anywhere in its line."""
    text = word.upper() if rng.random() < 0.3 else word
    left, top, right, bottom = _font(_REFERENCE).getbbox(text)
    font_size = min(21.0, 64 * rng.uniform(0.6, 0.9) * _REFERENCE / (right - left))
    scale = font_size / _REFERENCE
    x = rng.uniform(0.02, 0.98) * (64 - (right - left) * scale) - left * scale
    room = 64 / lines
    y = line * room + rng.uniform(0.02, 0.98) * (room - (bottom - top) * scale) - top * scale
    return Lettering(text, x, y, font_size)


def _letter_boxes(word: Lettering) -> tuple[Box, ...]:
    font, scale = _font(_REFERENCE), word.font_size / _REFERENCE
    boxes = []
    for n, letter in enumerate(word.text):
        before, after = font.getlength(word.text[:n]) * scale, font.getlength(word.text[: n + 1]) * scale
        _, top, _, bottom = font.getbbox(letter)
        boxes.append(
            Box(
                letter.lower(),
                word.left + before,
                word.top + top * scale,
                after - before,
                (bottom - top) * scale,
            )
        )
    return tuple(boxes)


# What can be said of a patch, and how many answers each has besides "nothing" (place always has one).
LABELS = {
    "color": len(COLORS),
    "shape": len(FORMS),
    "letter": len(ALPHABET),
    "word": len(WORDS),
    "color_count": len(NUMBERS) - 1,
    "shape_count": len(NUMBERS) - 1,
    "height": TALLEST,
}


def patch_labels(plan: Layout, patches: int) -> dict[str, Tensor]:
    """What lies under each of patches × patches squares, by name of `LABELS`: long [patches, patches] each.

    0 is nothing. "color", "shape" and "letter" are the index in COLORS, FORMS or the alphabet plus one;
    "word" that of its word. "color_count" and "shape_count" are how many items of the
    same colour or shape there are, "height" the units of a bar. A patch belongs to what its middle lies in;
    the patch at the centre of a box always does.
    """
    labels = {name: torch.zeros(patches, patches, dtype=torch.long) for name in LABELS}
    items = [box.item for box in plan.boxes if isinstance(box.item, Item)]
    for box in plan.boxes:
        for name, value in _facts(box.item, items).items():
            labels[name][patches_under(box, patches)] = value
    written = iter(plan.letters)
    for word in plan.lettering:
        for box in itertools.islice(written, len(word.text)):
            under = patches_under(box, patches)
            labels["letter"][under] = ALPHABET.index(str(box.item)) + 1
            labels["word"][under] = WORDS.index(word.text.lower()) + 1
    return labels


def _facts(what: Item | Bar | str, items: Sequence[Item]) -> dict[str, int]:
    if isinstance(what, Bar):
        color, form = COLORS.index(what.color) + 1, FORMS.index("bar") + 1
        return {"color": color, "shape": form, "height": what.height}
    assert isinstance(what, Item)
    return {
        "color": COLORS.index(what.color) + 1,
        "shape": FORMS.index(what.shape) + 1,
        "color_count": sum(item.color == what.color for item in items),
        "shape_count": sum(item.shape == what.shape for item in items),
    }


def patches_under(box: Box, patches: int) -> Tensor:
    """bool [patches, patches]: the patches whose middle lies in the box, and the one at its centre."""
    step = 64 / patches
    middles = (torch.arange(patches) + 0.5) * step
    rows = (middles >= box.top) & (middles < box.top + box.height)
    columns = (middles >= box.left) & (middles < box.left + box.width)
    across, down = (min(patches - 1, max(0, int(place / step))) for place in box.centre)
    rows[down] = True
    columns[across] = True
    return rows[:, None] & columns
