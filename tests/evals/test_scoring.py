import jiwer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core_llm import stats
from evals.tasks import scoring
from evals.tasks.base import Sample


def judged(truth: str, said: str) -> dict[str, float]:
    return dict(scoring.transcript(Sample("0", "g", (), truth), {"text": said}))


words = st.lists(st.sampled_from(["one", "two", "three", "for", "fore", "Four,", "it's"]), max_size=6)


@settings(max_examples=60, deadline=None)
@given(words.filter(bool), words)
def test_raw_error_rates_are_jiwers(truth: list[str], said: list[str]) -> None:
    reference, hypothesis = " ".join(truth), " ".join(said)
    rows = [judged(reference, f" {hypothesis}\n")]
    rates = stats.estimate(["wer_raw", "cer_raw"], rows, ["g"])
    assert rates["wer_raw"].value == pytest.approx(jiwer.wer(reference, hypothesis))
    assert rates["cer_raw"].value == pytest.approx(jiwer.cer(reference, hypothesis))


def test_three_spellings_stand_beside_each_other() -> None:
    sums = judged("two five", " Two 5.")
    assert sums["correct"] == 1.0 and sums["word_errors"] == 0
    assert (sums["word_errors_raw"], sums["words_raw"]) == (2, 2)
    # openai-whisper's normaliser joins number words and leaves digits apart: "25" and "2 5".
    assert (sums["word_errors_english"], sums["words_english"]) == (2, 1)
    assert judged("two five", "Twenty five.")["word_errors_english"] == 0
    colour = judged("the colour is grey", "The color is gray.")
    assert colour["word_errors_english"] == 0 and colour["word_errors"] == 2


def test_what_has_no_words_is_all_inserted_or_all_deleted() -> None:
    assert judged("two five", "")["word_errors"] == 2 and judged("two", "...")["character_errors"] == 3
    # The normaliser for English drops "um", and with it the whole reference.
    nothing = judged("um", "two")
    assert (nothing["word_errors_english"], nothing["words_english"]) == (1, 0)
