"""Rows of the report's sample browser, with their pictures and sounds inside the page."""

import base64
import io
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from core_llm.chat import Audio, Image, Text
from evals.runner import Evaluation
from evals.tasks.base import Output, Sample

# Failures and others that the browser holds per task, so that the file stays small.
FAILURES_SHOWN, OTHERS_SHOWN = 80, 40
# Bytes of all pictures and sounds together, before base64 makes them a third longer.
MEDIA_BYTES = 12_000_000
_IMAGE_SIDE = 320  # pixels; larger images are scaled down for the report
_PHOTO_BYTES = 40_000  # a PNG above this is a photograph: JPEG says the same in less
_AUDIO_TYPES = {".ogg": "audio/ogg", ".wav": "audio/wav", ".mp3": "audio/mpeg", ".flac": "audio/flac"}


class Media:
    """Data URIs, each stored once however many samples share it, up to `budget` bytes in all."""

    def __init__(self, budget: int = MEDIA_BYTES) -> None:
        self.uris: list[str] = []
        self.left_out = 0
        self._room = budget
        self._index: dict[int, int] = {}
        self._kept: list[Any] = []  # an id is an object's own only as long as it lives

    def add(self, part: Image | Audio, allowance: float = float("inf")) -> int | None:
        """Index of the part's data URI; None where it would go beyond the budget or the allowance."""
        key = id(part.data)
        if key not in self._index:
            uri = image_uri(part) if isinstance(part, Image) else audio_uri(part)
            size = len(uri) * 3 // 4
            if size > min(self._room, allowance):
                self.left_out += 1
                return None
            self._room -= size
            self._index[key] = len(self.uris)
            self._kept.append(part.data)
            self.uris.append(uri)
        return self._index[key]

    @property
    def room(self) -> int:
        """Bytes that are left."""
        return self._room


def browser_rows(evaluations: Sequence[Evaluation], media: Media) -> list[dict[str, Any]]:
    """Rows of all tasks; each may fill its share of what room for media is left."""
    found = []
    for i, evaluation in enumerate(evaluations):
        found += _shown(evaluation, media, media.room / (len(evaluations) - i))
    return found


def _shown(evaluation: Evaluation, media: Media, share: float) -> list[dict[str, Any]]:
    """Failures first, then others, each a fixed random choice."""
    right = [_is_right(row) for row in evaluation.rows]
    order = list(range(len(right)))
    random.Random(0).shuffle(order)
    failures = [i for i in order if right[i] is False][:FAILURES_SHOWN]
    others = [i for i in order if right[i] is not False][:OTHERS_SHOWN]
    before, made = media.room, {}
    for i in failures + others:  # in this order: where room ends, failures have their media
        allowance = share - (before - media.room)
        made[i] = _browser_row(
            evaluation.task.name, evaluation.samples[i], evaluation.outputs[i], right[i], media, allowance
        )
    return [made[i] for i in sorted(made)]


def _is_right(row: dict[str, float]) -> bool | None:
    """None for tasks that have no right or wrong, such as perplexity."""
    return bool(row["correct"]) if "correct" in row else None


def _browser_row(
    task: str, sample: Sample, output: Output, right: bool | None, media: Media, allowance: float
) -> dict[str, Any]:
    asked: list[dict[str, Any]] = []
    for message in sample.messages:
        for part in message.parts:
            if isinstance(part, Text):
                asked.append({"role": message.role, "text": part.text})
            elif isinstance(part, Image | Audio):
                kind = "image" if isinstance(part, Image) else "audio"
                asked.append({"role": message.role, kind: media.add(part, allowance)})
    return {
        "task": task,
        "id": sample.id,
        "kind": sample.kind,
        "asked": asked,
        "note": sample.note,
        "target": sample.target,
        "answer": answer_text(output, sample.choices),
        "right": right,
    }


def answer_text(output: Output, choices: Sequence[str] = ()) -> str:
    """What a model gave, for people."""
    if "text" in output:
        return str(output["text"])
    if "probability" in output:
        return f"{'unsafe' if output['unsafe'] else 'safe'}, P(unsafe) = {output['probability']:.3f}"
    if "logprob" in output:
        return f"{-output['logprob'] / output['tokens']:.3f} nats per token over {output['tokens']} tokens"
    if "logprobs" in output and choices:
        return choices[int(np.argmax(output["logprobs"]))]
    if "equal" in output:
        return "the same bits" if output["equal"] else f"differs by up to {output['max_difference']:.2e}"
    return ", ".join(f"{name} {value}" for name, value in output.items())


def image_uri(part: Image) -> str:
    """A data URI of at most `_IMAGE_SIDE` pixels a side: PNG, or JPEG for a photograph."""
    import PIL.Image

    data: Any = part.data
    picture: PIL.Image.Image
    if isinstance(data, (str, Path)):
        picture = PIL.Image.open(data)
    elif isinstance(data, bytes):
        picture = PIL.Image.open(io.BytesIO(data))
    else:
        picture = data if isinstance(data, PIL.Image.Image) else PIL.Image.fromarray(data)
    picture = picture.convert("RGB")
    picture.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    if buffer.tell() <= _PHOTO_BYTES:
        return _uri("image/png", buffer.getvalue())
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return _uri("image/jpeg", buffer.getvalue())


def audio_uri(part: Audio) -> str:
    """The file as it is where browsers play it, else Ogg Vorbis."""
    data: Any = part.data
    if isinstance(data, (str, Path)) and Path(data).suffix.lower() in _AUDIO_TYPES:
        return _uri(_AUDIO_TYPES[Path(data).suffix.lower()], _read(str(data)))
    import soundfile

    rate = part.rate
    if not isinstance(data, np.ndarray):
        data, rate = soundfile.read(io.BytesIO(data) if isinstance(data, bytes) else data, dtype="float32")
    buffer = io.BytesIO()
    soundfile.write(buffer, data, rate or 16_000, format="OGG", subtype="VORBIS")
    return _uri("audio/ogg", buffer.getvalue())


@lru_cache(maxsize=512)
def _read(path: str) -> bytes:
    return Path(path).read_bytes()


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
