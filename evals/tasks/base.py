"""What a task is: samples, how to ask, how to score, and the controls printed beside the score."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from core_llm.chat import Message
from core_llm.errors import UserError

# What a model gave for one sample, as JSON: {"text"}, {"logprob", "tokens"}, {"probability", ...}.
Output = dict[str, Any]
Split = Literal["train", "dev", "all"]
Ask = Literal["generate", "loglikelihood", "score", "bit-equal"]


class Unavailable(UserError):
    """This machine lacks what one task needs; the other tasks of the run can do without it."""


@dataclass(frozen=True)
class Options:
    """Which rows to evaluate. data_root None: datasets come from their public hub names."""

    data_root: Path | None = None
    split: Split = "dev"
    limit: int | None = None
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Sample:
    """One row. group: rows that share an image, a speaker or a context; kind: the slice for break-downs."""

    id: str
    group: str
    messages: tuple[Message, ...]
    target: str
    kind: str = ""
    label: int = 0
    note: str = ""  # what the report shows beside the media, e.g. the text that is spoken


@dataclass(frozen=True)
class Control:
    """A score to hold the task's score against.

    A "control" takes away what the model is supposed to use (shuffled images) or uses no model at
    all (majority answer); a score within its interval is no evidence of the skill. A "reference"
    is another way to the same answer (the question as text, another classifier).
    `ask` gives altered samples for the model; `answer` gives outputs without the model, or None
    where they cannot be had for these rows. `metrics` names those that it says something about
    (None: all of the task's).
    """

    name: str
    role: Literal["control", "reference"]
    ask: Callable[[Sequence[Sample], Options], list[Sample]] | None = None
    answer: Callable[[Sequence[Sample], Options], list[Output] | None] | None = None
    metrics: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Task:
    """One thing to measure. The first metric is the headline; `needs` names the adapters or the guard."""

    name: str
    title: str
    section: Literal["text", "vision", "speech", "safety"]
    needs: tuple[str, ...]
    source: str
    licence: str
    metrics: tuple[str, ...]
    ask: Ask
    load: Callable[[Options], list[Sample]]
    judge: Callable[[Sample, Output], Mapping[str, float]]
    controls: tuple[Control, ...] = ()
    max_new_tokens: int = 16
    batch_size: int = 128
    version: int = 1
    bundled: bool = False  # needs neither a data root nor the hub
    extras: Callable[[Sequence[Sample], Sequence[Output]], dict[str, float]] | None = field(default=None)

    @property
    def headline(self) -> str:
        return self.metrics[0]
