"""Texts to read aloud: a file of lines or rows, a registered dataset, or the project's own phrases."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

from core_llm.data import sources
from core_llm.data.phrases import spoken_phrase
from core_llm.data.tables import read_rows
from core_llm.errors import DataError, UserError

PHRASES, QUESTIONS = "phrases", "questions"
_GENERATED = 1000  # of the project's own texts, unless told
_COLUMNS = ("text", "prompt", "question", "sentence", "context")
# What a row may know about its text, for whoever trains or tests on its sound.
_KEPT = (
    "answer",
    "translation",
    "target_language",
    "prompt",
    "label",
    "labels",
    "category",
    "hazard",
    "split",
)


@dataclass(frozen=True)
class Spoken:
    """A text to be said, where it is from, and what else its row knows."""

    id: str
    text: str
    fields: dict[str, object] = field(default_factory=dict)


def load_texts(
    where: str,
    column: str = "",
    data_root: Path | None = None,
    split: str = "all",
    limit: int = 0,
    seed: int = 0,
) -> list[Spoken]:
    """Texts in a fixed order, at most `limit` (0: all).

    where: a .txt file (a text per line), a .jsonl or .csv file, the name of a dataset in
    `core_llm.data.sources`, "phrases" or "questions" (generated from `seed`; the latter are about a described
    scene, which becomes the prompt). column: which field is read aloud; without it the first of text, prompt,
    question, sentence, context that there is. Raises `DataError` that names the file and row.
    """
    if limit < 0:
        raise UserError("--limit must be 0 or more")
    if where in (PHRASES, QUESTIONS):
        return _generated(where, limit or _GENERATED, seed)
    if where.partition(":")[0] in sources.SOURCES:
        rows = sources.load(where, data_root, split, limit or None)
        found = [_spoken(row.id, row.fields, column, f"{where}: {row.id}") for row in rows]
    else:
        found = _from_file(Path(where), column)
    texts = [text for text in found if text.text]
    if not texts:
        raise DataError(f"{where}: holds no text to read aloud")
    repeated = {text.id for text in texts}
    if len(repeated) < len(texts):
        raise DataError(f"{where}: two rows have the same 'id'; make them different, or leave ids out")
    return texts[: limit or None]


def _generated(kind: str, n: int, seed: int) -> list[Spoken]:
    from speech_adapter.corpus import question_about_scene

    rng = random.Random(seed)
    if kind == PHRASES:
        return [Spoken(f"{kind}-{seed}-{i}", spoken_phrase(rng)) for i in range(n)]
    found = []
    for i in range(n):
        text, prompt, answer = question_about_scene(rng)
        found.append(Spoken(f"{kind}-{seed}-{i}", text, {"prompt": prompt, "answer": answer}))
    return found


def _from_file(path: Path, column: str) -> list[Spoken]:
    if not path.is_file():
        known = f"{PHRASES}, {QUESTIONS}, a .txt, .jsonl or .csv file, {', '.join(sources.SOURCES)}"
        raise DataError(f"{path}: no such file or dataset; known: {known}")
    if path.suffix in (".jsonl", ".csv"):
        return [
            _spoken(str(row.get("id") or f"{path.stem}-{i}"), row, column, f"{path}: row {i + 1}")
            for i, row in enumerate(read_rows(path))
        ]
    if path.suffix != ".txt":
        raise DataError(f"{path}: give a .txt, .jsonl or .csv file")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    return [Spoken(f"{path.stem}-{i}", " ".join(line.split())) for i, line in enumerate(lines)]


def _spoken(identity: str, row: dict[str, object], column: str, place: str) -> Spoken:
    key = column or next((name for name in _COLUMNS if row.get(name)), "")
    if key not in row:
        what = f"no field '{column}'" if column else "no text"
        raise DataError(f"{place}: {what} (it has {', '.join(map(str, row))}); choose one with --field")
    text = row[key]
    if text is not None and not isinstance(text, str):
        raise DataError(f"{place}: '{key}' is not text")
    kept = {name: row[name] for name in _KEPT if name != key and row.get(name) not in (None, "")}
    return Spoken(identity, " ".join((text or "").split()), kept)
