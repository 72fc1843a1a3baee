"""Speech datasets: tiny folders in the layouts of the public archives, and rows as the hub gives them."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from core_llm.data.sources import SOURCES, load
from core_llm.errors import DataError


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_librispeech_is_read_from_its_chapter_folders(tmp_path: Path) -> None:
    root = tmp_path / "librispeech" / "LibriSpeech"
    write(
        root / "train-clean-100/19/198/19-198.trans.txt",
        "19-198-0000 NORTHANGER ABBEY\n19-198-0001 THIS WORK\n",
    )
    write(root / "dev-other/116/288/116-288.trans.txt", "116-288-0000 SMOOTH\n")
    train, dev = (load("librispeech", tmp_path, split) for split in ("train", "dev"))
    assert [(row.id, row.group, row.fields["text"]) for row in train] == [
        ("librispeech-19-198-0000", "19", "northanger abbey"),
        ("librispeech-19-198-0001", "19", "this work"),
    ]
    assert train[1].fields["audio"] == root / "train-clean-100/19/198/19-198-0001.flac"
    assert [row.fields["text"] for row in dev] == ["smooth"] and dev[0].fields["language"] == "en"


COMMON_VOICE = "client_id\tpath\tsentence\tup_votes\tlocale\n"


def common_voice(root: Path) -> None:
    for language, said in (("de", 'Er sagte "ja'), ("en", "Yes.")):
        folder = root / "common_voice" / "cv-corpus-17.0" / language
        for split in ("train", "dev", "test"):
            name = f"common_voice_{language}_{split}"
            write(
                folder / f"{split}.tsv", f"{COMMON_VOICE}speaker-{split}\t{name}.mp3\t{said}\t2\t{language}\n"
            )
            write(folder / "clips" / f"{name}.mp3", "")


def test_common_voice_keeps_quotation_marks_and_its_own_splits(tmp_path: Path) -> None:
    common_voice(tmp_path)
    rows = load("common_voice:de", tmp_path)
    assert [row.fields["text"] for row in rows] == ['Er sagte "ja']  # a lone mark starts no quoted field
    assert rows[0].fields["language"] == "de" and rows[0].group == "speaker-train"
    assert rows[0].fields["audio"].is_file()
    assert len(load("common_voice", tmp_path, "dev")) == 4 and len(load("common_voice", tmp_path, "all")) == 6
    with pytest.raises(DataError, match="no part 'fr'; known here: de, en"):
        load("common_voice:fr", tmp_path)


def test_fleurs_gets_its_translation_from_the_english_part(tmp_path: Path) -> None:
    for language, raw in (("en_us", "A cat."), ("de_de", "Eine Katze.")):
        folder = tmp_path / "fleurs" / "data" / language
        for split, sentence in (("train", 7), ("dev", 8)):
            text = raw.lower().rstrip(".")
            row = f"{sentence}\t{language}-{split}.wav\t{raw}\t{text}\t{'|'.join(text)}\t16000\tMALE\n"
            write(folder / f"{split}.tsv", row)
    rows = load("fleurs:de_de", tmp_path)
    assert len(rows) == 1
    assert rows[0].fields == {
        "text": "Eine Katze.",
        "audio": tmp_path / "fleurs/data/de_de/audio/train/de_de-train.wav",
        "language": "de_de",
        "part": "train",
        "subset": "de_de",
        "translation": "A cat.",
        "target_language": "en",
    }
    (english,) = load("fleurs:en_us", tmp_path, "dev")
    assert "translation" not in english.fields and english.group == "8"


def test_covost_finds_the_clips_of_common_voice(tmp_path: Path) -> None:
    common_voice(tmp_path)
    header = "path\tsentence\ttranslation\tclient_id\n"
    for split in ("train", "test"):
        row = f"common_voice_de_{split}.mp3\tEr sagte ja\tHe said yes\tspeaker\n"
        write(tmp_path / "covost2" / f"covost_v2.de_en.{split}.tsv", header + row)
    (row,) = load("covost2:de_en", tmp_path)
    assert row.fields["audio"].is_file() and row.fields["translation"] == "He said yes"
    assert (row.fields["language"], row.fields["target_language"]) == ("de", "en")
    assert len(load("covost2", tmp_path, "dev")) == 1
    write(tmp_path / "covost2" / "covost_v2.fr_en.train.tsv", header)
    with pytest.raises(DataError, match="no folder fr/clips"):
        load("covost2", tmp_path)


@pytest.mark.parametrize("name", ["librispeech", "common_voice", "fleurs", "covost2"])
def test_an_empty_folder_says_what_is_missing(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=r"cannot be read as .*no "):
        load(name, tmp_path)


def test_only_datasets_in_parts_have_parts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fsdd has no parts"):
        load("fsdd:en", tmp_path)


class Table:
    """What the registry uses of a `datasets` table."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.column_names = rows, list(rows[0])

    def cast_column(self, column: str, feature: Any) -> "Table":
        assert (column, feature) == ("audio", ("Audio", False))
        return self

    def __iter__(self) -> Any:
        return iter(self.rows)


AUDIO = {"path": "x.wav", "bytes": b"RIFF"}
HUB: dict[str, tuple[dict[str, Any], str, dict[str, str]]] = {
    "librispeech": (
        {"id": "1-2-0003", "text": "HELLO YOU", "speaker_id": 1, "chapter_id": 2, "audio": AUDIO},
        "train.clean.100",
        {"text": "hello you", "language": "en"},
    ),
    "common_voice:sv-SE": (
        {"client_id": "c", "path": "a.mp3", "sentence": " Hej ", "locale": "sv-SE", "audio": AUDIO},
        "train",
        {"text": "Hej", "language": "sv-SE"},
    ),
    "fleurs:de_de": (
        {"id": 7, "raw_transcription": "Eine Katze.", "lang_id": 17, "audio": AUDIO},
        "train",
        {"text": "Eine Katze.", "language": "de_de", "subset": "de_de"},
    ),
    "covost2": (
        {
            "client_id": "c",
            "file": "a.mp3",
            "sentence": "Yes",
            "translation": "Ja",
            "id": "a",
            "audio": AUDIO,
        },
        "train",
        {"text": "Yes", "translation": "Ja", "language": "en", "target_language": "de"},
    ),
}


@pytest.mark.parametrize("name", HUB)
def test_hub_rows_have_the_fields_of_local_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row, split, expected = HUB[name]
    asked: list[tuple[Any, ...]] = []

    def load_dataset(repository: str, configuration: str | None, revision: str | None) -> dict[str, Table]:
        asked.append((repository, configuration, revision))
        return {split: Table([row]), "test.x": Table([row])}

    library = types.ModuleType("datasets")
    library.load_dataset = load_dataset  # type: ignore[attr-defined]
    library.Audio = lambda decode: ("Audio", decode)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    rows = load(name, None, "train")
    fields = rows[0].fields
    assert fields["audio"] == b"RIFF" and {key: fields[key] for key in expected} == expected
    source = SOURCES[name.partition(":")[0]]
    assert source.hub is not None
    part = name.partition(":")[2] or source.hub[1]
    assert asked == [(source.hub[0], part, source.revision)]
