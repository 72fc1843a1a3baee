"""Judges: one sample and one output to the sums that metrics are made of."""

import re
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from evals.tasks.base import Output, Sample, Unavailable

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


_NUMBERS = {
    **{word: str(number) for number, word in enumerate(_DIGITS)},
    **{"ten": "10", "none": "0"},
}
_ARTICLES = frozenset({"a", "an", "the"})


def vqa_normalised(text: str) -> str:
    """An answer as the VQA evaluation compares it: lower case, no articles, number words as digits.

    Commas and full stops stay only inside numbers. Apostrophes are left out on both sides, where the official
    script has a list of contractions (https://visualqa.org/evaluation.html).
    """
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower().replace("\n", " "))
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", "", text)
    text = re.sub(r"['\u2019]", "", text)
    text = re.sub(r"[;/\[\]\"{}()=+\\_\-><@`,?!]", " ", text)
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(word for word in words if word not in _ARTICLES)


def vqa(sample: Sample, output: Output) -> Mapping[str, float]:
    """VQA accuracy (Antol et al. 2015): min(1, matches / 3) against all answers but one, mean over which one.

    With a single reference answer it is an exact match.
    """
    said = vqa_normalised(output["text"])
    references = [vqa_normalised(answer) for answer in sample.answers]
    same = references.count(said)
    if len(references) == 1:
        return {"correct": float(same)}
    other = len(references) - same
    without_match, without_other = min(1.0, (same - 1) / 3), min(1.0, same / 3)
    return {"correct": (same * without_match + other * without_other) / len(references)}


ANLS_THRESHOLD = 0.5


def anls(sample: Sample, output: Output) -> Mapping[str, float]:
    """Average normalised Levenshtein similarity (Biten et al. 2019): the best over the references.

    1 - edits / length of the longer text, in lower case and single spaces; 0 where that is below 0.5.
    """
    from rapidfuzz.distance import Levenshtein

    said = _single_spaced(output["text"]).lower()
    best = max(
        Levenshtein.normalized_similarity(said, _single_spaced(answer).lower()) for answer in sample.answers
    )
    return {"correct": best if best >= ANLS_THRESHOLD else 0.0}


RELAXED_TOLERANCE = 0.05


def relaxed(sample: Sample, output: Output) -> Mapping[str, float]:
    """Relaxed accuracy (Masry et al. 2022, section 5.1): numbers within 5 %, everything else as it is."""
    said = output["text"].strip()
    return {"correct": float(any(_relaxed_equal(said, answer.strip()) for answer in sample.answers))}


def _relaxed_equal(said: str, truth: str) -> bool:
    number, wanted = _number(said), _number(truth)
    if number is not None and wanted:  # there is no 5 % of zero
        return abs(number - wanted) <= RELAXED_TOLERANCE * abs(wanted)
    return said.lower() == truth.lower()


def _number(text: str) -> float | None:
    """A number, or a percentage as its fraction."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def choice(sample: Sample, output: Output) -> Mapping[str, float]:
    """Whether the right choice is the likeliest, by its log-likelihood and by that per token."""
    right = sample.choices.index(sample.target)
    pairs = list(zip(output["logprobs"], output["tokens"], strict=True))
    per_token = [logprob / tokens for logprob, tokens in pairs]
    return {
        "correct": float(_argmax(output["logprobs"]) == right),
        "correct_norm": float(_argmax(per_token) == right),
    }


def _argmax(values: list[float]) -> int:
    """The first of the largest."""
    return max(range(len(values)), key=values.__getitem__)


def translation(sample: Sample, output: Output) -> Mapping[str, float]:
    """Matching and all n-grams of a translation, counted by sacrebleu in the target language's words."""
    counts = _bleu(sample.extra or "13a").corpus_score([output["text"].strip()], [[sample.target]])
    orders = zip(counts.counts, counts.totals, strict=True)
    sums: dict[str, float] = {"said_length": counts.sys_len, "truth_length": counts.ref_len}
    for n, (matches, total) in enumerate(orders, start=1):
        sums |= {f"matches_{n}": matches, f"ngrams_{n}": total}
    return sums


def bleu_words(language: str) -> str:
    """sacrebleu's name of how a language is cut into words."""
    return {"zh": "zh", "ja": "char"}.get(language.partition("-")[0].partition("_")[0], "13a")


@cache
def _bleu(tokenize: str) -> Any:
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise Unavailable(
            "BLEU is counted by sacrebleu: install it with pip install 'llama-herd[bleu]'"
        ) from None
    return BLEU(tokenize=tokenize)


def require_bleu() -> None:
    """Raise `Unavailable` where sacrebleu is missing, before any work."""
    _bleu("13a")


def memorised(sample: Sample, output: Output) -> Mapping[str, float]:
    """Whether greedy decoding gives the text's own continuation, token for token, and how likely it is."""
    return {"memorised": float(output["greedy"]), "logprob": output["logprob"], "tokens": output["tokens"]}
