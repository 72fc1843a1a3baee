"""Text in pictures: what is appended to captions, resuming, and RapidOCR on drawn words where it is there."""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image as Pillow

from core_llm.data.scenes import WORDS, Scene, sample_scene
from core_llm.errors import UserError
from vision_adapter.curate_run import CurationConfig, curate
from vision_adapter.examples import Example, load_examples
from vision_adapter.ocr import RapidOcrReader, with_text
from vision_adapter.scenes import draw


class Reader:
    """Reads the picture's width."""

    def __init__(self, fail_at: int = -1) -> None:
        self.read: list[int] = []
        self.fail_at = fail_at

    def lines(self, picture: Pillow.Image) -> list[str]:
        if len(self.read) == self.fail_at:
            raise KeyboardInterrupt
        self.read.append(picture.width)
        return [] if picture.width % 2 else ["width", str(picture.width)]


def pairs(widths: Sequence[int]) -> list[Example]:
    return [
        Example(f"p{w}", Pillow.new("RGB", (w, 8), (w % 256, 0, 0)), (("", f"a picture of {w}"),))
        for w in widths
    ]


def test_text_stands_behind_the_caption() -> None:
    assert with_text("A sign.", ["STOP", "HERE"]) == 'A sign. The text in the picture: "STOP HERE".'
    assert with_text("a sign", ["x"]) == 'a sign. The text in the picture: "x".'
    assert with_text("a sign", []) == "a sign"


def test_kept_captions_get_their_text_and_answers_stay(tmp_path: Path) -> None:
    question = Example("q", Pillow.new("RGB", (20, 8)), (("what is it?", "a strip"),))
    reader = Reader()
    report = curate([*pairs([10, 11, 12]), question], tmp_path, CurationConfig(ocr=True), reader=reader)
    assert report["with_text"] == 2 and reader.read == [10, 11, 12]
    rows = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert [row.get("caption") for row in rows] == [
        'a picture of 10. The text in the picture: "width 10".',
        "a picture of 11",
        'a picture of 12. The text in the picture: "width 12".',
        None,
    ]
    assert rows[3]["turns"] == [["what is it?", "a strip"]]
    assert "text in the picture" in load_examples(str(tmp_path), split="all")[0].caption
    without = curate(pairs([10]), tmp_path / "without", CurationConfig(), reader=reader)
    assert "with_text" not in without and reader.read == [10, 11, 12]


def test_an_interrupted_reading_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vision_adapter.curate_run.CHUNK", 2)
    config = CurationConfig(ocr=True)
    with pytest.raises(KeyboardInterrupt):
        curate(pairs(range(10, 16)), tmp_path, config, reader=Reader(fail_at=3))
    assert not (tmp_path / "captions.jsonl").exists()
    reader = Reader()
    assert curate(pairs(range(10, 16)), tmp_path, config, reader=reader)["with_text"] == 3
    assert reader.read == [12, 13, 14, 15]  # the first chunk was there


def test_the_extra_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(UserError, match=r"vision-adapter\[ocr\]"):
        curate(pairs([10]), tmp_path, CurationConfig(ocr=True))


def test_rapidocr_reads_drawn_words_and_nothing_in_drawn_shapes() -> None:
    pytest.importorskip("rapidocr", reason="the extra 'ocr' is not installed")
    pytest.importorskip("onnxruntime", reason="the extra 'ocr' is not installed")
    reader, rng = RapidOcrReader(), random.Random("ocr")
    words = rng.sample(sorted(WORDS), 12)
    read = [
        " ".join(reader.lines(draw(Scene((), word), rng, 256))).lower().replace(" ", "") for word in words
    ]
    right = sum(a == b for a, b in zip(read, words, strict=True))
    shuffled = sum(a == b for a, b in zip(read[1:] + read[:1], words, strict=True))
    assert right >= 10 and shuffled == 0, list(zip(words, read, strict=True))
    shapes = [reader.lines(draw(sample_scene(rng, "single"), rng, 256)) for _ in range(12)]
    assert sum(bool(lines) for lines in shapes) <= 1, shapes
