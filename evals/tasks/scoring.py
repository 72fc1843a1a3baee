"""Judges: one sample and one output to the sums that metrics are made of."""

import re
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from evals.tasks.base import Output, Sample

if TYPE_CHECKING:
    from whisper.normalizers import EnglishTextNormalizer

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
    """Word and character edits against the reference transcript, in three spellings of both.

    As they are ("_raw"), as answers are compared (see `normalise`), and by openai-whisper's normaliser for
    English ("_english"), which published error rates use. That one makes numbers of number words and joins
    them, but not digits: "two five" and "twenty five" become "25", "2 5" stays.
    """
    english = _english()
    spellings = {"": normalise, "_raw": _single_spaced, "_english": lambda text: str(english(text))}
    sums: dict[str, float] = {}
    for name, spell in spellings.items():
        truth, said = spell(sample.target), spell(output["text"])
        sums |= {f"{key}{name}": value for key, value in _edits(truth, said).items()}
    sums["correct"] = float(normalise(sample.target) == normalise(output["text"]))
    return sums


def _single_spaced(text: str) -> str:
    return " ".join(text.split())


def _edits(truth: str, said: str) -> dict[str, float]:
    """Substitutions, deletions and insertions from `truth` to `said` by jiwer, and the lengths of `truth`."""
    import jiwer

    words, characters = len(truth.split()), len(truth)
    if not words or not said.strip():  # jiwer takes no empty text: all is inserted, or all deleted
        return {
            "word_errors": max(words, len(said.split())),
            "words": words,
            "character_errors": max(characters, len(said)),
            "characters": characters,
        }
    by_word, by_character = jiwer.process_words(truth, said), jiwer.process_characters(truth, said)
    return {
        "word_errors": by_word.substitutions + by_word.deletions + by_word.insertions,
        "words": words,
        "character_errors": by_character.substitutions + by_character.deletions + by_character.insertions,
        "characters": characters,
    }


@cache
def _english() -> "EnglishTextNormalizer":
    from whisper.normalizers import EnglishTextNormalizer

    return EnglishTextNormalizer()


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
