"""Recorded speech for the dataset registry: digits, read books, read sentences, translated sentences.

Every row has "audio" (a path, or encoded bytes), "text" (what is said) and "language" (a code such as "de");
translated ones also "translation" and "target_language". The hub's rows do not say which part they are of:
the registry adds that. Local folders are laid out as the public archives
are when unpacked, one below the other or beside each other.
"""

import csv
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from core_llm.data.phrases import DIGITS
from core_llm.data.rows import Row, Source, declared_split


def _fsdd_row(identity: str, digit: int, speaker: str, audio: Path | bytes, split: str | None = None) -> Row:
    fields = {"text": DIGITS[digit], "digit": digit, "speaker": speaker, "audio": audio, "language": "en"}
    return Row(f"fsdd-{identity}", speaker, fields, split)


def _fsdd_local(folder: Path) -> Iterator[Row]:
    for path in sorted(folder.rglob("*.wav")):
        digit, speaker, _ = path.stem.split("_")
        yield _fsdd_row(path.stem, int(digit), speaker, path)


def _fsdd_hub(rows: Iterable[dict[str, Any]], split: str) -> Iterator[Row]:
    for i, row in enumerate(rows):
        stem = Path(row["audio"]["path"] or "").stem
        parts = stem.split("_")
        if len(parts) == 3 and parts[0].isdigit():
            yield _fsdd_row(stem, int(parts[0]), parts[1], row["audio"]["bytes"])
        else:  # a copy without the original file names knows no speakers: its own split must do
            audio = row["audio"]["bytes"]
            yield _fsdd_row(
                f"{split}-{i}", int(row["label"]), f"{split}-unknown", audio, declared_split(split)
            )


def _part(name: str) -> str | None:
    """The split that a part such as "train-clean-100" or "validation.other" belongs to."""
    return declared_split(name.replace(".", "-").partition("-")[0])


def _librispeech_local(folder: Path) -> Iterator[Row]:
    """PART/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt with one line per .flac beside it."""
    transcripts = sorted(folder.rglob("*.trans.txt"))
    if not transcripts:
        raise FileNotFoundError("no chapter folder with a *.trans.txt")
    for path in transcripts:
        part = path.parents[2].name
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip():
                identity, _, text = line.partition(" ")
                audio = path.with_name(f"{identity}.flac")
                yield _librispeech_row(identity, text, path.parents[1].name, audio, part)


def _librispeech_row(identity: str, text: str, speaker: str, audio: Path | bytes, part: str) -> Row:
    # The transcripts are in capitals; no core writes so.
    fields = {
        "text": text.strip().lower(),
        "speaker": speaker,
        "audio": audio,
        "language": "en",
        "part": part,
    }
    return Row(f"librispeech-{identity}", speaker, fields, _part(part))


def _librispeech_hub(rows: Iterable[dict[str, Any]], split: str) -> Iterator[Row]:
    for row in rows:
        yield _librispeech_row(
            str(row["id"]), row["text"], str(row["speaker_id"]), row["audio"]["bytes"], split
        )


def _tsv(path: Path, columns: list[str] | None = None) -> Iterator[dict[str, str]]:
    """Rows of a table whose quotation marks are text."""
    with open(path, encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file, columns, delimiter="\t", quoting=csv.QUOTE_NONE)


_TABLES = ("train", "dev", "test")


def _common_voice_local(folder: Path) -> Iterator[Row]:
    """LANGUAGE/{train,dev,test}.tsv beside LANGUAGE/clips, at any depth."""
    tables = [path for name in _TABLES for path in sorted(folder.rglob(f"{name}.tsv"))]
    if not tables:
        raise FileNotFoundError("no LANGUAGE/train.tsv, dev.tsv or test.tsv")
    for path in tables:
        for row in _tsv(path):
            audio = path.parent / "clips" / row["path"]
            yield _common_voice_row(row, row.get("locale") or path.parent.name, audio, path.stem)


def _common_voice_hub(rows: Iterable[dict[str, Any]], split: str) -> Iterator[Row]:
    for row in rows:
        if _part(split):  # "invalidated" and "other" hold what nobody has checked
            yield _common_voice_row(row, row["locale"], row["audio"]["bytes"], split)


def _common_voice_row(row: dict[str, Any], language: str, audio: Path | bytes, split: str) -> Row:
    identity = Path(str(row["path"])).stem
    fields = {"text": row["sentence"].strip(), "audio": audio, **_language(language)}
    return Row(f"common_voice-{identity}", str(row["client_id"]), fields, declared_split(split))


_FLEURS_COLUMNS = ["id", "file", "raw", "text", "characters", "samples", "gender"]


def _fleurs_local(folder: Path) -> Iterator[Row]:
    """LANGUAGE/{train,dev,test}.tsv (no header) and LANGUAGE/audio/{train,dev,test}/*.wav, at any depth.

    All languages say the same sentences: where en_us is there too, the others get its text as translation.
    """
    tables = [path for name in _TABLES for path in sorted(folder.rglob(f"{name}.tsv"))]
    if not tables:
        raise FileNotFoundError("no LANGUAGE/train.tsv, dev.tsv or test.tsv")
    english: dict[str, str] = {}
    for path in tables:
        if path.parent.name == "en_us":
            english.update((row["id"], row["raw"].strip()) for row in _tsv(path, _FLEURS_COLUMNS))
    for path in tables:
        for row in _tsv(path, _FLEURS_COLUMNS):
            audio = path.parent / "audio" / path.stem / row["file"]
            yield _fleurs_row(row["id"], row["raw"], path.parent.name, audio, path.stem, english)


def _fleurs_hub(rows: Iterable[dict[str, Any]], split: str) -> Iterator[Row]:
    for row in rows:
        yield _fleurs_row(str(row["id"]), row["raw_transcription"], "", row["audio"]["bytes"], split, {})


def _fleurs_row(
    sentence: str, text: str, subset: str, audio: Path | bytes, split: str, english: dict[str, str]
) -> Row:
    name = audio.stem if isinstance(audio, Path) else hashlib.sha256(audio).hexdigest()[:16]
    fields: dict[str, Any] = {"text": text.strip(), "audio": audio, "part": split, **_language(subset)}
    if sentence in english and subset != "en_us":
        fields |= {"translation": english[sentence], "target_language": "en"}
    return Row(f"fleurs-{subset}-{name}", sentence, fields, declared_split(split))


def _covost_local(folder: Path) -> Iterator[Row]:
    """covost_v2.SOURCE_TARGET.{train,dev,test}.tsv; clips of Common Voice under SOURCE/clips or clips.

    They are looked for beside the tables, and in the folder common_voice beside this one.
    """
    tables = sorted(folder.rglob("covost_v2.*_*.*.tsv"))
    if not tables:
        raise FileNotFoundError("no covost_v2.SOURCE_TARGET.SPLIT.tsv")
    known: dict[str, Path] = {}
    for path in tables:
        _, pair, split = path.stem.split(".")
        language = pair.partition("_")[0]
        if language not in known:
            known[language] = _clips(path.parent, folder, language)
        for row in _tsv(path):
            yield _covost_row(row, pair, known[language] / row["path"], split)


def _clips(beside: Path, folder: Path, language: str) -> Path:
    places = [beside / language / "clips", beside / "clips", folder / language / "clips"]
    places += sorted((folder.parent / "common_voice").rglob(f"{language}/clips"))
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(f"no folder {language}/clips with the recordings of Common Voice")


def _covost_hub(rows: Iterable[dict[str, Any]], split: str) -> Iterator[Row]:
    for row in rows:
        yield _covost_row({**row, "path": row["file"]}, "", row["audio"]["bytes"], split)


def _covost_row(row: dict[str, Any], pair: str, audio: Path | bytes, split: str) -> Row:
    fields = {
        "text": row["sentence"].strip(),
        "translation": row["translation"].strip(),
        "audio": audio,
        "part": split,
        **_languages(pair),
    }
    identity = Path(str(row["path"])).stem
    return Row(f"covost2-{pair}-{identity}", str(row["client_id"]), fields, declared_split(split))


def _mls_local(folder: Path) -> Iterator[Row]:
    """mls_LANGUAGE/{train,dev,test}/transcripts.txt: id, tab, text; audio/SPEAKER/BOOK/ID.flac, or .opus."""
    tables = [path for name in _TABLES for path in sorted(folder.rglob(f"{name}/transcripts.txt"))]
    if not tables:
        raise FileNotFoundError("no mls_LANGUAGE/test/transcripts.txt")
    for path in tables:
        language = path.parents[1].name.removeprefix("mls_")
        for line in path.read_text(encoding="utf-8").splitlines():
            identity, _, text = line.partition("\t")
            if text:
                speaker, book, _ = identity.split("_")
                audio = path.parent / "audio" / speaker / book / f"{identity}.flac"
                if not audio.exists() and audio.with_suffix(".opus").exists():
                    audio = audio.with_suffix(".opus")
                yield _mls_row(identity, text, speaker, language, audio, path.parent.name)


def _mls_hub(rows: Iterable[dict[str, Any]], split: str) -> Iterator[Row]:
    for row in rows:
        speaker, audio = str(row["speaker_id"]), row["audio"]["bytes"]
        # "9_hours" and "1_hours" repeat rows of "train".
        if split in _TABLES:
            yield _mls_row(str(row["id"]), row["transcript"], speaker, "", audio, split)


def _mls_row(identity: str, text: str, speaker: str, language: str, audio: Path | bytes, split: str) -> Row:
    fields = {"text": text.strip(), "speaker": speaker, "audio": audio, "part": split, **_language(language)}
    return Row(f"mls-{language}-{identity}", speaker, fields, declared_split(split))


def _language(subset: str) -> dict[str, str]:
    return {"language": subset, "subset": subset}


def _languages(pair: str) -> dict[str, str]:
    source, _, target = pair.partition("_")
    return {"language": source, "target_language": target, "subset": pair}


# Names, columns and licences on the hub were read from the dataset cards, except where a comment says less.
SPEECH = (
    Source(
        name="fsdd",
        title="Free Spoken Digit Dataset",
        licence="CC BY-SA 4.0",
        homepage="https://github.com/Jakobovski/free-spoken-digit-dataset",
        hub=("mteb/free-spoken-digit-dataset", None),
        dev_fraction=0.2,
        read_local=_fsdd_local,
        read_hub=_fsdd_hub,
    ),
    Source(
        name="librispeech",
        title="LibriSpeech",
        licence="CC BY 4.0",
        homepage="https://www.openslr.org/12",
        hub=("openslr/librispeech_asr", "all"),
        dev_fraction=0.02,
        read_local=_librispeech_local,
        read_hub=_librispeech_hub,
    ),
    Source(
        name="common_voice",
        title="Common Voice",
        licence="CC0 1.0",
        homepage="https://commonvoice.mozilla.org/datasets",
        # The project's own copy is gated. Of this one the parts are confirmed, the columns are not.
        hub=("fixie-ai/common_voice_17_0", "en"),
        dev_fraction=0.02,
        read_local=_common_voice_local,
        read_hub=_common_voice_hub,
        subset_fields=_language,
    ),
    Source(
        name="fleurs",
        title="FLEURS",
        licence="CC BY 4.0",
        homepage="https://huggingface.co/datasets/google/fleurs",
        hub=("google/fleurs", "en_us"),
        dev_fraction=0.1,
        read_local=_fleurs_local,
        read_hub=_fleurs_hub,
        revision="refs/convert/parquet",  # the main branch is a program, which `datasets` no longer runs
        subset_fields=_language,
    ),
    Source(
        name="mls",
        title="Multilingual LibriSpeech",
        licence="CC BY 4.0",
        homepage="https://www.openslr.org/94",
        hub=("facebook/multilingual_librispeech", "german"),
        dev_fraction=0.02,
        read_local=_mls_local,
        read_hub=_mls_hub,
        subset_fields=_language,
    ),
    Source(
        name="covost2",
        title="CoVoST 2",
        licence="CC BY-NC 4.0 (translations, as its card says); the recordings are CC0 1.0",
        homepage="https://github.com/facebookresearch/covost",
        hub=("fixie-ai/covost2", "en_de"),
        dev_fraction=0.02,
        read_local=_covost_local,
        read_hub=_covost_hub,
        subset_fields=_languages,
    ),
)
