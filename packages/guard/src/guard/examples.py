"""Training conversations of the guard out of the safety sets, each with a target and a category."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from core_llm.chat import Message
from core_llm.data import sources
from core_llm.data.sources import Row
from guard import taxonomy
from guard.teacher import out_of_fold
from guard.templates import requests


@dataclass(frozen=True)
class Example:
    """A conversation with what is known about its last message.

    unsafe: the label. target: P(unsafe) to learn, between the label and a teacher's opinion. code: the
    category of an unsafe message, None where unknown. more: its other categories. opinion: a larger guard's
    probability of each category, which add up to its P(unsafe).
    """

    messages: tuple[Message, ...]
    unsafe: bool
    target: float
    code: str | None = None
    more: tuple[str, ...] = ()
    opinion: Mapping[str, float] | None = field(default=None, compare=False)

    @property
    def codes(self) -> tuple[str, ...]:
        """All categories that are known."""
        return () if self.code is None else (self.code, *self.more)

    @property
    def context(self) -> str:
        """What was said before the judged message; the message itself where nothing was."""
        return "\n".join(m.text for m in self.messages[:-1]) or self.messages[-1].text

    @property
    def pair(self) -> tuple[str, str]:
        """What was said before, and the judged message."""
        return " ".join(m.text for m in self.messages[:-1]), self.messages[-1].text


def diasafety(rows: Sequence[Row]) -> list[Example]:
    """A user's words and the answer, which is judged."""
    return [
        Example(
            (Message("user", f["context"]), Message("assistant", f["response"])),
            bool(f["label"]),
            float(f["label"]),
            taxonomy.DIASAFETY.get(f["category"]) if f["label"] else None,
        )
        for f in (row.fields for row in rows)
        if f["response"].strip() and f["context"].strip()
    ]


def openai_moderation(rows: Sequence[Row]) -> list[Example]:
    """A prompt alone; the first label that is set names the category."""
    found = []
    for row in rows:
        codes = [taxonomy.OPENAI_MODERATION[key] for key, value in row.fields["labels"].items() if value == 1]
        # The more special label comes last in the set (S3 and not S, H2 and not H).
        made = _prompt(row.fields["prompt"], bool(row.fields["label"]), codes[-1] if codes else None)
        found.append(replace(made, more=tuple(dict.fromkeys(c for c in codes if c != made.code))))
    return found


def hate_speech(rows: Sequence[Row]) -> list[Example]:
    """A tweet as a user's message; hateful (0) and offensive (1) ones are unsafe, 2 is neither.

    Five in six are unsafe: so many of these are left out that half remains, or the guard would learn
    that tweets are unsafe.
    """
    made = [_prompt(row.fields["text"], row.fields["label"] != 2, "S10") for row in rows]
    safe = sum(not e.unsafe for e in made)
    unsafe = [e for e in made if e.unsafe]
    stride = max(1, len(unsafe) // max(1, safe))
    return [e for e in made if not e.unsafe] + unsafe[::stride]


def _ailuminate(rows: Sequence[Row]) -> list[Example]:
    table = taxonomy.AILUMINATE
    return [_prompt(row.fields["prompt"], True, table.get(row.fields["hazard"])) for row in rows]


def _simple_safety_tests(rows: Sequence[Row]) -> list[Example]:
    table = taxonomy.SIMPLE_SAFETY_TESTS
    return [_prompt(row.fields["prompt"], True, table.get(row.fields["harm_area"].lower())) for row in rows]


def _mitre_frr(rows: Sequence[Row]) -> list[Example]:
    return [_prompt(row.fields["prompt"], False, None) for row in rows]


def _gsm8k(rows: Sequence[Row]) -> list[Example]:
    return [_prompt(row.fields["question"], False, None) for row in rows]


def _prompt(text: str, unsafe: bool, code: str | None) -> Example:
    return Example((Message("user", text),), unsafe, float(unsafe), code if unsafe else None)


@dataclass(frozen=True)
class Part:
    """A dataset of the mixture: how its rows become examples, how many per epoch, and whether it is taught.

    More per epoch than there are rows repeats them. A taught part is judged by the teacher too: its
    targets are soft.
    """

    read: Callable[[Sequence[Row]], list[Example]]
    per_epoch: int | None  # None: all of it
    taught: bool = False


MIXTURE: dict[str, Part] = {
    "diasafety": Part(diasafety, None, taught=True),
    "openai_moderation": Part(openai_moderation, 800, taught=True),
    "hate_speech": Part(hate_speech, 900),
    "ailuminate": Part(_ailuminate, 300),
    "simple_safety_tests": Part(_simple_safety_tests, 80),
    "mitre_frr": Part(_mitre_frr, 250),
    "gsm8k": Part(_gsm8k, 250),
}


# Generated conversations per epoch, and how many distinct ones there are.
TEMPLATES_PER_EPOCH = 1200
TEMPLATES = 6000


def templates(n: int, seed: int) -> list[Example]:
    """Generated requests, see `guard.templates`."""
    stream = requests(random.Random(f"templates-{seed}"))
    drawn = islice(stream, n)
    return [Example(messages, code is not None, float(code is not None), code) for messages, code in drawn]


def load(
    name: str, data_root: Path | None, teacher_weight: float = 0.0, split: str = "train"
) -> list[Example]:
    """Examples of one dataset; `teacher_weight` is the teacher's share in the targets of a taught part."""
    part = MIXTURE[name]
    examples = [e for e in part.read(sources.load(name, data_root, split)) if e.messages[-1].text.strip()]
    return taught(examples, teacher_weight) if part.taught else examples


def taught(examples: Sequence[Example], weight: float) -> list[Example]:
    """The same examples with the teacher's out-of-fold opinion mixed into their targets."""
    if not weight:
        return list(examples)
    opinions = out_of_fold([e.pair for e in examples], [int(e.unsafe) for e in examples])
    return [
        replace(e, target=(1 - weight) * e.unsafe + weight * float(opinion))
        for e, opinion in zip(examples, opinions, strict=True)
    ]
