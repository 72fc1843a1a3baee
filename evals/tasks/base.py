"""What a task is: samples, how to ask, how to score, and the controls printed beside the score."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from core_llm.chat import Message
from core_llm.errors import UserError

if TYPE_CHECKING:
    from evals.models import Model

# What a model gave for one sample, as JSON: {"text"}, {"logprob", "tokens"}, {"probability", ...}, or for
# "choices" {"logprobs", "tokens"}, one number of each per choice.
Output = dict[str, Any]
Split = Literal["train", "dev", "all"]
Ask = Literal["generate", "loglikelihood", "choices", "score", "bit-equal", "own"]


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
    """One row. group: rows that share an image, a speaker or a context; kind: the slice for break-downs.

    choices: what can be answered, for "choices" (the target is one of them). answers: all that count,
    where there are several. extra: what the judge or the own way of asking needs besides; it is neither
    recorded nor part of a record's key, so `id` must change when it does.
    """

    id: str
    group: str
    messages: tuple[Message, ...]
    target: str
    kind: str = ""
    label: int = 0
    note: str = ""  # what the report shows beside the media, e.g. the text that is spoken
    choices: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    extra: Any = None


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
    """One thing to measure. The first metric is the headline; `needs` names the adapters or the guard.

    citation: the paper that the rows come from. prompt_format: what the model is shown, `{}` where a field
    of the row goes. fewshot: solved examples before the question. asks: for ask="own", how a batch is
    put to the model. extra: the optional dependency that it needs, as in `pip install "llama-herd[EXTRA]"`.
    """

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
    citation: str = ""
    prompt_format: str = ""
    fewshot: int = 0
    asks: "Callable[[Model, Sequence[Sample]], list[Output]] | None" = field(default=None)
    extra: str = ""

    @property
    def headline(self) -> str:
        return self.metrics[0]
