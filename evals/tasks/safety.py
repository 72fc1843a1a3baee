"""Guard tasks: is a conversation unsafe? Scored by ranking, by decision and by calibration."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core_llm.chat import Message
from evals.tasks import data, scoring
from evals.tasks.base import Control, Options, Output, Sample, Task
from evals.tasks.controls import BASE_RATE

BASICS = Path(__file__).parent.parent / "samples" / "guard_basics.jsonl"
METRICS = ("auprc", "auroc", "f1", "fpr", "ece", "accuracy")


def _dialogue(row: Any) -> tuple[Message, ...]:
    return (Message("user", row.fields["context"]), Message("assistant", row.fields["response"]))


def _prompt(row: Any) -> tuple[Message, ...]:
    return (Message("user", row.fields["prompt"]),)


def _sample(row: Any, messages: tuple[Message, ...], kind: str) -> Sample:
    label = int(row.fields["label"])
    return Sample(row.id, row.group, messages, ("safe", "unsafe")[label], kind, label)


def _diasafety(options: Options) -> list[Sample]:
    return [_sample(row, _dialogue(row), row.fields["category"]) for row in data.rows("diasafety", options)]


def _openai_moderation(options: Options) -> list[Sample]:
    samples = []
    for row in data.rows("openai_moderation", options):
        named = [name for name, value in row.fields["labels"].items() if value]
        samples.append(_sample(row, _prompt(row), "+".join(named) or "none"))
    return samples


def basics() -> list[Sample]:
    """The bundled requests, all of them."""
    rows = [json.loads(line) for line in BASICS.read_text().splitlines()]
    return [
        Sample(
            f"basic-{i}",
            f"basic-{i}",
            (Message("user", row["text"]),),
            ("safe", "unsafe")[row["label"]],
            row["kind"],
            row["label"],
        )
        for i, row in enumerate(rows)
    ]


def _basics(options: Options) -> list[Sample]:
    return data.subset(basics(), options)


def _tfidf(name: str, messages: Any) -> Control:
    """The baseline, fitted on the train split. None where that split is missing or itself evaluated."""

    def answer(samples: Sequence[Sample], options: Options) -> list[Output] | None:
        from guard.evaluation.baselines import tfidf_probabilities

        train = data.train_rows(name, options) if options.split == "dev" else None
        if train is None:
            return None
        labels = [int(row.fields["label"]) for row in train]
        if len(set(labels)) < 2:
            return None
        asked = [sample.messages for sample in samples]
        probabilities = tfidf_probabilities([messages(row) for row in train], labels, asked)
        return [{"probability": float(p), "unsafe": bool(p > 0.5)} for p in probabilities]

    return Control("TF-IDF logistic regression", "reference", answer=answer)


TASKS = [
    Task(
        name="guard-basics",
        title="Plainly safe and unsafe requests",
        section="safety",
        needs=("guard",),
        source="evals/samples/guard_basics.jsonl",
        licence="the project's own",
        metrics=METRICS,
        ask="score",
        load=_basics,
        judge=scoring.verdict,
        controls=(BASE_RATE,),
        batch_size=32,
        bundled=True,
    ),
    Task(
        name="guard-diasafety",
        title="Unsafe replies in dialogues",
        section="safety",
        needs=("guard",),
        source="DiaSafety (thu-coai/diasafety), re-split by context",
        licence="Apache-2.0",
        metrics=METRICS,
        ask="score",
        load=_diasafety,
        judge=scoring.verdict,
        controls=(BASE_RATE, _tfidf("diasafety", _dialogue)),
        batch_size=64,
    ),
    Task(
        name="guard-openai-moderation",
        title="Unsafe user prompts",
        section="safety",
        needs=("guard",),
        source="OpenAI moderation evaluation set (openai/moderation-api-release)",
        licence="MIT",
        metrics=METRICS,
        ask="score",
        load=_openai_moderation,
        judge=scoring.verdict,
        controls=(BASE_RATE, _tfidf("openai_moderation", _prompt)),
        batch_size=32,
    ),
]
