"""One request in three forms: typed, as a picture of its words, and spoken."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from core_llm.chat import Audio, Image, Message
from core_llm.errors import UserError
from evals.tasks.base import Sample

if TYPE_CHECKING:
    import PIL.Image

TEXT, IMAGE, SPEECH = "text", "image", "speech"
FORMS = (TEXT, IMAGE, SPEECH)
NEEDS = {TEXT: "core", IMAGE: "image", SPEECH: "audio"}

_SIDE = 448  # pixels
_RATE = 16_000  # Hz
_SPEED = 150  # words per minute


def request_of(sample: Sample) -> str:
    """The words of a request, whatever its form."""
    return sample.note or sample.messages[-1].text


def in_forms(samples: Sequence[Sample], forms: Sequence[str]) -> list[Sample]:
    """Every typed request in each of `forms`; `kind` names the form, and all forms of one share a group.

    What is too long to be drawn is left out of the pictures. Raises `Unavailable` where speech is wanted
    and no synthesiser is installed.
    """
    made: list[Sample] = []
    for form in forms:
        if form == TEXT:
            made += [replace(sample, group=sample.id, kind=TEXT) for sample in samples]
        elif form == IMAGE:
            drawn = [(sample, picture(request_of(sample))) for sample in samples]
            made += [_as_part(s, IMAGE, Image(image)) for s, image in drawn if image is not None]
        else:
            clips = spoken([s.id for s in samples], [request_of(s) for s in samples])
            made += [_as_part(s, SPEECH, clip) for s, clip in zip(samples, clips, strict=True)]
    return made


def _as_part(sample: Sample, form: str, part: Image | Audio) -> Sample:
    *before, last = sample.messages
    return replace(
        sample,
        id=f"{sample.id}-{form}",
        group=sample.id,
        messages=(*before, Message(last.role, (part,))),
        kind=form,
        note=request_of(sample),
    )


def picture(text: str) -> "PIL.Image.Image | None":
    """The words drawn, as `guard-modalities` draws them; None where they are too many for a picture."""
    from vision_adapter.typography import write

    try:
        return write(text, _SIDE)
    except UserError:
        return None


def spoken(ids: Sequence[str], texts: Sequence[str]) -> list[Audio]:
    """The texts read aloud by espeak-ng in held-out voices, the same for the same ids and texts.

    Raises `Unavailable` where espeak-ng is not installed.
    """
    from evals.tasks.speech import needs_espeak, voice_of
    from speech_adapter.synthesis import Utterance, speak_all

    needs_espeak()
    said = [Utterance(text, voice_of(name), _SPEED) for name, text in zip(ids, texts, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        clips = speak_all(said, Path(folder), _RATE, processes=1)
    return [Audio(clip.samples, _RATE) for clip in clips]
