"""Speech tasks: spoken digits to text, and spoken questions about images."""

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from core_llm.chat import Audio, Image, Message, Text
from evals.tasks import data, scoring
from evals.tasks.base import Control, Options, Sample, Task
from evals.tasks.controls import MAJORITY, shuffled, with_messages
from evals.tasks.vision import SHUFFLED_IMAGES, bundled_scene, easy_vqa_kind

CLIPS = Path(__file__).parent.parent / "samples"


def _recognition(clip: Audio) -> tuple[Message, ...]:
    from core_llm.data.phrases import REPEAT_PROMPT

    return (Message("user", (Text(REPEAT_PROMPT), clip)),)


def _fsdd(options: Options) -> list[Sample]:
    return [
        Sample(
            row.id,
            row.group,
            _recognition(Audio(row.fields["audio"])),
            row.fields["text"],
            row.fields["text"],
        )
        for row in data.rows("fsdd", options)
    ]


@cache
def bundled_clips() -> dict[str, list[dict[str, Any]]]:
    """What `evals/samples/make.py` wrote: clips of digits and of questions, with texts and voices."""
    clips: dict[str, list[dict[str, Any]]] = json.loads((CLIPS / "clips.json").read_text())
    return clips


def _spoken_digits(options: Options) -> list[Sample]:
    samples = [
        Sample(
            clip["file"],
            clip["voice"],
            _recognition(Audio(CLIPS / clip["file"])),
            clip["text"],
            clip["voice"],
        )
        for clip in bundled_clips()["digits"]
    ]
    return data.subset(samples, options)


def _spoken_scenes(options: Options) -> list[Sample]:
    samples = []
    for clip in bundled_clips()["questions"]:
        picture = bundled_scene(clip["scene"])[1]
        content = (Image(picture), Audio(CLIPS / clip["file"]))
        samples.append(
            Sample(
                clip["file"],
                f"scene-{clip['scene']}",
                (Message("user", content),),
                clip["answer"],
                clip["skill"],
                note=clip["text"],
            )
        )
    return data.subset(samples, options)


@cache
def _spoken(text: str, voice: str) -> Audio:
    from speech_adapter.synthesis import speak

    samples, rate = speak(text, voice)
    return Audio(samples, rate)


def voice_of(sample_id: str) -> str:
    """A held-out voice, fixed by the row's id."""
    from speech_adapter.synthesis import HELD_OUT_VOICES

    return HELD_OUT_VOICES[int(hashlib.sha256(sample_id.encode()).hexdigest(), 16) % len(HELD_OUT_VOICES)]


def _spoken_vqa(options: Options) -> list[Sample]:
    samples = []
    for row in data.rows("easy_vqa", options):
        question = row.fields["question"]
        content = (Image(row.fields["image"]), _spoken(question, voice_of(row.id)))
        samples.append(
            Sample(
                row.id,
                row.group,
                (Message("user", content),),
                row.fields["answer"],
                easy_vqa_kind(question),
                note=question,
            )
        )
    return samples


def _typed(samples: Sequence[Sample], options: Options) -> list[Sample]:
    """The same questions as text: what speaking costs."""
    typed = []
    for sample in samples:
        image = next(part for part in sample.messages[-1].parts if isinstance(part, Image))
        typed.append(with_messages(sample, (Message("user", (image, Text(sample.note))),)))
    return typed


SHUFFLED_AUDIO = shuffled(Audio, "shuffled audio")
TYPED = Control("typed question", "reference", ask=_typed)

TRANSCRIPT_METRICS = ("wer", "cer", "accuracy", "wer_raw", "cer_raw", "wer_english", "cer_english")

TASKS = [
    Task(
        name="spoken-digits",
        title="Transcripts of spoken digits",
        section="speech",
        needs=("core", "audio"),
        source="evals/samples (espeak-ng, voices that no trainer uses)",
        licence="the project's own",
        metrics=TRANSCRIPT_METRICS,
        ask="generate",
        load=_spoken_digits,
        judge=scoring.transcript,
        controls=(SHUFFLED_AUDIO, MAJORITY),
        max_new_tokens=24,
        batch_size=32,
        bundled=True,
    ),
    Task(
        name="fsdd",
        title="Transcripts of digits, people speaking",
        section="speech",
        needs=("core", "audio"),
        source="Free Spoken Digit Dataset (Jakobovski/free-spoken-digit-dataset)",
        licence="CC BY-SA 4.0",
        metrics=TRANSCRIPT_METRICS,
        ask="generate",
        load=_fsdd,
        judge=scoring.transcript,
        controls=(SHUFFLED_AUDIO, MAJORITY),
        batch_size=64,
    ),
    Task(
        name="spoken-scenes",
        title="Spoken questions about rendered scenes",
        section="speech",
        needs=("core", "image", "audio"),
        source="evals/samples and vision_adapter.scenes",
        licence="the project's own",
        metrics=("exact_match",),
        ask="generate",
        load=_spoken_scenes,
        judge=scoring.answer,
        controls=(SHUFFLED_IMAGES, SHUFFLED_AUDIO, MAJORITY, TYPED),
        batch_size=32,
        bundled=True,
    ),
    Task(
        name="spoken-vqa",
        title="Spoken questions about images of one shape",
        section="speech",
        needs=("core", "image", "audio"),
        source="easy-VQA (vzhou842/easy-VQA), questions spoken by espeak-ng",
        licence="MIT",
        metrics=("accuracy",),
        ask="generate",
        load=_spoken_vqa,
        judge=scoring.answer,
        controls=(SHUFFLED_IMAGES, SHUFFLED_AUDIO, MAJORITY, TYPED),
        batch_size=64,
    ),
]
