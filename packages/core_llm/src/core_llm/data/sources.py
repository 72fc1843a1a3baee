"""The one dataset registry: every dataset is named once, with its public source and licence.

A source reads a local folder (`--data-root`) or its public hub copy, and yields the same rows from both.
Media stay undecoded: a path or encoded bytes. Splits are fixed: by the files that a dataset ships, else by
a hash of the row's group, so that rows that share an image, speaker or context never part.
"""

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from core_llm.data.rows import Row, Source, declared_split, from_hub, jsonl, numbered, spread
from core_llm.data.safety_sets import SAFETY
from core_llm.data.snapshots import has_parquet, parts
from core_llm.data.speech import SPEECH
from core_llm.data.vision_sets import VISION
from core_llm.errors import DataError

__all__ = ["SOURCES", "SPLITS", "Row", "Source", "load", "split_of"]

SPLITS = ("train", "dev", "all")


def split_of(name: str, group: str) -> str:
    """ "train" or "dev" by a hash of the group that never changes."""
    digest = hashlib.sha256(f"{name}:{group}".encode()).digest()
    return "dev" if int.from_bytes(digest[:8], "big") / 2**64 < SOURCES[name].dev_fraction else "train"


def load(
    name: str, data_root: Path | None = None, split: str = "train", limit: int | None = None
) -> list[Row]:
    """Rows of a dataset in a fixed order; at most `limit`, spread evenly over the whole.

    name: "fleurs", or "fleurs:de_de" for one part of a dataset in parts; without it, all parts of a local
    folder, or the hub copy's first one.
    Raises `DataError` for an unknown name, part or split, a missing folder, or a malformed file.
    """
    name, _, subset = name.partition(":")
    if name not in SOURCES:
        raise DataError(f"unknown dataset '{name}'; known: {', '.join(SOURCES)}")
    if subset and SOURCES[name].subset_fields is None:
        raise DataError(f"{name} has no parts: leave ':{subset}' out")
    if split not in SPLITS:
        raise DataError(f"unknown split '{split}'; known: {', '.join(SPLITS)}")
    source = SOURCES[name]
    rows = _read_local(source, data_root) if data_root is not None else _read_hub(source, subset)
    if subset:
        known = sorted({row.fields["subset"] for row in rows})
        rows = [row for row in rows if row.fields["subset"] == subset]
        if not rows:
            raise DataError(f"{name}: holds no part '{subset}'; known here: {', '.join(known)}")
    if split != "all":
        rows = [row for row in rows if (row.split or split_of(name, row.group)) == split]
    if not rows:
        raise DataError(f"{name}: the {split} split is empty here")
    return rows if limit is None else list(spread(rows, limit))


def _read_local(source: Source, data_root: Path) -> list[Row]:
    folder = data_root / source.name
    if not folder.is_dir():
        raise DataError(
            f"{data_root}: holds no folder '{source.name}'; put the {source.title} dataset there "
            f"({source.homepage}), or leave --data-root out to read the hub"
        )
    try:
        return list(_read_snapshot(source, folder) if has_parquet(folder) else source.read_local(folder))
    except (OSError, ValueError, KeyError, IndexError, TypeError, csv.Error) as error:
        raise DataError(
            f"{folder}: cannot be read as {source.title} ({type(error).__name__}: {error})"
        ) from error


def _read_snapshot(source: Source, folder: Path) -> Iterator[Row]:
    """A copy of the hub repository: the same rows as `_read_hub` gives."""
    for part, split, rows in parts(folder):
        if source.subset_fields is None:
            yield from source.read_hub(rows, split)
        else:
            shared = source.subset_fields(part)
            yield from (replace(row, fields=row.fields | shared) for row in source.read_hub(rows, split))


def _read_hub(source: Source, subset: str = "") -> list[Row]:
    if source.hub is None:
        raise DataError(
            f"{source.name}: no hub copy is known; download it from {source.homepage} and pass --data-root"
        )
    import datasets

    repository, configuration = source.hub
    configuration = subset or configuration
    try:
        loaded = datasets.load_dataset(repository, configuration, revision=source.revision)
        rows: list[Row] = []
        for split, table in loaded.items():
            for column in ("image", "audio", *(f"image_{n}" for n in range(1, 8))):
                if column in table.column_names:
                    feature = datasets.Audio if column == "audio" else datasets.Image
                    table = table.cast_column(column, feature(decode=False))
            if "images" in table.column_names:
                table = table.cast_column("images", datasets.List(datasets.Image(decode=False)))
            rows += source.read_hub(table, str(split))
        if source.subset_fields is None or configuration is None:
            return rows
        shared = source.subset_fields(configuration)
        return [replace(row, fields=row.fields | shared) for row in rows]
    except Exception as error:  # the library raises many kinds; all mean that the hub copy is out of reach
        raise DataError(
            f"{source.name}: cannot read {repository} from the hub ({type(error).__name__}); "
            "check the network, or pass --data-root with a local copy"
        ) from error


def _easy_vqa_local(folder: Path) -> Iterator[Row]:
    for i, (question, answer, image) in enumerate(json.loads((folder / "questions.json").read_text())):
        fields = {"question": question, "answer": answer, "image": folder / "images" / f"{image}.png"}
        yield Row(f"easy_vqa-{i}", str(image), fields)


def _easy_vqa_hub(rows: Iterable[dict[str, Any]], split: str) -> Iterator[Row]:
    for i, row in enumerate(rows):
        image = row["image"]["bytes"]
        fields = {"question": row["question"], "answer": row["answer"], "image": image}
        group = str(row.get("image_id", hashlib.sha256(image).hexdigest()[:16]))
        yield Row(f"easy_vqa-{split}-{i}", f"{split}-{group}", fields, declared_split(split))


def _gsm8k_fields(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return row["question"], {"question": row["question"], "answer": row["answer"]}


def _gsm8k_local(folder: Path) -> Iterator[Row]:
    for stem in ("train", "test"):
        rows = map(_gsm8k_fields, jsonl(folder / f"{stem}.jsonl"))
        yield from numbered(f"gsm8k-{stem}", rows, declared_split(stem))


# Pictures of COCO stand in `train2017/`, `val2017/`, ... beside the annotations, under their own names.


def _coco_row(identity: str, image: Any, file: str, caption: str, split: str | None) -> Row:
    return Row(f"coco_captions-{identity}", file, {"image": image, "caption": caption.strip()}, split)


def _coco_captions_local(folder: Path) -> Iterator[Row]:
    """annotations/captions_{train,val}2017.json (or of 2014) and a folder of pictures for each."""
    files = sorted((folder / "annotations").glob("captions_*.json"))
    if not files:
        raise FileNotFoundError("no annotations/captions_*.json")
    for path in files:
        part = path.stem.removeprefix("captions_")
        annotations = json.loads(path.read_text(encoding="utf-8"))
        names = {image["id"]: image["file_name"] for image in annotations["images"]}
        for entry in annotations["annotations"]:
            name = names[entry["image_id"]]
            image, split = folder / part / name, declared_split(part.rstrip("0123456789"))
            yield _coco_row(str(entry["id"]), image, name, entry["caption"], split)


def _coco_captions_hub(rows: Iterable[dict[str, Any]], split: str) -> Iterator[Row]:
    for i, row in enumerate(rows):
        name = str(row.get("question_id") or f"{split}-{i}")  # the picture's file name
        for n, caption in enumerate(row["answer"] or []):
            yield _coco_row(f"{split}-{i}-{n}", row["image"]["bytes"], name, caption, declared_split(split))


def _vqav2_row(row: dict[str, Any], answer: str | None, image: Any, split: str | None) -> Row:
    answers = [each["answer"] for each in row.get("answers") or []]
    fields = {"question": row["question"], "answer": answer, "answers": answers, "image": image}
    return Row(f"vqav2-{row['question_id']}", str(row["image_id"]), fields, split)


def _vqav2_local(folder: Path) -> Iterator[Row]:
    """v2_OpenEnded_mscoco_*_questions.json, v2_mscoco_*_annotations.json, {train,val}2014/ with pictures."""
    files = sorted(folder.glob("v2_OpenEnded_mscoco_*_questions.json"))
    if not files:
        raise FileNotFoundError("no v2_OpenEnded_mscoco_*_questions.json")
    for path in files:
        part = path.stem.removeprefix("v2_OpenEnded_mscoco_").removesuffix("_questions")
        answered = json.loads((folder / f"v2_mscoco_{part}_annotations.json").read_text(encoding="utf-8"))
        by_id = {entry["question_id"]: entry for entry in answered["annotations"]}
        for question in json.loads(path.read_text(encoding="utf-8"))["questions"]:
            entry = by_id[question["question_id"]] | question
            image = folder / part / f"COCO_{part}_{question['image_id']:012}.jpg"
            split = declared_split(part.rstrip("0123456789"))
            yield _vqav2_row(entry, entry["multiple_choice_answer"], image, split)


def _vqav2_hub(rows: Iterable[dict[str, Any]], split: str) -> Iterator[Row]:
    for row in rows:
        if row.get("multiple_choice_answer"):  # the test parts have no answers
            answer = row["multiple_choice_answer"]
            yield _vqav2_row(row, answer, row["image"]["bytes"], declared_split(split))


def _llava_instruct_local(folder: Path) -> Iterator[Row]:
    """*.json with lists of {id, image, conversations}; pictures under train2017/ or under their own path."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise FileNotFoundError("no .json file")
    for path in files:
        for i, entry in enumerate(json.loads(path.read_text(encoding="utf-8"))):
            if "image" not in entry:  # some mixes of this form hold conversations without a picture
                continue
            said = [(turn["from"], turn["value"]) for turn in entry["conversations"]]
            image = folder / entry["image"]
            if not image.exists():
                image = folder / "train2017" / entry["image"]
            yield _llava_row(f"{path.stem}-{i}", entry["image"], image, said, None)


def _llava_instruct_hub(rows: Iterable[dict[str, Any]], split: str) -> Iterator[Row]:
    for i, row in enumerate(rows):
        if len(row["images"]) != 1:
            continue
        said = [
            (message["role"], "".join(part["text"] or "" for part in message["content"]))
            for message in row["messages"]
        ]
        picture = row["images"][0]["bytes"]
        yield _llava_row(f"{split}-{i}", f"{split}-{i}", picture, said, declared_split(split))


def _llava_row(identity: str, group: str, image: Any, said: list[tuple[str, str]], split: str | None) -> Row:
    """`turns`: questions and answers in order; the mark for the picture's place is left out."""
    texts = [text.replace("<image>", "").strip() for speaker, text in said if speaker != "system"]
    turns = list(zip(texts[::2], texts[1::2], strict=True))
    return Row(f"llava_instruct-{identity}", group, {"image": image, "turns": turns}, split)


_ALL = (
    Source(
        name="easy_vqa",
        title="easy-VQA",
        licence="MIT",
        homepage="https://github.com/vzhou842/easy-VQA",
        hub=None,
        dev_fraction=0.1,
        read_local=_easy_vqa_local,
        read_hub=_easy_vqa_hub,
    ),
    Source(
        name="gsm8k",
        title="GSM8K",
        licence="MIT",
        homepage="https://github.com/openai/grade-school-math",
        hub=("openai/gsm8k", "main"),
        dev_fraction=0.1,
        read_local=_gsm8k_local,
        read_hub=from_hub("gsm8k", _gsm8k_fields),
    ),
    Source(
        name="coco_captions",
        title="COCO captions",
        licence="CC BY 4.0 (annotations); the pictures are under their own licences",
        homepage="https://cocodataset.org",
        hub=("lmms-lab/COCO-Caption2017", None),  # its validation and test parts; training needs a local copy
        dev_fraction=0.1,
        read_local=_coco_captions_local,
        read_hub=_coco_captions_hub,
    ),
    Source(
        name="vqav2",
        title="VQAv2",
        licence="CC BY 4.0 (annotations); the pictures are under their own licences",
        homepage="https://visualqa.org",
        hub=("lmms-lab/VQAv2", None),
        dev_fraction=0.1,
        read_local=_vqav2_local,
        read_hub=_vqav2_hub,
    ),
    Source(
        name="llava_instruct",
        title="LLaVA-Instruct",
        # By the card of LLaVA-Instruct-150K, whose first version said CC BY-NC 4.0. The card of the hub copy,
        # which mixes it with others, names no licence.
        licence="CC BY 4.0 and OpenAI's terms of use (LLaVA-Instruct-150K); the hub's mix states none",
        homepage="https://github.com/haotian-liu/LLaVA",
        hub=("HuggingFaceH4/llava-instruct-mix-vsft", None),
        dev_fraction=0.02,
        read_local=_llava_instruct_local,
        read_hub=_llava_instruct_hub,
    ),
)

SOURCES: dict[str, Source] = {source.name: source for source in (*_ALL, *VISION, *SPEECH, *SAFETY)}
