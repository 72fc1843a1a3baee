"""Speech tasks: spoken digits, commands and questions to text, and spoken questions about images."""

import hashlib
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from core_llm.chat import Audio, Image, Message, Text
from evals.tasks import data, scoring
from evals.tasks.base import Control, Options, Output, Sample, Task, Unavailable
from evals.tasks.controls import MAJORITY, shuffled, with_messages
from evals.tasks.vision import SHUFFLED_IMAGES, bundled_scene, easy_vqa_kind

CLIPS = Path(__file__).parent.parent / "samples"
COMMAND_CLIPS = 300
_QUESTION_EVERY = 4  # commands have the larger part of the words


def _recognition(clip: Audio) -> tuple[Message, ...]:
    from core_llm.data.phrases import REPEAT_PROMPT

    return (Message("user", (Text(REPEAT_PROMPT), clip)),)


def transcripts(
    rows: Callable[[Options], list[Any]], kind: Callable[[dict[str, Any]], str]
) -> Callable[[Options], list[Sample]]:
    """A task's rows: recordings of a dataset to write down; `kind` of a row's fields."""

    def load(options: Options) -> list[Sample]:
        return [
            Sample(
                row.id,
                row.group,
                _recognition(Audio(row.fields["audio"])),
                row.fields["text"],
                kind(row.fields),
            )
            for row in rows(options)
        ]

    return load


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


def needs_espeak() -> None:
    """Raise `Unavailable` where no speech can be synthesised."""
    from speech_adapter.synthesis import INSTALL_HINT, available

    if not available():
        raise Unavailable(INSTALL_HINT)


def command_phrases() -> Iterator[tuple[str, str]]:
    """Kind and text of one phrase after the other: three commands, then a question."""
    from core_llm.data.phrases import question_phrase, spoken_command

    rng = random.Random("evals spoken-commands")  # trainers seed with numbers
    while True:
        for _ in range(_QUESTION_EVERY - 1):
            yield "command", spoken_command(rng)
        yield "question", question_phrase(rng)


@cache
def _command_samples() -> list[Sample]:
    """Different phrases in held-out voices, each voice equally often, at the speeds of training."""
    from speech_adapter.synthesis import HELD_OUT_VOICES, Utterance, speak_all

    kinds: dict[str, str] = {}
    for kind, text in command_phrases():
        kinds.setdefault(text, kind)
        if len(kinds) == COMMAND_CLIPS:
            break
    rng = random.Random("evals spoken-commands voices")
    voices = list(HELD_OUT_VOICES) * (COMMAND_CLIPS // len(HELD_OUT_VOICES))
    rng.shuffle(voices)
    spoken = [
        Utterance(text, voice, rng.randint(120, 220), rng.randint(15, 85))
        for text, voice in zip(kinds, voices, strict=True)
    ]
    # A process of its own: how espeak-ng sounds depends on what its process said before.
    with tempfile.TemporaryDirectory() as folder:
        clips = speak_all(spoken, Path(folder), processes=1)
    return [
        Sample(f"{i:03d}", said.voice, _recognition(Audio(clip.samples, 16_000)), said.text, kinds[said.text])
        for i, (said, clip) in enumerate(zip(spoken, clips, strict=True))
    ]


def _spoken_commands(options: Options) -> list[Sample]:
    needs_espeak()
    return data.subset(_command_samples(), options)


def words_of(text: str) -> list[str]:
    """The words of a phrase as answers are compared."""
    return scoring.normalise(text).split()


def _vocabulary(samples: Sequence[Sample], outputs: Sequence[Output]) -> dict[str, float]:
    return {"distinct_words": float(len({word for sample in samples for word in words_of(sample.target)}))}


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
    needs_espeak()
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
        load=transcripts(partial(data.rows, "fsdd"), lambda fields: str(fields["text"])),
        judge=scoring.transcript,
        controls=(SHUFFLED_AUDIO, MAJORITY),
        batch_size=64,
    ),
    Task(
        name="spoken-commands",
        title="Transcripts of commands and questions, unseen voices",
        section="speech",
        needs=("core", "audio"),
        source="core_llm.data.phrases, spoken by espeak-ng in voices that no trainer uses",
        licence="the project's own",
        metrics=TRANSCRIPT_METRICS,
        ask="generate",
        load=_spoken_commands,
        judge=scoring.transcript,
        controls=(SHUFFLED_AUDIO, MAJORITY),
        max_new_tokens=32,
        batch_size=32,
        extras=_vocabulary,
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
