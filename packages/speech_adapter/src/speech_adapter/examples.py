"""Recordings with text from wherever they are: a registered dataset, a folder with a table, or the hub.

Decoding is left to who needs the samples. What `speech-adapter synthesize` writes is such a folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from core_llm.chat import Audio, Message, Text
from core_llm.data import sources
from core_llm.data.tables import entries, held_out
from core_llm.errors import DataError, UserError

TABLES = ("metadata.jsonl", "metadata.csv", "captions.jsonl", "captions.csv")
TASKS = ("recognition", "translation", "question")
_TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript", "caption")
_CODES = {"cmn": "zh", "yue": "yue", "fil": "tl", "nb": "no", "iw": "he"}  # of FLEURS and Common Voice


@dataclass(frozen=True, eq=False)
class Example:
    """A recording and what is known about it; "" where something is not.

    audio: a path, encoded bytes, or samples with their rate. text: what is said, in `language` (a code such
    as "de", or a name). translation: the same in `target_language`. answer: the reply to what is said.
    prompt: text that stands before the sound and is part of the question, such as a described scene.
    """

    id: str
    audio: str | Path | bytes | np.ndarray
    text: str = ""
    language: str = "en"
    translation: str = ""
    target_language: str = "en"
    answer: str = ""
    prompt: str = ""
    rate: int | None = None


@dataclass(frozen=True, eq=False)
class Asked:
    """One thing to learn from a recording: what stands before it, and what the core should say after it."""

    example: Example
    task: str
    prompt: str
    answer: str

    def conversation(self, audio: Audio) -> list[Message]:
        """Prompt and sound from the user, the answer from the assistant."""
        parts = (Text(self.prompt), audio) if self.prompt else (audio,)
        return [Message("user", parts), Message("assistant", self.answer)]

    def written(self) -> list[Message]:
        """The same with the text in place of its sound: what a core that only reads is asked."""
        question = f"{self.prompt} {self.example.text}".strip()
        return [Message("user", question), Message("assistant", self.answer)]


def asked(example: Example, tasks: tuple[str, ...] = TASKS) -> list[Asked]:
    """Every one of `tasks` that the example has what it needs for (prompts: arXiv 2407.21783, section 8).

    Raises `UserError` for an unknown task, `DataError` for a language that has no name here.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise UserError(f"unknown task '{' '.join(unknown)}'; known: {', '.join(TASKS)}")
    found = []
    if "recognition" in tasks and example.text:
        prompt = f"Repeat after me in {language_name(example.language)}:"
        found.append(Asked(example, "recognition", prompt, example.text))
    if "translation" in tasks and example.translation:
        prompt = f"Translate the following sentence into {language_name(example.target_language)}:"
        found.append(Asked(example, "translation", prompt, example.translation))
    if "question" in tasks and example.answer:
        found.append(Asked(example, "question", example.prompt, example.answer))
    return found


@lru_cache(maxsize=256)
def language_name(code: str) -> str:
    """ "German" for "de", "de_de" or "de-DE"; a name stays as it is. Raises `DataError` for other codes."""
    if code == "en":
        return "English"
    if code.istitle() and len(code) > 3:
        return code
    from whisper.tokenizer import LANGUAGES

    short = code.replace("-", "_").partition("_")[0].lower()
    name = LANGUAGES.get(_CODES.get(short, short))
    if name is None:
        raise DataError(f"no name is known for the language '{code}': write its English name instead")
    return name.title()


def load_examples(where: str, data_root: Path | None = None, split: str = "train") -> list[Example]:
    """Examples in a fixed order.

    where: the name of a dataset in `core_llm.data.sources` (or name:part); a folder with recordings and a
    table (`TABLES`); a folder written by `datasets`' save_to_disk; a hub id; or several of these, with
    commas. A row has "audio" (or "file_name", relative to the table) and any of "text", "language",
    "translation" with "target_language", "answer" with "prompt", and "split". Where rows name no split,
    one in twenty is held out, rows of one "source_id" together. Raises `DataError` that names the row.
    """
    if parts := _parts(where):
        return [example for part in parts for example in load_examples(part, data_root, split)]
    known = ", ".join(source.name for source in sources.SPEECH)
    name = where.partition(":")[0]
    if name in sources.SOURCES:
        if name not in {source.name for source in sources.SPEECH}:
            raise DataError(f"{name}: holds no recordings; known: {known}, a folder, or a hub id")
        rows = sources.load(where, data_root, split)
        return [_example(row.id, row.fields, f"{where}: {row.id}") for row in rows]
    found = entries(where, "audio", TABLES)
    if found is None:
        raise DataError(f"unknown data '{where}'; known: {known}, a folder, or a hub id such as org/name")
    chosen = [
        _example(entry.id, entry.fields, entry.place)
        for entry in found
        if split == "all" or _split_of(entry.id, entry.fields) == split
    ]
    if not chosen and split != "dev":
        raise DataError(f"{where}: holds no recordings of the {split} split")
    return chosen


def train_and_held_out(where: str, data_root: Path | None = None) -> tuple[list[Example], list[Example]]:
    """Both splits of `load_examples`; nothing is held out of a dataset that has no such split."""
    train: list[Example] = []
    held_out: list[Example] = []
    for part in _parts(where) or [where]:
        train += load_examples(part, data_root, "train")
        try:
            held_out += load_examples(part, data_root, "dev")
        except DataError:  # the train split could be read: there is no other
            continue
    return train, held_out


def _parts(where: str) -> list[str]:
    """The names between commas; [] where there are none, or a file is called so."""
    if "," not in where or Path(where).exists():
        return []
    return [part.strip() for part in where.split(",") if part.strip()]


def _split_of(identity: str, row: Mapping[str, Any]) -> str:
    if row.get("split"):
        return "train" if str(row["split"]).startswith("train") else "dev"
    return "dev" if held_out(str(row.get("source_id") or identity)) else "train"


def _example(identity: str, row: Mapping[str, Any], place: str) -> Example:
    values: dict[str, Any] = dict(_texts(row))
    for key, value in values.items():
        if not isinstance(value, str):
            raise DataError(f"{place}: '{key}' is not text")
    return Example(identity, row["audio"], **values)


def _texts(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    text = next((row[column] for column in _TEXT_COLUMNS if row.get(column)), "")
    yield "text", text.strip() if isinstance(text, str) else text
    for key in ("language", "translation", "target_language", "answer", "prompt"):
        if row.get(key):
            yield key, row[key]
