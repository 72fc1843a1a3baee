"""Datasets from a folder, symbolic scenes, packing."""

import json
import random
from pathlib import Path

import pytest

from core_llm.data.packing import Document, pack
from core_llm.data.phrases import sample_conversation, spoken_phrase
from core_llm.data.scenes import (
    COLORS,
    KINDS,
    NUMBERS,
    SHAPES,
    SKILLS,
    checklist,
    describe,
    presence_questions,
    questions,
    sample_scene,
)
from core_llm.data.sources import SOURCES, load, split_of
from core_llm.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "easy_vqa"
    (folder / "images").mkdir(parents=True)
    rows = [["what color is the shape?", "red", i // 2] for i in range(200)]
    (folder / "questions.json").write_text(json.dumps(rows))
    return tmp_path


def test_splits_part_no_group_and_never_change(root: Path) -> None:
    train, dev, everything = (load("easy_vqa", root, split) for split in ("train", "dev", "all"))
    assert len(train) + len(dev) == len(everything) == 200 and dev
    assert not {row.group for row in train} & {row.group for row in dev}
    assert [split_of("fsdd", s) for s in ("george", "jackson", "lucas", "nicolas", "yweweler")] == [
        "train"
    ] * 4 + ["dev"]


def test_limit_spreads_over_the_whole(root: Path) -> None:
    ids = [row.id for row in load("easy_vqa", root, "all", limit=4)]
    assert ids == ["easy_vqa-0", "easy_vqa-50", "easy_vqa-100", "easy_vqa-150"]


def test_unknown_missing_and_malformed_datasets_say_what_to_do(root: Path) -> None:
    with pytest.raises(DataError, match="known: easy_vqa"):
        load("nope", root)
    with pytest.raises(DataError, match="known: train"):
        load("easy_vqa", root, "best")
    with pytest.raises(DataError, match="no folder 'fsdd'"):
        load("fsdd", root)
    (root / "easy_vqa" / "questions.json").write_text('[["cut off')
    with pytest.raises(DataError, match="cannot be read"):
        load("easy_vqa", root)


def test_every_source_names_its_licence_and_home() -> None:
    assert all(source.licence and source.homepage.startswith("https://") for source in SOURCES.values())


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_true_of_the_scene(kind: str) -> None:
    rng = random.Random(0)
    skills = set()
    for _ in range(500):
        scene = sample_scene(rng, kind)
        text = describe(scene, rng)
        for question in questions(scene, rng, 3):
            skills.add(question.skill)
            words = question.text.rstrip("?.").split()
            if question.skill == "presence":
                value = next(
                    w
                    for w in words
                    if any(w in (i.color, i.shape) for i in scene.items) or w in COLORS_AND_SHAPES
                )
                there = any(value in (i.color, i.shape) for i in scene.items)
                negated = "not" in words or "no" in words
                assert question.answer == ("yes" if there != negated else "no")
            elif question.skill == "count":
                noun = words[words.index("many") + 1 : words.index("are")]
                n = sum(
                    all(w == "shapes" or w.rstrip("s") == i.shape or w == i.color for w in noun)
                    for i in scene.items
                )
                assert question.answer == NUMBERS[n]
            else:
                assert all(word in text for word in question.answer.split())
    assert skills <= set(SKILLS)


COLORS_AND_SHAPES = {*COLORS, *SHAPES}


def test_same_seed_gives_the_same_texts() -> None:
    def texts(seed: int) -> list[str]:
        rng = random.Random(seed)
        return [spoken_phrase(rng) for _ in range(20)] + [m.text for m in sample_conversation(rng)]

    assert texts(1) == texts(1) != texts(2)


def test_packing_keeps_documents_whole_and_apart() -> None:
    documents = [Document([i] * n, [1.0] * n) for i, n in enumerate([5, 4, 3, 2, 30], start=1)]
    packed = pack(documents, width=10, windows=3, pad_id=0)
    kept = sorted(packed.tokens[packed.tokens > 0].tolist())
    assert kept == sorted([1] * 5 + [2] * 4 + [3] * 3 + [4] * 2 + [5] * 10)
    for tokens, numbers in zip(packed.tokens, packed.documents):
        for number in set(numbers.tolist()) - {0}:
            assert len(set(tokens[numbers == number].tolist())) == 1
    starts = (packed.documents[:, 1:] != packed.documents[:, :-1]) & (packed.documents[:, 1:] > 0)
    assert (packed.weights[:, 1:][starts] == 0).all() and (packed.weights[:, 0] == 0).all()


def test_packing_an_endless_stream_ends() -> None:
    def endless():  # type: ignore[no-untyped-def]
        while True:
            yield Document([1] * 7, [1.0] * 7)

    assert pack(endless(), width=10, windows=4, pad_id=0).tokens.sum() == 28


def test_hub_rows_become_the_same_fields_as_local_ones() -> None:
    audio = {"path": "7_theo_3.wav", "bytes": b"RIFF"}
    (row,) = SOURCES["fsdd"].read_hub([{"audio": audio, "label": 7}], "train")
    assert (row.id, row.group, row.fields["text"]) == ("fsdd-7_theo_3", "theo", "seven")
    (nameless,) = SOURCES["fsdd"].read_hub([{"audio": {"path": None, "bytes": b"R"}, "label": 2}], "test")
    assert nameless.split == "dev" and nameless.fields["text"] == "two"
    hate = SOURCES["hate_speech"].read_hub([{"tweet": "hello", "class": 2}], "train")
    assert next(iter(hate)).fields == {"text": "hello", "label": 2}
    moderation = SOURCES["openai_moderation"].read_hub([{"prompt": "x", "H": 1, "S": 0}], "train")
    assert next(iter(moderation)).fields["label"] == 1


def test_checklist_tells_the_truth_about_everything_that_is_asked() -> None:
    rng = random.Random(3)
    for _ in range(200):
        scene = sample_scene(rng, "several")
        asked = presence_questions(scene, rng)
        entries = dict(entry.split(": ") for entry in checklist(scene, asked, rng).rstrip(".").split(", "))
        present = {value for item in scene.items for value in (item.color, item.shape)}
        assert all((said == "yes") == (value in present) for value, said in entries.items())
        assert all(
            word in entries for q in asked for word in q.text.rstrip("?").split() if word in COLORS_AND_SHAPES
        )
