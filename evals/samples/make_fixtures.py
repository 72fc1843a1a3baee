"""Makes the fixtures: a few rows of the project's own for every task, in the format of its dataset.

python -m evals.samples.make_fixtures [FOLDER]; the folder can be used as a data root. No row is of a dataset.
"""

import csv
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

SAMPLES = Path(__file__).parent
FIXTURES = SAMPLES / "fixtures"
_COLORS = {"red": (200, 30, 30), "blue": (30, 60, 200), "green": (30, 150, 60), "black": (0, 0, 0)}


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_csv(path: Path, header: str, rows: Sequence[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])


def _write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


def _picture(color: str, text: str = "") -> Any:
    """64 by 64 pixels: a square of one colour on white, with a text below."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (64, 64), "white")
    drawing = ImageDraw.Draw(picture)
    drawing.rectangle((16, 8, 48, 40), fill=_COLORS[color])
    drawing.text((4, 48), text, fill=(0, 0, 0))
    return picture


def _save(path: Path, color: str, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _picture(color, text).save(path)


def _encoded(color: str, text: str = "") -> dict[str, Any]:
    """As a hub's parquet file holds a picture."""
    file = BytesIO()
    _picture(color, text).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{color}.png"}


def _clip(path: Path, number: int, rate: int = 16_000) -> str:
    """One of the bundled clips of spoken digits in another place and format; returns what is said."""
    import soundfile

    entry = json.loads((SAMPLES / "clips.json").read_text())["digits"][number]
    samples, own = soundfile.read(SAMPLES / entry["file"], dtype="float32")
    at = np.arange(0, len(samples), own / rate)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.interp(at, np.arange(len(samples)), samples), rate)
    return str(entry["text"])


def vision(root: Path) -> None:
    """vqav2, textvqa, docvqa, chartqa, ai2d, mmmu, easy_vqa."""
    questions, annotations = [], []
    for i, color in enumerate(_COLORS, start=1):
        _save(root / "vqav2" / "val2014" / f"COCO_val2014_{i:012}.jpg", color)
        questions.append({"image_id": i, "question": "What color is the square?", "question_id": i * 1000})
        said = [color] * 8 + ["dark " + color, "square"]
        answers = [
            {"answer": text, "answer_confidence": "yes", "answer_id": n} for n, text in enumerate(said, 1)
        ]
        annotations.append(
            {
                "question_type": "what color is the",
                "multiple_choice_answer": color,
                "answers": answers,
                "image_id": i,
                "answer_type": "other",
                "question_id": i * 1000,
            }
        )
    folder = root / "vqav2"
    _write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    _write_json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    _written_words(root)
    _charts(root)
    _choices(root)
    for i, color in enumerate(_COLORS):
        _save(root / "easy_vqa" / "images" / f"{i}.png", color)
    easy = [["what color is the shape?", color, i] for i, color in enumerate(_COLORS)]
    _write_json(root / "easy_vqa" / "questions.json", easy)


def _written_words(root: Path) -> None:
    signs, pages = [], []
    for i, (color, word) in enumerate(zip(_COLORS, ("BAKERY", "LIBRARY", "HARBOUR", "STATION"))):
        _save(root / "textvqa" / "train_images" / f"sign{i}.jpg", color, word)
        answers = [word.lower()] * 9 + ["unanswerable"]
        sign = {"question": "what does the sign say?", "image_id": f"sign{i}", "image_classes": ["Sign"]}
        signs.append({**sign, "question_id": 100 + i, "answers": answers, "set_name": "val"})
        _save(root / "docvqa" / "documents" / f"page{i}_1.png", color, f"No. {i}{i}7")
        pages.append(
            {
                "questionId": 500 + i,
                "question": "What is the number on the page?",
                "question_types": ["form"],
                "image": f"documents/page{i}_1.png",
                "docId": i,
                "ucsf_document_id": f"page{i}",
                "ucsf_document_page_no": "1",
                "answers": [f"{i}{i}7", f"No. {i}{i}7"],
                "data_split": "val",
            }
        )
    _write_json(root / "textvqa" / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": signs})
    _write_json(root / "docvqa" / "val_v1.0_withQT.json", {"dataset_split": "val", "data": pages})


def _charts(root: Path) -> None:
    human, augmented = [], []
    for i, color in enumerate(_COLORS):
        _save(root / "chartqa" / "test" / "png" / f"chart{i}.png", color, f"{10 * i + 10}%")
        human.append(
            {"imgname": f"chart{i}.png", "query": "Which colour is the largest bar?", "label": color.title()}
        )
        augmented.append(
            {"imgname": f"chart{i}.png", "query": "What share has the bar?", "label": str(10 * i + 10)}
        )
    _write_json(root / "chartqa" / "test" / "test_human.json", human)
    _write_json(root / "chartqa" / "test" / "test_augmented.json", augmented)


def _choices(root: Path) -> None:
    """As the hub's parquet files are; of MMMU one row is open and one has no public answer."""
    names = list(_COLORS)
    diagrams = [
        {
            "question": "Which colour is the box?",
            "options": names,
            "answer": str(i),
            "image": _encoded(color),
        }
        for i, color in enumerate(names)
    ]
    _write_parquet(root / "ai2d" / "data" / "test-00000-of-00001.parquet", diagrams)
    rows = []
    for i, color in enumerate(names):
        rows.append(
            {
                "id": f"validation_Design_{i + 1}",
                "question": "Which colour has the box in <image 1>?",
                "options": str(names),
                "explanation": "",
                "image_1": _encoded(color),
                "image_2": None,
                "img_type": "['Drawings']",
                "answer": "ABCD"[i],
                "topic_difficulty": "Easy",
                "question_type": "multiple-choice",
                "subfield": "Colours",
            }
        )
    rows.append({**rows[0], "id": "validation_Design_5", "question_type": "open", "answer": "red"})
    rows[1] = {**rows[1], "options": "['<image 1>', '<image 2>', 'none', 'both']", "image_2": _encoded("red")}
    _write_parquet(root / "mmmu" / "data" / "validation-00000-of-00001.parquet", rows)
    _write_parquet(root / "mmmu" / "data" / "test-00000-of-00001.parquet", [{**rows[0], "answer": "?"}])


def speech(root: Path) -> None:
    """librispeech, fleurs, mls, covost2, fsdd."""
    chapters: dict[Path, list[str]] = {}
    for i, speaker in enumerate(("11", "11", "12", "12")):
        part = "test-clean" if speaker == "11" else "test-other"
        folder = root / "librispeech" / part / speaker / "7"
        name = f"{speaker}-7-{i:04}"
        chapters.setdefault(folder, []).append(f"{name} {_clip(folder / f'{name}.flac', i).upper()}")
    for folder, lines in chapters.items():
        path = folder / f"{folder.parent.name}-7.trans.txt"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for language, first in (("en_us", 4), ("de_de", 6)):
        folder, lines = root / "fleurs" / language, []
        for i in range(2):
            text = _clip(folder / "audio" / "test" / f"{first + i}.wav", first + i, 8_000)
            said = text.capitalize() + "."
            lines.append(f"{i}\t{first + i}.wav\t{said}\t{text}\t{' '.join(text)}\t8000\tFEMALE")
        (folder / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    folder, lines = root / "mls" / "mls_german" / "test", []
    for i in range(2):
        name = f"21_3_{i:06}"
        text = _clip(folder / "audio" / "21" / "3" / f"{name}.flac", 8 + i)
        lines.append(f"{name}\t{text}")
    (folder / "transcripts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    folder, lines = root / "covost2", ["path\tsentence\ttranslation\tclient_id"]
    for i, translation in enumerate(("the number that somebody said", "a small number, clearly said")):
        text = _clip(folder / "de" / "clips" / f"clip{i}.mp3", 10 + i)
        lines.append(f"clip{i}.mp3\t{text}\t{translation}\tspeaker{i}")
    (folder / "covost_v2.de_en.test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for i in range(4):
        _clip(root / "fsdd" / f"{i}_fixture{i % 2}_0.wav", 12 + i, 8_000)


def main(root: Path) -> None:
    """Write everything below `root`."""
    from evals.samples import make_text_fixtures

    vision(root)
    speech(root)
    make_text_fixtures.text(root)
    make_text_fixtures.safety(root)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FIXTURES)
