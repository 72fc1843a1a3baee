"""An explanation as a picture: one panel for each token of the answer, with attention as colour."""

import numpy as np
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from vision_adapter.explain import Explanation

PANEL = 176  # pixels; the longer edge of a picture in its panel
COLUMNS = 6  # panels in one row
MAX_TOKENS = 46  # more would not be looked at; two panels are the picture's and the mean's
_GAP, _LINE = 12, 17  # pixels
_INK, _FAINT, _PAPER = (25, 25, 30), (110, 110, 120), (255, 255, 255)
# From nothing to the most attention; dark to light, so that it also reads in grey.
_STOPS = (0.0, 0.35, 0.7, 1.0)
_COLORS = ((20, 10, 60), (150, 30, 110), (245, 125, 20), (255, 250, 150))


def draw(explanation: Explanation) -> Pillow.Image:
    """Question and answer, the picture, and the map of every token of the answer behind their mean (RGB).

    All maps share one scale; under each stands its peak as a multiple of evenly spread attention.
    """
    maps = list(zip(map(_visible, explanation.tokens), explanation.maps, strict=True))[:MAX_TOKENS]
    if len(maps) > 1:
        maps.insert(0, ("mean", explanation.maps.mean(dim=0)))
    heats = [explanation.heat(values) for _, values in maps]
    most = max(1e-6, *(float(heat.max()) for heat in heats))
    scale = PANEL / max(explanation.picture.size)
    size = (
        max(1, round(explanation.picture.width * scale)),
        max(1, round(explanation.picture.height * scale)),
    )
    panels = [(explanation.picture.resize(size, Pillow.Resampling.BICUBIC), "picture", "")]
    for heat, (label, _) in zip(heats, maps, strict=True):
        panels.append((_blend(explanation.picture, heat / most, size), label, f"peak {heat.max():.1f}x even"))
    return _arrange(panels, size, explanation)


def _blend(picture: Pillow.Image, share: np.ndarray, size: tuple[int, int]) -> Pillow.Image:
    """The picture in grey under the colours of `share` (0..1)."""
    grey = np.asarray(picture.convert("L").resize(size, Pillow.Resampling.BICUBIC), np.float32)[..., None]
    level = np.asarray(Pillow.fromarray(share.astype(np.float32)).resize(size, Pillow.Resampling.BILINEAR))
    colors = np.stack([np.interp(level, _STOPS, [color[i] for color in _COLORS]) for i in range(3)], axis=-1)
    mixed = 0.62 * colors + 0.38 * grey
    return Pillow.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def _visible(token: str) -> str:
    return token.replace("\n", "\\n") if token.strip() else repr(token)


def _arrange(
    panels: list[tuple[Pillow.Image, str, str]], size: tuple[int, int], explanation: Explanation
) -> Pillow.Image:
    bold, plain = ImageFont.load_default(15), ImageFont.load_default(12)
    cell = (max(size[0], 96) + _GAP, size[1] + 2 * _LINE + _GAP)
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    width, head = max(columns * cell[0] + _GAP, 360), 2 * _LINE + 2 * _GAP
    sheet = Pillow.new("RGB", (width, head + rows * cell[1]), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for line, text in enumerate((explanation.question, f"answer: {explanation.answer}")):
        pen.text((_GAP, _GAP + line * (_LINE + 3)), _cut(text, width - 2 * _GAP, bold), _INK, bold)
    for number, (image, label, note) in enumerate(panels):
        left, top = _GAP + number % columns * cell[0], head + number // columns * cell[1]
        sheet.paste(image, (left, top))
        pen.text((left, top + size[1] + 3), _cut(label, cell[0] - _GAP, bold), _INK, bold)
        pen.text((left, top + size[1] + 3 + _LINE), note, _FAINT, plain)
    return sheet


def _cut(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """One line that is no wider than `width` pixels."""
    text = " ".join(text.split()) or " "
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
