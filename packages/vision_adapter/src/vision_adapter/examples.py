"""Pictures with text from wherever they are: a registered dataset, a folder, a `datasets` folder or the hub.

Decoding is left to who needs the pixels. The same readers serve training and curation.
"""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core_llm.chat import Image, Message, Text
from core_llm.data import sources
from core_llm.data.tables import entries, held_out
from core_llm.errors import DataError
from vision_adapter.images import Picture

TABLES = ("captions.jsonl", "captions.csv", "metadata.jsonl", "metadata.csv")
_CAPTION_COLUMNS = ("caption", "text", "captions")
SCENES = "scenes"  # drawn by the project: needs no data
MARK = "<image>"  # in a question: here stands the next picture


@dataclass(frozen=True, eq=False)
class Example:
    """A picture, or several, and what is said about it.

    turns: questions with their answers; a caption is the answer to an empty question. rejected: a worse
    answer to the last question, where the data hold preferences. others: the pictures after the first.
    """

    id: str
    image: Picture
    turns: tuple[tuple[str, str], ...]
    rejected: str | None = None
    others: tuple[Picture, ...] = ()

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All of them, in order."""
        return (self.image, *self.others)

    @property
    def caption(self) -> str:
        """All answers: what the text says of the picture."""
        return " ".join(answer for _, answer in self.turns)

    def conversation(self, last: str | None = None) -> list[Message]:
        """As messages: pictures first, several at their marks if any. `last` replaces the last answer."""
        messages: list[Message] = []
        left = iter(self.pictures)
        marked = bool(self.others) and any(MARK in question for question, _ in self.turns)
        for n, (question, answer) in enumerate(self.turns):
            parts: list[Any] = [Image(picture) for picture in left] if n == 0 and not marked else []
            parts += _marked(question, left) if marked else [Text(question)] if question else []
            final = last is not None and n == len(self.turns) - 1
            messages += [Message("user", parts), Message("assistant", last if final else answer)]  # type: ignore[arg-type]
        return messages


def _marked(question: str, pictures: Iterator[Picture]) -> Iterator[Image | Text]:
    """A question with its marks replaced by the next pictures; blanks around a mark go with it."""
    for n, piece in enumerate(question.split(MARK)):
        if n:
            yield Image(next(pictures))
        if piece.strip():
            yield Text(piece.strip())


def only_pairs(examples: Sequence[Example], what: str) -> None:
    """Raise `DataError` that names an example with several pictures; `what` reads one with its text."""
    several = next((example.id for example in examples if example.others), None)
    if several is not None:
        raise DataError(f"{several}: has several pictures; {what} reads pairs of one picture and its text")


def load_examples(where: str, data_root: Path | None = None, split: str = "train") -> list[Example]:
    """Examples in a fixed order.

    where: "scenes"; the name of a dataset in `core_llm.data.sources`; a folder with pictures and a table
    (`TABLES`, one row per text); a folder written by `datasets`' save_to_disk; or a hub id. A row has "image"
    (or "file_name", relative to the table) and one of: "caption" or "text"; "question" and "answer"; "turns";
    LLaVA's "conversations"; and with a question "chosen" and "rejected". In a table a row may have "images"
    instead, a list: its questions then have as many marks "<image>", or none, and the pictures come first.
    A row may say its "split"; else one in twenty is held out, rows about the same file together.
    Raises `DataError` that names the file and row which cannot be read.
    """
    if where == SCENES:
        sizes = {"train": 2000, "dev": 200}
        parts = sizes if split == "all" else [split]
        return [example for part in parts for example in scene_examples(sizes[part], f"{part} examples")]
    if where in sources.SOURCES:
        listed = sources.load(where, data_root, split)
        return [_example(row.id, row.fields, f"{where}: {row.id}") for row in listed]
    found = entries(where, "image", TABLES)
    if found is None:
        known = ", ".join((SCENES, *(n for n, s in sources.SOURCES.items() if n in _WITH_PICTURES)))
        raise DataError(f"unknown data '{where}'; known: {known}, a folder, or a hub id such as org/name")
    rows = list(found)
    everything = [_example(entry.id, entry.fields, entry.place) for entry in rows]
    declared = [str(entry.fields.get("split") or "") for entry in rows]
    times = Counter(str(each.image) for each in everything if isinstance(each.image, Path))

    def group(each: Example) -> str:  # by its name: the same split wherever the folder lies
        return Path(str(each.image)).name if times[str(each.image)] > 1 else each.id

    def is_dev(each: Example, named: str) -> bool:  # test rows too: they are not trained on
        return not named.startswith("train") if named else held_out(group(each))

    pairs = zip(everything, declared, strict=True)
    chosen = [each for each, named in pairs if split == "all" or is_dev(each, named) == (split == "dev")]
    if not everything or (split == "train" and not chosen):
        raise DataError(f"{where}: holds no pictures with text")
    return chosen


def train_and_held_out(where: str, data_root: Path | None = None) -> tuple[list[Example], list[Example]]:
    """Both splits of `load_examples`; nothing is held out of a dataset that has no such split."""
    train = load_examples(where, data_root, "train")
    try:
        return train, load_examples(where, data_root, "dev")
    except DataError:
        return train, []


_WITH_PICTURES = ("easy_vqa", "coco_captions", "vqav2", "llava_instruct")


def _example(identity: str, row: Mapping[str, Any], place: str) -> Example:
    several = row.get("images")  # of a table; a column of a dataset that is called so may be anything
    listed = isinstance(several, list) and all(isinstance(picture, Path) for picture in several)
    pictures: Sequence[Picture] = (several if listed else None) or [row["image"]]
    try:
        turns = _turns(row)
    except (TypeError, ValueError, KeyError) as error:
        raise DataError(
            f"{place}: 'turns' are pairs of question and answer, 'conversations' objects with a 'value'"
        ) from error
    if not turns:
        columns = ", ".join(str(key) for key in row if key != "image")
        raise DataError(f"{place}: no caption, question with answer, or conversation (it has {columns})")
    marks = sum(question.count(MARK) for question, _ in turns)
    if len(pictures) == 1:  # it comes first, wherever its mark stands
        turns = tuple((q.replace(MARK, "").strip() if MARK in q else q, answer) for q, answer in turns)
    elif marks not in (0, len(pictures)):
        raise DataError(f"{place}: {len(pictures)} images, but {marks} marks {MARK} in the questions")
    rejected = row.get("rejected")
    return Example(
        identity, pictures[0], turns, None if rejected is None else str(rejected), tuple(pictures[1:])
    )


def _turns(row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    question = str(row.get("question") or row.get("prompt") or "")
    answer = row.get("answer") if row.get("chosen") is None else row["chosen"]
    if answer is not None:
        return ((question, str(answer)),)
    if row.get("turns"):
        return tuple((str(asked), str(said)) for asked, said in row["turns"])
    if row.get("conversations"):
        said = [str(turn["value"]).strip() for turn in row["conversations"]]
        answers = (text.replace(MARK, "").strip() for text in said[1::2])
        return tuple(zip(said[::2], answers, strict=False))
    for column in _CAPTION_COLUMNS:
        value = row.get(column)
        if isinstance(value, Sequence) and not isinstance(value, str) and value:
            value = value[0]  # some datasets hold several captions per picture
        if isinstance(value, str) and value.strip():
            return (("", value.strip()),)
    return ()


def scene_examples(n: int, seed: str, size: int = 64) -> list[Example]:
    """n drawn scenes: one in two described, the others asked about, with a wrong answer of the same kind."""
    from core_llm.data.scenes import questions, sample_scene
    from vision_adapter.samples import ordered_description
    from vision_adapter.scenes import draw

    rng = random.Random(seed)
    found = []
    for i in range(n):
        scene, other = sample_scene(rng, "single"), sample_scene(rng, "single")
        picture = draw(scene, rng, size)
        if i % 2:
            wrong = ordered_description(other)
            turn = ("", ordered_description(scene))
        else:
            question = questions(scene, rng, 1)[0]
            wrong = _another_answer(question.answer, rng)
            turn = (question.text, question.answer)
        found.append(Example(f"scene-{seed}-{i}", picture, (turn,), wrong))
    return found


def _another_answer(answer: str, rng: random.Random) -> str:
    from core_llm.data.scenes import COLORS, COLUMNS, ROWS, SHAPES

    places = [f"{row} {column}" for row in ("top", "bottom") for column in ("left", "right")]
    for kind in (("yes", "no"), COLORS, SHAPES, (*ROWS, *COLUMNS, *places)):
        if answer in kind:
            return rng.choice([value for value in kind if value != answer])
    return "no"
