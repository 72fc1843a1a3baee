"""Reading the words in a picture, for curation: a protocol, and RapidOCR behind it."""

import logging
from typing import Any, Protocol

import numpy as np
from PIL import Image as Pillow

from core_llm.errors import UserError

_LEAST_SCORE = 0.6  # of a line; below, a reading is a guess as often as not
_LEAST_LETTERS = 2  # letters and digits of a line: a circle is read as "O", a bar as "1"
_LEAST_SIDE = 160  # pixels: smaller pictures are enlarged first, as detection looks for lines of some height


class OcrReader(Protocol):
    """What curation needs of an engine."""

    def lines(self, picture: Pillow.Image) -> list[str]:
        """Lines of text in an RGB picture, in reading order; empty where there is none."""
        ...


class RapidOcrReader:
    """RapidOCR (PaddleOCR's models in ONNX form) on the CPU.

    Lines with a score below `least_score`, and single signs, are left out. Raises `UserError` where the extra
    is not installed.
    """

    def __init__(self, least_score: float = _LEAST_SCORE) -> None:
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise UserError(
                "--ocr needs RapidOCR: install the extra (`uv pip install 'vision-adapter[ocr]'`)"
            ) from error
        # A line of its own for every model and every picture without text would drown the progress bar.
        self.engine: Any = RapidOCR(params={"Global.log_level": "critical"})
        logging.getLogger("RapidOCR").setLevel(logging.CRITICAL)
        self.least_score = least_score

    def lines(self, picture: Pillow.Image) -> list[str]:
        """Lines of text in an RGB picture, in reading order; empty where there is none."""
        factor = max(1, -(-_LEAST_SIDE // min(picture.size)))
        if factor > 1:
            picture = picture.resize(
                (picture.width * factor, picture.height * factor), Pillow.Resampling.BICUBIC
            )
        pixels = np.asarray(picture.convert("RGB"))[..., ::-1]  # the engine reads an array as BGR
        found = self.engine(np.ascontiguousarray(pixels))
        if not found.txts:
            return []
        return [
            text.strip()
            for text, score in zip(found.txts, found.scores, strict=True)
            if score >= self.least_score and sum(map(str.isalnum, text)) >= _LEAST_LETTERS
        ]


def with_text(caption: str, lines: list[str]) -> str:
    """A caption with the text of its picture behind it; as it is where there is none.

    Source of the idea: arXiv 2407.21783, section 7.1.1. The wording is our own.
    """
    if not lines:
        return caption
    said = caption if caption.endswith((".", "!", "?")) else f"{caption}."
    return f'{said} The text in the picture: "{" ".join(lines)}".'
