"""Text as a picture: the same words, drawn."""

from collections.abc import Callable

from PIL import Image, ImageDraw

from core_llm.errors import UserError
from vision_adapter.scenes import _font

_MARGIN, _LARGEST, _SMALLEST = 0.06, 0.16, 0.03  # shares of the picture's side


def write(text: str, side: int = 448) -> Image.Image:
    """Dark words on a light ground, in the largest letters that let all of them fit; RGB, side × side pixels.

    Raises `UserError` where even the smallest letters leave no room.
    """
    margin = round(_MARGIN * side)
    for pixels in range(round(_LARGEST * side), round(_SMALLEST * side), -1):
        font = _font(pixels)
        lines = _wrapped(text, font.getlength, side - 2 * margin)
        height = round(1.25 * pixels)
        if lines and height * len(lines) <= side - 2 * margin:
            break
    else:
        raise UserError(
            f"{len(text)} characters have no room in a picture of {side} pixels; give a larger side"
        )
    picture = Image.new("RGB", (side, side), (250, 250, 247))
    pen = ImageDraw.Draw(picture)
    top = (side - height * len(lines)) // 2
    for i, line in enumerate(lines):
        pen.text((margin, top + i * height), line, fill=(20, 20, 24), font=font)
    return picture


def _wrapped(text: str, length: Callable[[str], float], width: float) -> list[str] | None:
    """Lines of whole words at most `width` long; None where a word alone is longer."""
    lines: list[str] = []
    for word in text.split():
        if length(word) > width:
            return None
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and length(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
