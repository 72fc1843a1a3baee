"""Judges: one sample and one output to the sums that metrics are made of."""

import re
from collections.abc import Mapping

from evals.stats import edits
from evals.tasks.base import Output, Sample

_PUNCTUATION = re.compile(r"[^\w\s']")
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def normalise(text: str) -> str:
    """Lower case, no punctuation, digits as words, single spaces: how answers are compared."""
    words = _PUNCTUATION.sub(" ", text.lower()).split()
    return " ".join(
        _DIGITS[int(word)] if word.isascii() and len(word) == 1 and word.isdigit() else word for word in words
    )


def answer(sample: Sample, output: Output) -> Mapping[str, float]:
    """Right when the whole answer is the expected one."""
    return {"correct": float(normalise(output["text"]) == normalise(sample.target))}


def transcript(sample: Sample, output: Output) -> Mapping[str, float]:
    """Word and character edits against the reference transcript."""
    truth, said = normalise(sample.target), normalise(output["text"])
    return {
        "word_errors": edits(truth.split(), said.split()),
        "words": len(truth.split()),
        "character_errors": edits(truth, said),
        "characters": len(truth),
        "correct": float(truth == said),
    }


def verdict(sample: Sample, output: Output) -> Mapping[str, float]:
    """P(unsafe), the decision, and the truth."""
    unsafe = float(output["unsafe"])
    return {
        "probability": output["probability"],
        "unsafe": unsafe,
        "label": float(sample.label),
        "correct": float(unsafe == sample.label),
    }


def likelihood(sample: Sample, output: Output) -> Mapping[str, float]:
    """Log-likelihood of the answer (nats) and its length in tokens, end token included."""
    return {"logprob": output["logprob"], "tokens": output["tokens"]}


def equality(sample: Sample, output: Output) -> Mapping[str, float]:
    """Whether all logits were the same bits."""
    return {"correct": float(output["equal"])}
