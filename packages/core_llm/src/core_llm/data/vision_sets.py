"""Questions about photographs, documents, charts and diagrams for the dataset registry.

Every row has "image" (a path, or encoded bytes) or "images" (by the number that the question names),
"question", and "answers", all that count, or "options" with the index of the right one in "answer".
"""

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from core_llm.data.rows import Row, Source, declared_split


def _tables(folder: Path, pattern: str) -> list[Path]:
    found = sorted(folder.rglob(pattern))
    if not found:
        raise FileNotFoundError(f"no {pattern}")
    return found


def _digest(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()[:16]


def _textvqa_local(folder: Path) -> Iterator[Row]:
    """TextVQA_0.5.1_{train,val}.json and train_images/IMAGE_ID.jpg, which holds those of both."""
    for path in _tables(folder, "TextVQA_*_*.json"):
        split = path.stem.rpartition("_")[2]
        for row in json.loads(path.read_text(encoding="utf-8"))["data"]:
            if row.get("answers"):
                image = path.parent / "train_images" / f"{row['image_id']}.jpg"
                yield _textvqa_row(row, image, split)


def _textvqa_hub(rows: Iterable[dict[str, Any]], split: str) -> Iterator[Row]:
    for row in rows:
        if row.get("answers"):  # the test part has none
            yield _textvqa_row(row, row["image"]["bytes"], split)


def _textvqa_row(row: dict[str, Any], image: Path | bytes, split: str) -> Row:
    fields = {"question": row["question"], "answers": list(row["answers"]), "image": image}
    return Row(f"textvqa-{row['question_id']}", str(row["image_id"]), fields, declared_split(split))


def _docvqa_local(folder: Path) -> Iterator[Row]:
    """{train,val}_v1.0*.json with lists "data" and pages as they are named there (documents/NAME.png)."""
    for path in _tables(folder, "*_v1.0*.json"):
        split = path.stem.partition("_")[0]
        for row in json.loads(path.read_text(encoding="utf-8"))["data"]:
            if row.get("answers"):
                yield _docvqa_row(row, path.parent / row["image"], split)


def _docvqa_hub(rows: Iterable[dict[str, Any]], split: str) -> Iterator[Row]:
    for row in rows:
        if row.get("answers"):  # the test part has none
            yield _docvqa_row(row, row["image"]["bytes"], split)


def _docvqa_row(row: dict[str, Any], image: Path | bytes, split: str) -> Row:
    fields = {"question": row["question"], "answers": list(row["answers"]), "image": image}
    page = f"{row['ucsf_document_id']}-{row['ucsf_document_page_no']}"
    return Row(f"docvqa-{row['questionId']}", page, fields, declared_split(split))


def _chartqa_local(folder: Path) -> Iterator[Row]:
    """{train,val,test}/SPLIT_{human,augmented}.json with imgname, query, label; pictures in SPLIT/png."""
    for kind in ("augmented", "human"):
        for path in _tables(folder, f"*_{kind}.json"):
            split = path.stem.partition("_")[0]
            for i, row in enumerate(json.loads(path.read_text(encoding="utf-8"))):
                image = path.parent / "png" / row["imgname"]
                identity = f"{split}-{kind}-{i}"
                yield _chartqa_row(identity, row["imgname"], row["query"], row["label"], kind, image, split)


def _chartqa_hub(rows: Iterable[dict[str, Any]], split: str) -> Iterator[Row]:
    for i, row in enumerate(rows):
        image, kind = row["image"]["bytes"], row["type"].removesuffix(f"_{split}")
        group, identity = _digest(image), f"{split}-{i}"
        yield _chartqa_row(identity, group, row["question"], row["answer"], kind, image, split)


def _chartqa_row(
    identity: str, group: str, question: str, answer: str, kind: str, image: Path | bytes, split: str
) -> Row:
    fields = {"question": question, "answers": [str(answer)], "kind": kind, "image": image}
    return Row(f"chartqa-{identity}", group, fields, declared_split(split))


def _only_parquet(folder: Path) -> Iterator[Row]:
    raise FileNotFoundError("no .parquet file; download the hub repository into this folder")
    yield


def _ai2d_hub(rows: Iterable[dict[str, Any]], split: str) -> Iterator[Row]:
    for i, row in enumerate(rows):
        image = row["image"]["bytes"]
        fields = {
            "question": row["question"],
            "options": list(row["options"]),
            "answer": int(row["answer"]),
            "image": image,
        }
        yield Row(f"ai2d-{split}-{i}", _digest(image), fields, declared_split(split))


def _mmmu_hub(rows: Iterable[dict[str, Any]], split: str) -> Iterator[Row]:
    for row in rows:
        if row["question_type"] != "multiple-choice" or row["answer"] in ("", "?", None):
            continue  # the answers of the test part are not public
        images = {n: row[f"image_{n}"]["bytes"] for n in range(1, 8) if row.get(f"image_{n}")}
        fields = {
            "question": row["question"],
            "options": [str(option) for option in ast.literal_eval(row["options"])],
            "answer": ord(row["answer"]) - ord("A"),
            "images": images,
            "subject": row["id"].partition("_")[2].rpartition("_")[0],  # validation_Accounting_1
        }
        # Its "dev" holds the solved examples for few-shot prompts, which scores leave out.
        declared = "train" if split == "dev" else declared_split(split)
        yield Row(f"mmmu-{row['id']}", row["id"], fields, declared)


# Columns and licences were read from the dataset cards and from the readers of other harnesses.
VISION = (
    Source(
        name="textvqa",
        title="TextVQA",
        licence="CC BY 4.0",
        homepage="https://textvqa.org",
        hub=("lmms-lab/textvqa", None),
        dev_fraction=0.1,
        read_local=_textvqa_local,
        read_hub=_textvqa_hub,
    ),
    Source(
        name="docvqa",
        title="DocVQA",
        # The card of the hub copy says Apache-2.0, which cannot cover the scanned pages.
        licence="Apache-2.0 by the hub copy's card; pages are of the UCSF Industry Documents Library",
        homepage="https://www.docvqa.org",
        hub=("lmms-lab/DocVQA", "DocVQA"),
        dev_fraction=0.1,
        read_local=_docvqa_local,
        read_hub=_docvqa_hub,
    ),
    Source(
        name="chartqa",
        title="ChartQA",
        licence="GPL-3.0",
        homepage="https://github.com/vis-nlp/ChartQA",
        hub=("lmms-lab/ChartQA", None),  # its test part; training needs a local copy
        dev_fraction=0.1,
        read_local=_chartqa_local,
        read_hub=_chartqa_hub,
    ),
    Source(
        name="ai2d",
        title="AI2D",
        licence="CC BY-SA 4.0 (by its authors' page, unconfirmed); the card of the hub copy states none",
        homepage="https://prior.allenai.org/projects/diagram-understanding",
        hub=("lmms-lab/ai2d", None),
        dev_fraction=0.1,
        read_local=_only_parquet,
        read_hub=_ai2d_hub,
    ),
    Source(
        name="mmmu",
        title="MMMU",
        licence="Apache-2.0",
        homepage="https://mmmu-benchmark.github.io",
        hub=("lmms-lab/MMMU", None),  # all subjects as one part
        dev_fraction=0.1,
        read_local=_only_parquet,
        read_hub=_mmmu_hub,
    ),
)
