"""N-gram overlap against a search through the words, and the command."""

import json
import random
from pathlib import Path

import pytest

from core_llm.chat import Message
from core_llm.data.near_duplicates import words
from core_llm.errors import DataError, UserError
from evals import cli_tasks, contamination
from evals.samples.make_fixtures import FIXTURES
from evals.tasks.base import Sample


def searched(text: str, training: list[str], n: int) -> int:
    """Words of the text that lie in an n-gram of the training set, by looking at every place."""
    said, covered = words(text), set()
    known = [f" {' '.join(words(other))} " for other in training]
    for i in range(len(said) - n + 1):
        if any(f" {' '.join(said[i : i + n])} " in other for other in known):
            covered.update(range(i, i + n))
    return len(covered)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_overlap_is_what_a_search_finds(n: int) -> None:
    rng = random.Random(n)
    vocabulary = ["Ada,", "sees", "the", "House", "it's", "red", "9"]
    rows = [(str(i), " ".join(rng.choices(vocabulary, k=rng.randint(0, 12)))) for i in range(40)]
    training = [" ".join(rng.choices(vocabulary, k=15)) for _ in range(6)]
    found = contamination.overlap(rows, iter(training), n)
    texts = dict(rows)
    assert found.texts == 6 and found.too_short == sum(len(words(text)) < n for text in texts.values())
    for row in found.rows:
        assert (row.words, row.shared) == (len(words(texts[row.id])), searched(texts[row.id], training, n))


def test_a_copied_row_is_found_whatever_its_case_and_a_new_one_is_not(tmp_path: Path) -> None:
    rows = [("copied", "Which of these can fly over a house at night?"), ("new", "a b c d e f g h i j")]
    training = ["before it: WHICH of these -- can fly over a house, at night? and after"]
    found = contamination.overlap(rows, training)
    assert [(row.id, row.share) for row in found.contaminated(0.5)] == [("copied", 1.0)]


def test_the_command_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, output = tmp_path / "train.jsonl", tmp_path / "found.json"
    said = "How do I break into my neighbour's house at night?"
    train.write_text(json.dumps({"messages": [{"role": "user", "content": f"Well. {said}"}]}) + "\n")
    cli_tasks.contamination("xstest", str(train), FIXTURES, "all", output=output)
    found = json.loads(output.read_text())
    assert (found["rows"], found["contaminated"], found["training_texts"]) == (7, 1, 1)
    assert found["too_short"] == 1
    assert found["contaminated_rows"][0]["share"] == 1.0
    assert "1 of 7 rows have at least 50% of their words" in capsys.readouterr().out


def test_choices_and_answers_belong_to_the_text_labels_and_letters_do_not() -> None:
    question = (Message("user", "Which can fly?"),)
    of_choices = Sample("0", "0", question, "1", choices=(" a stone", " a sparrow"))
    assert contamination.text_of(of_choices) == "Which can fly? a stone a sparrow"
    assert contamination.text_of(Sample("0", "0", question, "a bird")) == "Which can fly? a bird"
    assert contamination.text_of(Sample("0", "0", question, "B", choices=("A", "B"))) == "Which can fly?"
    assert contamination.text_of(Sample("0", "0", question, "unsafe"), labelled=True) == "Which can fly?"


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: neither a file nor a dataset"):
        cli_tasks.contamination("xstest", "nowhere", FIXTURES, "all")
    with pytest.raises(UserError, match="--n must be at least 1"):
        cli_tasks.contamination("xstest", "gsm8k", FIXTURES, "all", n=0)
    with pytest.raises(UserError, match="--share must lie"):
        cli_tasks.contamination("xstest", "gsm8k", FIXTURES, "all", share=2.0)
    broken = tmp_path / "train.jsonl"
    broken.write_text("{not json\n")
    with pytest.raises(DataError, match="train.jsonl"):
        cli_tasks.contamination("xstest", str(broken), FIXTURES, "all")
