"""The metrics of the public benchmarks against other ways to the same number."""

import random
from statistics import mean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core_llm import stats
from evals.tasks import scoring
from evals.tasks.base import Sample


def row(*answers: str) -> Sample:
    return Sample("0", "g", (), answers[0], answers=answers)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("The dog.", "dog"),
        ("2,000 people", "2000 people"),
        ("3.5", "3.5"),
        ("Two dogs", "2 dogs"),
        ("don't", "dont"),
        ("t-shirt", "t shirt"),
        (" YES!\n", "yes"),
        ("7:30", "7:30"),
        ("an ", ""),
    ],
)
def test_answers_are_compared_as_the_vqa_evaluation_does(said: str, expected: str) -> None:
    assert scoring.vqa_normalised(said) == expected


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from(["red", "Red.", "blue", "a red", "green"]), min_size=2, max_size=10))
def test_vqa_accuracy_leaves_each_annotator_out_once(answers: list[str]) -> None:
    same = [scoring.vqa_normalised(answer) == "red" for answer in answers]
    expected = mean(min(1.0, sum(same[:i] + same[i + 1 :]) / 3) for i in range(len(same)))
    assert scoring.vqa(row(*answers), {"text": "the red"})["correct"] == pytest.approx(expected)


def test_vqa_accuracy_of_three_in_ten_is_nine_tenths() -> None:
    sample = row(*["red"] * 3, *["blue"] * 7)
    assert scoring.vqa(sample, {"text": "red"})["correct"] == pytest.approx(0.9)
    assert scoring.vqa(sample, {"text": "blue"})["correct"] == 1.0
    assert scoring.vqa(row("red"), {"text": "Red"})["correct"] == 1.0


def edits(a: str, b: str) -> int:
    """Levenshtein distance by the textbook's table."""
    line = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        line, above = [i], line
        for j, y in enumerate(b, 1):
            line.append(min(above[j] + 1, line[-1] + 1, above[j - 1] + (x != y)))
    return line[-1]


@settings(max_examples=80, deadline=None)
@given(st.text("ab1 ", max_size=9), st.lists(st.text("ab1", min_size=1, max_size=9), min_size=1, max_size=3))
def test_anls_is_the_best_similarity_above_one_half(said: str, answers: list[str]) -> None:
    clean = " ".join(said.split())
    best = max(1 - edits(clean, answer) / max(len(clean), len(answer)) for answer in answers)
    expected = best if best >= 0.5 else 0.0
    assert scoring.anls(row(*answers), {"text": said.upper()})["correct"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("said", "truth", "right"),
    [
        ("10.4", "10", True),
        ("10.6", "10", False),
        ("-9.5", "-10", True),
        ("50%", "0.5", True),
        ("0", "0", True),
        ("0.01", "0", False),
        ("Germany", "germany", True),
        ("in Germany", "Germany", False),
        ("2010", "2010 ", True),
    ],
)
def test_relaxed_accuracy_gives_numbers_five_per_cent(said: str, truth: str, right: bool) -> None:
    assert scoring.relaxed(row(truth), {"text": said})["correct"] == float(right)


def test_the_likeliest_choice_counts_by_text_and_by_token() -> None:
    sample = Sample("0", "g", (), "B", choices=("A", "B"))
    sums = scoring.choice(sample, {"logprobs": [-3.0, -4.0], "tokens": [1, 4]})
    assert sums == {"correct": 0.0, "correct_norm": 1.0}


WORDS = ["the", "a", "small", "large", "dog", "cat", "sees", ",", "it", ".", "that", "house"]


@pytest.mark.parametrize("seed", range(4))
def test_corpus_bleu_is_sacrebleus(seed: int) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    rng = random.Random(seed)
    truth = [" ".join(rng.choices(WORDS, k=rng.randint(1, 14))) for _ in range(20)]
    noise = (0.0, 0.1, 0.5, 1.0)[seed]
    said = [" ".join(rng.choice(WORDS) if rng.random() < noise else w for w in t.split()) for t in truth]
    said[0] = ""
    rows = [
        scoring.translation(Sample("0", "g", (), t, extra="13a"), {"text": s}) for t, s in zip(truth, said)
    ]
    found = stats.estimate(["bleu"], rows, [str(i // 2) for i in range(20)], resamples=200)["bleu"]
    assert found.value == pytest.approx(sacrebleu.corpus_bleu(said, [truth]).score)
    assert found.low <= found.value <= found.high or noise == 0.0
    # Weighted sums over groups are what a corpus with rows twice would have.
    columns = stats.columns_of(rows)
    twice = np.ones((1, 20))
    twice[0, :5] = 2
    again = sacrebleu.corpus_bleu(said + said[:5], [truth + truth[:5]]).score
    assert float(stats.METRICS["bleu"](columns, twice)[0]) == pytest.approx(again)


def test_bleu_of_nothing_in_common_is_zero() -> None:
    pytest.importorskip("sacrebleu")
    rows = [
        scoring.translation(Sample("0", "g", (), "one two three four five", extra="13a"), {"text": "x y"})
    ]
    assert stats.estimate(["bleu"], rows, ["g"])["bleu"].value == 0.0
    assert [scoring.bleu_words(code) for code in ("zh-CN", "ja", "de", "en_us")] == [
        "zh",
        "char",
        "13a",
        "13a",
    ]
