"""Controls that several tasks share: the right media swapped for someone else's, the most frequent answer."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from core_llm.chat import Message, Part
from core_llm.digests import part_digest
from evals.tasks.base import Control, Options, Output, Sample

# A control need not be as precise as the score: this many rows give an interval of about +-2.5 points.
CONTROL_ROWS = 1500


def shuffled(kind: type, name: str) -> Control:
    """Every sample gets the image (or sound) of another sample."""

    def ask(samples: Sequence[Sample], options: Options) -> list[Sample]:
        rows = _subset(samples, options.seed)
        return swap_parts(rows, kind, options.seed)

    return Control(name, "control", ask=ask)


def _subset(samples: Sequence[Sample], seed: int) -> list[Sample]:
    if len(samples) <= CONTROL_ROWS:
        return list(samples)
    kept = sorted(random.Random(seed).sample(range(len(samples)), CONTROL_ROWS))
    return [samples[i] for i in kept]


def swap_parts(samples: Sequence[Sample], kind: type, seed: int) -> list[Sample]:
    """Replace the part of `kind` in each sample's last message by another of these rows' parts.

    Distinct media are shifted along a random order, so that all rows of one image get one other
    image and none keeps its own. Where there is only one, the samples come back as they were.
    """
    own = [next(part for part in sample.messages[-1].parts if isinstance(part, kind)) for sample in samples]
    digests = [part_digest(part) for part in own]
    distinct = dict(zip(digests, own, strict=True))
    order = sorted(distinct)
    random.Random(seed).shuffle(order)
    donor = {digest: distinct[order[(i + 1) % len(order)]] for i, digest in enumerate(order)}
    return [replaced(sample, kind, donor[digest]) for sample, digest in zip(samples, digests, strict=True)]


def replaced(sample: Sample, kind: type, new: Part) -> Sample:
    """The sample with its part of `kind` exchanged for `new`."""
    *before, last = sample.messages
    parts = tuple(new if isinstance(part, kind) else part for part in last.parts)
    return with_messages(sample, (*before, Message(last.role, parts)))


def with_messages(sample: Sample, messages: tuple[Message, ...]) -> Sample:
    """The sample, asked differently."""
    return replace(sample, messages=messages)


def _majority(samples: Sequence[Sample], options: Options) -> list[Output]:
    """The most frequent answer of these very rows, which no model that ignores the input can beat."""
    answer = Counter(sample.target for sample in samples).most_common(1)[0][0]
    return [{"text": answer} for _ in samples]


def _majority_choice(samples: Sequence[Sample], options: Options) -> list[Output]:
    """The letter that is right most often."""
    answer = Counter(sample.target for sample in samples).most_common(1)[0][0]
    outputs: list[Output] = []
    for sample in samples:
        logprobs = [0.0 if choice == answer else -1.0 for choice in sample.choices]
        outputs.append({"logprobs": logprobs, "tokens": [1] * len(logprobs)})
    return outputs


def _base_rate(samples: Sequence[Sample], options: Options) -> list[Output]:
    """The share of unsafe rows as everyone's probability."""
    rate = sum(sample.label for sample in samples) / len(samples)
    return [{"probability": rate, "unsafe": rate > 0.5} for _ in samples]


MAJORITY = Control("majority answer", "control", answer=_majority)
MAJORITY_CHOICE = Control("majority answer", "control", answer=_majority_choice)
# A constant score decides nothing: its false positives and its calibration are no yardstick.
BASE_RATE = Control("base rate", "control", answer=_base_rate, metrics=("auprc", "auroc", "accuracy"))
