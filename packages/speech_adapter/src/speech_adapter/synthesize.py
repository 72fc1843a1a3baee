"""From texts to a folder of recordings with a table: planned first, then spoken in chunks by processes.

The plan depends on texts and settings alone, and a chunk is spoken the same way in any process: the same
call gives the same folder, with any number of workers, in one go or continued after a kill.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core_llm.errors import UserError
from speech_adapter.speakers import Line, chosen_voices, speaker
from speech_adapter.synthesis import Utterance, in_processes
from speech_adapter.texts import Spoken

TABLE = "metadata.jsonl"
PLAN, PARTS, AUDIO = "synthesis.json", ".parts", "audio"
FORMATS = ("flac", "ogg")
CHUNK = 100  # lines per process and per step that an interrupted run repeats
RATE = 16_000  # Hz, of what is written
INAUDIBLE = 16  # of 32,768: what a voice that has nothing to say may still hiss


@dataclass(frozen=True)
class Settings:
    """How texts are spoken; ranges are drawn from evenly."""

    voice: str = "train"
    language: str = "en"
    speed: tuple[int, int] = (120, 220)  # words per minute
    pitch: tuple[int, int] = (15, 85)
    range: tuple[int, int] = (20, 80)  # of the pitch
    repeats: int = 1  # recordings of each text
    held_out: float = 0.05  # part of the texts that voices say which no training recording has
    format: str = "flac"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UserError(f"unknown format '{self.format}'; known: {', '.join(FORMATS)}")
        if self.repeats < 1 or not 0 <= self.held_out < 1:
            raise UserError("repeats must be at least 1, held_out from 0 to below 1")
        for name, (low, high), (least, most) in (
            ("speed", self.speed, (80, 450)),
            ("pitch", self.pitch, (0, 99)),
            ("range", self.range, (0, 99)),
        ):
            if not least <= low <= high <= most:
                raise UserError(f"{name} must be two numbers from {least} to {most}, the smaller first")


@dataclass(frozen=True)
class Planned:
    """One recording: its line and its row of the table."""

    line: Line
    row: dict[str, Any]


def plan(texts: Sequence[Spoken], settings: Settings) -> list[Planned]:
    """Which voice says which text, and how; every voice equally often, give or take one.

    Held-out voices say whole texts ("split": "dev"); the others are "train", unless a row says itself.
    """
    voices, apart = chosen_voices(settings.voice, settings.language)
    rng = random.Random(f"synthesis {settings.seed}")
    held_out = (
        set(rng.sample(range(len(texts)), round(settings.held_out * len(texts))))
        if voices and apart
        else set()
    )
    turns = {False: _turns(voices or apart, rng), True: _turns(apart, rng)}
    planned: list[Planned] = []
    for i, text in enumerate(texts):
        # A row of a dataset's own test split stays out of training, whoever says it.
        own = text.fields.get("split")
        dev = i in held_out or (own is not None and own != "train")
        for _ in range(settings.repeats):
            voice = next(turns[dev and bool(voices and apart)])
            draw = [rng.randint(*limits) for limits in (settings.speed, settings.pitch, settings.range)]
            line = Line(Utterance(text.text, voice, *draw), rng.getrandbits(31))
            row = {
                "file_name": f"{AUDIO}/{len(planned):07d}.{settings.format}",
                "id": f"{text.id}-{len(planned)}",
                "source_id": text.id,
                "language": settings.language,
                **asdict(line.utterance),
                "seed": line.seed,
                **text.fields,
            }
            if apart:
                row["split"] = "dev" if dev or not voices else "train"
            planned.append(Planned(line, row))
    return planned


def _turns(voices: Sequence[str], rng: random.Random) -> Iterator[str]:
    """All voices in a random order, then all in another one, and so on."""
    while voices:
        yield from rng.sample(list(voices), len(voices))


def synthesize(texts: Sequence[Spoken], out: Path, settings: Settings, workers: int = 2) -> dict[str, int]:
    """Write recordings and `metadata.jsonl` under `out`; the same call continues an interrupted run.

    Returns how many rows were written and how many texts gave no sound, which "silent.jsonl" lists. Raises
    `UserError` where `out` holds something else.
    """
    from tqdm import tqdm

    if workers < 1:
        raise UserError("--workers must be at least 1")
    if not texts:
        raise UserError("there is no text to read aloud")
    planned = plan(texts, settings)
    _claim(out, planned, settings)
    if not (out / TABLE).exists():
        chunks = [planned[i : i + CHUNK] for i in range(0, len(planned), CHUNK)]
        parts = out / PARTS
        todo = [(c, out, parts / f"{i:06d}.jsonl") for i, c in enumerate(chunks)]
        open_jobs = [job for job in todo if not job[2].exists()]
        done = len(planned) - sum(len(job[0]) for job in open_jobs)
        with tqdm(total=len(planned), initial=done, desc="synthesize", unit="clip", mininterval=1.0) as bar:
            for n in _spoken_by(open_jobs, workers, speaker(settings_voice(planned)).fresh):
                bar.update(n)
        _publish(out, [part for _, _, part in todo])
    silent = _count(out / "silent.jsonl")
    return {"rows": _count(out / TABLE), "silent": silent}


def settings_voice(planned: Sequence[Planned]) -> str:
    """The voice of the first line: all lines of a plan have the same kind of speaker."""
    return planned[0].line.utterance.voice


Job = tuple[Sequence[Planned], Path, Path]


def _spoken_by(jobs: Sequence[Job], workers: int, fresh: bool) -> Iterator[int]:
    """Speak chunks in any order; yields the size of each that is done."""
    if workers == 1 and not fresh:  # a neural voice keeps the memory and the device that it has
        yield from map(_speak_chunk, jobs)
    else:
        yield from in_processes(_speak_chunk, jobs, workers, fresh)


def _speak_chunk(job: Job) -> int:
    """Recordings first, then their rows, which appear by one rename: a part is whole or not there."""
    chunk, out, part = job
    rows = []
    for planned in chunk:
        samples, rate = speaker(planned.line.utterance.voice).speak(planned.line)
        row = dict(planned.row)
        samples = _resampled(samples, rate)
        if np.abs(samples.astype(np.int32)).max(initial=0) > INAUDIBLE:
            _write(out / row["file_name"], samples)
            row["seconds"] = round(len(samples) / RATE, 3)
        else:
            row["seconds"] = 0.0
        rows.append(json.dumps(row, ensure_ascii=False))
    _replace(part, "\n".join(rows) + "\n")
    return len(chunk)


def _resampled(samples: np.ndarray, rate: int) -> np.ndarray:
    if rate == RATE or not len(samples):
        return samples
    import soxr

    return soxr.resample(samples, rate, RATE)


def _write(path: Path, samples: np.ndarray) -> None:
    import soundfile

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    form = path.suffix[1:].upper()
    soundfile.write(temporary, samples, RATE, format=form, subtype="VORBIS" if form == "OGG" else "PCM_16")
    temporary.replace(path)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _claim(out: Path, planned: Sequence[Planned], settings: Settings) -> None:
    """Make the folder, or find out that it is that of the same plan."""
    digest = hashlib.sha256(json.dumps([p.row for p in planned], sort_keys=True).encode()).hexdigest()
    described = {"rows": len(planned), "plan": digest, "settings": asdict(settings)}
    written = out / PLAN
    if written.exists():
        try:
            same = json.loads(written.read_text(encoding="utf-8"))["plan"] == digest
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise UserError(f"{out}: holds recordings of other texts or settings; give another --out")
    elif out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a new folder as --out")
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: is not empty; give a new folder as --out")
    (out / AUDIO).mkdir(parents=True, exist_ok=True)
    (out / PARTS).mkdir(exist_ok=True)
    if not written.exists():
        _replace(written, json.dumps(described, indent=2) + "\n")


def _publish(out: Path, parts: Sequence[Path]) -> None:
    """All parts become the table, in the order of the plan."""
    rows = [json.loads(line) for part in parts for line in part.read_text(encoding="utf-8").splitlines()]
    silent = [row for row in rows if not row["seconds"]]
    if silent:
        _replace(out / "silent.jsonl", _lines(silent))
    _replace(out / TABLE, _lines([row for row in rows if row["seconds"]]))
    for unfinished in (out / AUDIO).glob(".*"):  # of a kill in the middle of a recording
        unfinished.unlink()
    shutil.rmtree(out / PARTS)


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _count(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0
