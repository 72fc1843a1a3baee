"""Questions about photographs, documents, charts and diagrams, with the metric of each benchmark."""

import re
import string
from collections.abc import Callable
from typing import Any

from core_llm.chat import Image, Message, Part, Text
from evals.tasks import data, scoring
from evals.tasks.base import Options, Sample, Task
from evals.tasks.controls import MAJORITY, MAJORITY_CHOICE
from evals.tasks.vision import SHUFFLED_IMAGES

_SHORT = "Answer the question using a single word or phrase."
_LETTER = "Answer with the option's letter from the given choices directly."
_SHORT_FORMAT = f"[image] {{question}}\n{_SHORT}"
_LETTER_FORMAT = f"[image] {{question}}\nA. {{option}}\nB. {{option}} …\n{_LETTER}"
_MARK = re.compile(r"<image (\d)>")


def _questions(name: str, kind: Callable[[dict[str, Any]], str]) -> Callable[[Options], list[Sample]]:
    """Rows of a dataset with "image", "question" and "answers"."""

    def load(options: Options) -> list[Sample]:
        samples = []
        for row in data.rows(name, options):
            fields = row.fields
            answers = tuple(fields["answers"] or [fields["answer"]])
            content = (Image(fields["image"]), Text(f"{fields['question']}\n{_SHORT}"))
            # The first answer stands for all where one is shown, and for the most frequent answer.
            target = max(answers, key=answers.count)
            samples.append(
                Sample(
                    row.id,
                    row.group,
                    (Message("user", content),),
                    target,
                    kind(fields),
                    note=fields["question"],
                    answers=answers,
                )
            )
        return samples

    return load


def _form(fields: dict[str, Any]) -> str:
    """yes/no, number or other, as VQA breaks its score down (by the annotators' answer)."""
    answer = scoring.vqa_normalised(max(fields["answers"] or [fields["answer"]], key=len))
    if answer in ("yes", "no"):
        return "yes/no"
    return "number" if answer.isdigit() else "other"


def lettered(question: str, options: list[str]) -> str:
    """A question, its options with letters, and how to answer."""
    lines = [f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options)]
    return "\n".join([question, *lines, _LETTER])


def _ai2d(options: Options) -> list[Sample]:
    samples = []
    for row in data.rows("ai2d", options):
        text = lettered(row.fields["question"], row.fields["options"])
        messages = (Message("user", (Image(row.fields["image"]), Text(text))),)
        samples.append(_choice_sample(row, messages, ""))
    return samples


def _mmmu(options: Options) -> list[Sample]:
    """Pictures stand where the text names them; those that it does not name stand first."""
    samples = []
    for row in data.rows("mmmu", options):
        images = row.fields["images"]
        pieces = _MARK.split(lettered(row.fields["question"], row.fields["options"]))
        named = {int(number) for number in pieces[1::2]}
        parts: list[Part] = [Image(image) for number, image in sorted(images.items()) if number not in named]
        for i, piece in enumerate(pieces):
            if i % 2:
                parts.append(Image(images[int(piece)]))
            elif piece.strip():
                parts.append(Text(piece))
        samples.append(_choice_sample(row, (Message("user", tuple(parts)),), row.fields["subject"]))
    return samples


def _choice_sample(row: Any, messages: tuple[Message, ...], kind: str) -> Sample:
    letters = tuple(string.ascii_uppercase[: len(row.fields["options"])])
    target = letters[row.fields["answer"]]
    note = str(row.fields["options"][row.fields["answer"]])
    return Sample(row.id, row.group, messages, target, kind, note=note, choices=letters)


def _short_task(
    name: str, title: str, source: str, licence: str, citation: str, metric: str, judge: Any, kind: Any
) -> Task:
    return Task(
        name=name,
        title=title,
        section="vision",
        needs=("core", "image"),
        source=source,
        licence=licence,
        metrics=(metric,),
        ask="generate",
        load=_questions(name, kind),
        judge=judge,
        controls=(SHUFFLED_IMAGES, MAJORITY),
        max_new_tokens=32,
        batch_size=32,
        citation=citation,
        prompt_format=_SHORT_FORMAT,
    )


def _letter_task(name: str, title: str, source: str, licence: str, citation: str, load: Any) -> Task:
    return Task(
        name=name,
        title=title,
        section="vision",
        needs=("core", "image"),
        source=source,
        licence=licence,
        metrics=("accuracy",),
        ask="choices",
        load=load,
        judge=scoring.choice,
        controls=(SHUFFLED_IMAGES, MAJORITY_CHOICE),
        batch_size=16,
        citation=citation,
        prompt_format=_LETTER_FORMAT,
    )


TASKS = [
    _short_task(
        "vqav2",
        "Questions about photographs",
        "VQAv2 (lmms-lab/VQAv2), validation part",
        "CC BY 4.0 (annotations)",
        "Goyal et al. 2017, Making the V in VQA Matter",
        "vqa_accuracy",
        scoring.vqa,
        _form,
    ),
    _short_task(
        "textvqa",
        "Questions about text in photographs",
        "TextVQA (lmms-lab/textvqa), validation part",
        "CC BY 4.0",
        "Singh et al. 2019, Towards VQA Models That Can Read",
        "vqa_accuracy",
        scoring.vqa,
        lambda fields: "",
    ),
    _short_task(
        "docvqa",
        "Questions about scanned pages",
        "DocVQA (lmms-lab/DocVQA), validation part",
        "Apache-2.0 by the hub copy's card",
        "Mathew et al. 2021, DocVQA",
        "anls",
        scoring.anls,
        lambda fields: "",
    ),
    _short_task(
        "chartqa",
        "Questions about charts",
        "ChartQA (lmms-lab/ChartQA), test part",
        "GPL-3.0",
        "Masry et al. 2022, ChartQA",
        "relaxed_accuracy",
        scoring.relaxed,
        lambda fields: str(fields["kind"]),
    ),
    _letter_task(
        "ai2d",
        "Multiple choice about diagrams",
        "AI2D (lmms-lab/ai2d), test part",
        "see docs/measure.md",
        "Kembhavi et al. 2016, A Diagram Is Worth A Dozen Images",
        _ai2d,
    ),
    _letter_task(
        "mmmu",
        "Multiple choice at college level, 30 subjects",
        "MMMU (lmms-lab/MMMU), validation part without open questions",
        "Apache-2.0",
        "Yue et al. 2024, MMMU",
        _mmmu,
    ),
]
