"""`vision-adapter curate`: read pairs, embed them (resumably), choose, and say what was dropped and why."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image as Pillow

from core_llm.errors import DataError, MediaError, UserError
from vision_adapter import curation
from vision_adapter.embeddings import PIXELS, ClipEmbedder, Embedder, PixelEmbedder, TextEmbedder
from vision_adapter.examples import Example, only_pairs
from vision_adapter.images import decode
from vision_adapter.ocr import OcrReader, RapidOcrReader, with_text

CHUNK = 256  # pairs that are embedded, and saved, together


@dataclass(frozen=True)
class CurationConfig:
    """What to drop; a step whose number is 0 is left out.

    dedup: cosine from which two pictures are duplicates. clip_score: least cosine of picture and caption.
    resample: T, captions that an n-gram may have before it is thinned out. embed: "pixels", or an open_clip
    model's name and weights joined by a colon ("ViT-B-32:openai"); also what scores the captions.
    ocr: append the text that is read in the kept pictures to their captions.
    """

    dedup: float = 0.0
    clip_score: float = 0.0
    resample: float = 0.0
    embed: str = PIXELS
    longest: int = 2  # words of an n-gram
    seed: int = 0
    ocr: bool = False

    def __post_init__(self) -> None:
        if self.clip_score and self.embed == PIXELS:
            raise UserError("--clip-score needs an open_clip model that knows texts: --embed MODEL:WEIGHTS")
        if not 0 <= self.dedup <= 1:
            raise UserError("--dedup is a cosine: 0 (keep all) to 1")
        if self.resample < 0 or self.longest < 1:
            raise UserError("--resample must not be negative, and n-grams have at least one word")


def embedder(name: str) -> Embedder:
    """The model that `CurationConfig.embed` names."""
    if name == PIXELS:
        return PixelEmbedder()
    model, _, pretrained = name.partition(":")
    return ClipEmbedder(model, pretrained)


@dataclass
class Verdicts:
    """Why pairs were dropped, by their number; the first reason counts."""

    reasons: dict[int, tuple[str, str]]

    def drop(self, number: int, reason: str, detail: str) -> None:
        """Note a reason unless there is one."""
        self.reasons.setdefault(number, (reason, detail))

    def kept(self, numbers: Sequence[int]) -> list[int]:
        """Those that nothing speaks against so far."""
        return [n for n in numbers if n not in self.reasons]


def curate(
    examples: Sequence[Example],
    out: Path,
    config: CurationConfig,
    model: Embedder | None = None,
    reader: OcrReader | None = None,
) -> dict[str, object]:
    """Choose among pairs; write `captions.jsonl`, `dropped.jsonl` and `report.json` under `out`.

    The order is the paper's: unreadable pictures, captions that do not fit, near-duplicates, frequent
    n-grams; last, text is read in the pictures that are kept. The output is itself a folder that training and
    curation read; pictures that were files stay where they are. The same call continues an interrupted run.
    model: used instead of `config.embed`. reader: used instead of RapidOCR.
    Raises `DataError` where `out` belongs to a run with other settings or data, an example has several
    pictures or there is none, `UserError` for a model without weights.
    """
    if not examples:
        raise DataError("there are no pairs to choose among")
    only_pairs(examples, "curate")
    if model is None and config.embed != PIXELS and not config.embed.partition(":")[2]:
        raise UserError(f"--embed {config.embed} names no weights; write it like ViT-B-32:openai")
    work = out / ".work"
    _claim(work, examples, config)
    numbers = list(range(len(examples)))
    verdicts = Verdicts({})
    vectors, scores = _embed(examples, work, config, model, verdicts)
    if config.clip_score:
        for n in verdicts.kept(numbers):
            if scores[n] < config.clip_score:
                verdicts.drop(n, "clip_score", f"cosine {scores[n]:.4f} of picture and caption")
    if config.dedup:
        alive = verdicts.kept(numbers)
        for n, first in zip(alive, curation.near_duplicates(vectors[alive], config.dedup), strict=True):
            if alive[first] != n:
                verdicts.drop(n, "duplicate", f"of {examples[alive[first]].id}")
    if config.resample:
        _resample(examples, verdicts, numbers, config)
    texts = _read_texts(examples, verdicts.kept(numbers), work, reader) if config.ocr else {}
    return _write(examples, out, config, verdicts, texts)


def _resample(
    examples: Sequence[Example], verdicts: Verdicts, numbers: Sequence[int], config: CurationConfig
) -> None:
    alive = verdicts.kept(numbers)
    counts = curation.ngram_counts([examples[n].caption for n in alive], config.longest)
    for n in alive:
        caption = examples[n].caption
        chance = curation.keep_probability(caption, counts, config.resample, None, config.longest)
        if not curation.drawn(examples[n].id, chance, config.seed):
            verdicts.drop(n, "frequent_ngrams", f"kept with probability {chance:.4f}")


def _claim(work: Path, examples: Sequence[Example], config: CurationConfig) -> None:
    """Make the folder of the run, or see that it is this run's."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.id}\0{example.caption}\0".encode())
    own = {"data": digest.hexdigest(), **asdict(config)}
    path = work / "settings.json"
    if path.is_file():
        try:
            known = json.loads(path.read_text())
        except ValueError:
            known = None
        if known != own:
            raise DataError(f"{work.parent}: holds a run with other settings or data; give another folder")
        return
    if (work.parent / "captions.jsonl").exists():
        raise DataError(f"{work.parent}: already holds captions.jsonl; give another folder")
    work.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(own))
    os.replace(temporary, path)


def _embed(
    examples: Sequence[Example],
    work: Path,
    config: CurationConfig,
    model: Embedder | None,
    verdicts: Verdicts,
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors [N, D] of all pictures and their scores [N] (zero without a filter), chunk by chunk."""
    from tqdm import tqdm

    vectors: list[np.ndarray] = []
    scores: list[np.ndarray] = []
    with tqdm(total=len(examples), desc="curate", unit="pair", mininterval=2.0) as bar:
        for start in range(0, len(examples), CHUNK):
            part = examples[start : start + CHUNK]
            path = work / f"{start:09}.npz"
            if not path.is_file():
                model = model or embedder(config.embed)
                _embed_chunk(part, path, model, bool(config.clip_score))
            with np.load(path, allow_pickle=False) as saved:
                vectors.append(saved["vectors"])
                scores.append(saved["scores"])
                for i, error in zip(saved["bad"].tolist(), saved["errors"].tolist(), strict=True):
                    verdicts.drop(start + i, "unreadable", error)
            bar.update(len(part))
    width = max(part.shape[1] for part in vectors)  # of a chunk without a readable picture it is not known
    wide = [part if part.shape[1] == width else np.zeros((len(part), width), np.float32) for part in vectors]
    return np.concatenate(wide), np.concatenate(scores)


def _embed_chunk(part: Sequence[Example], path: Path, model: Embedder, with_scores: bool) -> None:
    pictures: list[Pillow.Image] = []
    good: list[int] = []
    bad: dict[int, str] = {}
    for i, example in enumerate(part):
        try:
            pictures.append(decode(example.image))
            good.append(i)
        except MediaError as error:
            bad[i] = str(error)
    found = model.images(pictures) if good else np.zeros((0, 1), np.float32)
    vectors = np.zeros((len(part), found.shape[1]), np.float32)
    vectors[good] = found
    scores = np.zeros(len(part), np.float32)
    if with_scores and good:
        texts: TextEmbedder = model  # type: ignore[assignment]
        scores[good] = curation.clip_scores(found, texts.texts([part[i].caption for i in good]))
    temporary = path.with_suffix(".tmp.npz")
    errors = np.array(list(bad.values()), dtype=np.str_)
    np.savez(temporary, vectors=vectors, scores=scores, bad=np.array(list(bad), np.int64), errors=errors)
    os.replace(temporary, path)


def _is_caption(example: Example) -> bool:
    return len(example.turns) == 1 and not example.turns[0][0]


def _read_texts(
    examples: Sequence[Example], numbers: Sequence[int], work: Path, reader: OcrReader | None
) -> dict[int, list[str]]:
    """Lines of text by the number of the pair, chunk by chunk; answers to questions are left as they are."""
    from tqdm import tqdm

    wanted = [n for n in numbers if _is_caption(examples[n])]
    found: dict[int, list[str]] = {}
    with tqdm(total=len(wanted), desc="read", unit="picture", mininterval=2.0) as bar:
        for start in range(0, len(wanted), CHUNK):
            part = wanted[start : start + CHUNK]
            path = work / f"ocr-{start:09}.json"
            if not path.is_file():
                reader = reader or RapidOcrReader()
                lines = [reader.lines(decode(examples[n].image)) for n in part]
                temporary = path.with_suffix(".tmp")
                temporary.write_text(json.dumps(lines), encoding="utf-8")
                os.replace(temporary, path)
            found |= dict(zip(part, json.loads(path.read_text(encoding="utf-8")), strict=True))
            bar.update(len(part))
    return {n: lines for n, lines in found.items() if lines}


def _write(
    examples: Sequence[Example],
    out: Path,
    config: CurationConfig,
    verdicts: Verdicts,
    texts: Mapping[int, list[str]],
) -> dict[str, object]:
    """The three files; `captions.jsonl` last, because it says that the run is complete."""
    kept = verdicts.kept(range(len(examples)))
    table = out / "captions.jsonl.tmp"
    with open(table, "w", encoding="utf-8") as file:
        for n in kept:
            example = examples[n]
            row: dict[str, object] = {"id": example.id, "image": _image_name(example, n, out)}
            if _is_caption(example):
                row["caption"] = with_text(example.turns[0][1], texts.get(n, []))
            else:
                row["turns"] = example.turns
            if example.rejected is not None:
                row["rejected"] = example.rejected
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    with open(out / "dropped.jsonl", "w", encoding="utf-8") as file:
        for n in sorted(verdicts.reasons):
            reason, detail = verdicts.reasons[n]
            line = {"id": examples[n].id, "reason": reason, "detail": detail}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    counted = Counter(reason for reason, _ in verdicts.reasons.values())
    report: dict[str, object] = {
        "read": len(examples),
        "kept": len(kept),
        "dropped": dict(counted.most_common()),
        **({"with_text": len(texts)} if config.ocr else {}),
        "settings": asdict(config),
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    os.replace(table, out / "captions.jsonl")
    return report


def _image_name(example: Example, number: int, out: Path) -> str:
    """A path that the table can name; a picture that is not a file is written beside it."""
    if isinstance(example.image, str | Path):
        return str(Path(example.image).absolute())
    folder = out / "images"
    folder.mkdir(exist_ok=True)
    if isinstance(example.image, bytes):
        path = folder / f"{number:09}"
        path.write_bytes(example.image)
    else:
        path = folder / f"{number:09}.png"
        decode(example.image).save(path)
    return str(path.relative_to(out))
