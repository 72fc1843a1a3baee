"""What an attack is: the same request in another form, with the same label."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from core_llm.chat import Message, Text
from core_llm.errors import UserError
from evals.tasks.base import Sample

Change = Callable[[Sample, random.Random], Sample]
Changes = Callable[[Sequence[Sample], Sequence[random.Random]], list[Sample]]


@dataclass(frozen=True)
class Attack:
    """A change of how a request is put, called with a sample and its random numbers.

    reads: it needs the request as text. leaves_text: the request is text afterwards. needs: what the model
    must have for it ("image", "audio"). undo: the request's text back from the changed one, where nothing of
    it is lost. all: changes many samples at once, where that is faster; as `change` for each of them.
    """

    name: str
    title: str
    source: str
    change: Change | None = None
    undo: Callable[[str], str] | None = None
    reads: bool = True
    leaves_text: bool = True
    needs: tuple[str, ...] = ()
    all: Changes | None = None

    def __call__(self, sample: Sample, rng: random.Random) -> Sample:
        """The sample, attacked; what it is about and how it counts stay."""
        return self.many([sample], [rng])[0]

    def many(self, samples: Sequence[Sample], rngs: Sequence[random.Random]) -> list[Sample]:
        """Every sample, attacked with its own random numbers."""
        if self.reads:
            for sample in samples:
                request_text(sample, self.name)
        if self.all is not None:
            return self.all(samples, rngs)
        assert self.change is not None, f"attack '{self.name}' changes nothing"
        return [self.change(sample, rng) for sample, rng in zip(samples, rngs, strict=True)]


def request_text(sample: Sample, name: str) -> str:
    """The words of the last message; raises `UserError` where it is not the user's, or not text alone."""
    last = sample.messages[-1]
    if last.role != "user":
        raise UserError(
            f"attack '{name}' changes what a user asks, and in sample '{sample.id}' the {last.role} speaks "
            "last; take a task of requests"
        )
    if not all(isinstance(part, Text) for part in last.parts):
        raise UserError(f"attack '{name}' needs a typed request, and sample '{sample.id}' holds other media")
    return last.text


def with_text(sample: Sample, text: str) -> Sample:
    """The sample with other words in its last message."""
    return with_last(sample, Message("user", text))


def with_last(sample: Sample, *last: Message) -> Sample:
    """The sample with these messages in the place of its last one."""
    return replace(sample, messages=(*sample.messages[:-1], *last))


def of_text(
    change: Callable[[str, random.Random], str],
) -> Change:
    """A change of the request's words alone."""
    return lambda sample, rng: with_text(sample, change(sample.messages[-1].text, rng))
