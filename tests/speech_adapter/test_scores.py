import pytest

from speech_adapter.scores import word_error_rates


def test_the_control_is_no_score_where_neighbours_say_the_same() -> None:
    said = [word for word in ("zero", "one", "two", "three", "four") for _ in range(50)]
    rates = word_error_rates(said, said)
    assert rates["wer"] == 0.0
    assert rates["wer_shuffled"] == pytest.approx(0.8, abs=0.1)  # a fifth of the others say the same


def test_two_clips_are_exchanged() -> None:
    assert word_error_rates(["one", "two"], ["one", "two"]) == {"wer": 0.0, "wer_shuffled": 1.0}
    assert word_error_rates(["one", "two six"], ["one", "two"])["wer"] == pytest.approx(1 / 3)
