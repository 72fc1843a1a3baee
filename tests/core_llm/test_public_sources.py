"""Datasets of pictures, speech and requests: hub rows have the fields of local ones; hub copies on disk."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from core_llm.data import sources
from core_llm.errors import DataError

PNG = {"bytes": b"picture", "path": "a.png"}
HUB_ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "textvqa": (
        "validation",
        {"image_id": "i1", "question_id": 7, "question": "what?", "answers": ["a", "b"], "image": PNG},
    ),
    "docvqa": (
        "validation",
        {
            "questionId": "7",
            "question": "what?",
            "answers": ["a"],
            "ucsf_document_id": "x",
            "ucsf_document_page_no": "1",
            "image": PNG,
        },
    ),
    "chartqa": ("test", {"type": "human_test", "question": "what?", "answer": "3", "image": PNG}),
    "xstest": (
        "train",
        {"id": 1, "prompt": "p", "type": "homonyms", "label": "safe", "focus": "kill", "note": ""},
    ),
    "hatecheck": (
        "test",
        {"functionality": "f", "case_id": 3, "test_case": "t", "label_gold": "hateful", "templ_id": 9},
    ),
    "strongreject": ("train", {"prompt": "p", "category": "Violence", "source": "own"}),
    "harmbench": ("train", {"prompt": "p", "category": "illegal"}),
}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One row of each dataset as its authors publish it."""
    sign = {"image_id": "i1", "question_id": 7, "question": "what?", "answers": ["a", "b"]}
    write(tmp_path / "textvqa" / "TextVQA_0.5.1_val.json", json.dumps({"data": [sign]}))
    page = {"questionId": 7, "question": "what?", "answers": ["a"], "image": "documents/x_1.png"}
    page |= {"ucsf_document_id": "x", "ucsf_document_page_no": "1"}
    unanswered = {key: value for key, value in page.items() if key != "answers"}
    write(tmp_path / "docvqa" / "val_v1.0_withQT.json", json.dumps({"data": [page]}))
    write(tmp_path / "docvqa" / "test_v1.0.json", json.dumps({"data": [unanswered]}))
    chart = {"imgname": "c.png", "query": "what?", "label": "3"}
    write(tmp_path / "chartqa" / "test" / "test_human.json", json.dumps([chart]))
    write(tmp_path / "chartqa" / "test" / "test_augmented.json", json.dumps([]))
    header = "id,prompt,type,label,focus,note\n"
    write(tmp_path / "xstest" / "xstest_prompts.csv", f"{header}1,p,homonyms,safe,kill,\n")
    header = "functionality,case_id,test_case,label_gold,templ_id\n"
    write(tmp_path / "hatecheck" / "test_suite_cases.csv", f"{header}f,3,t,hateful,9\n")
    header = "category,source,forbidden_prompt\n"
    write(tmp_path / "strongreject" / "strongreject_dataset.csv", f"{header}Violence,own,p\n")
    header = "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
    write(tmp_path / "harmbench" / "harmbench_behaviors_text_all.csv", f"{header}p,standard,illegal,,,b\n")
    return tmp_path


@pytest.mark.parametrize("name", HUB_ROWS)
def test_hub_rows_have_the_fields_of_local_ones(name: str, root: Path) -> None:
    split, row = HUB_ROWS[name]
    (hub,) = sources.SOURCES[name].read_hub([row], split)
    (local,) = sources.load(name, root, "dev")
    assert {key: value for key, value in hub.fields.items() if key != "image"} == {
        key: value for key, value in local.fields.items() if key != "image"
    }
    if "image" in hub.fields:
        assert hub.fields["image"] == b"picture" and isinstance(local.fields["image"], Path)
    assert hub.split == local.split


def test_a_copy_of_a_hub_repository_is_read_part_by_part(tmp_path: Path) -> None:
    row = {"id": "1_2_3", "speaker_id": "1", "transcript": "ein Wort", "audio": {"bytes": b"s", "path": "a"}}
    for part, split in (("german", "test"), ("german", "9_hours"), ("french", "dev")):
        path = tmp_path / "mls" / part / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    rows = sources.load("mls", tmp_path, "all")
    assert [(r.fields["language"], r.fields["part"]) for r in rows] == [("french", "dev"), ("german", "test")]
    (german,) = sources.load("mls:german", tmp_path, "dev")
    assert german.fields["audio"] == b"s" and german.fields["text"] == "ein Wort"


def test_a_parquet_file_that_is_none_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "ai2d" / "data" / "test-00000-of-00001.parquet", "no parquet")
    with pytest.raises(DataError, match="ai2d: cannot be read as AI2D"):
        sources.load("ai2d", tmp_path, "all")


def test_columns_that_are_missing_are_named(tmp_path: Path) -> None:
    path = tmp_path / "mmmu" / "data" / "validation-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"id": "validation_Art_1"}]), path)
    with pytest.raises(DataError, match="question_type"):
        sources.load("mmmu", tmp_path, "all")
