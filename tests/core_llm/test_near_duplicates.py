import random

import pytest

from core_llm.data.near_duplicates import NearDuplicates, folded, groups, overlap, repeated, shingles
from core_llm.errors import UserError


def sentence(rng: random.Random, n: int = 12) -> list[str]:
    return ["".join(rng.choices("abcdefghij", k=rng.randint(3, 8))) for _ in range(n)]


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("known", [True, False])
def test_the_pairs_are_those_of_a_brute_force_search(threshold: float, known: bool) -> None:
    rng = random.Random(0)
    texts: list[str] = []
    for _ in range(40):
        said = sentence(rng)
        texts.append(" ".join(said))
        for _ in range(3):  # one, two, three words changed: around the threshold
            said[rng.randrange(len(said))] = sentence(rng, 1)[0]
            texts.append(" ".join(said))
    texts += ["hi", "hi", "", *texts[:5]]
    grams = [shingles(text) for text in texts]
    index = NearDuplicates(texts, threshold) if known else NearDuplicates((), threshold, common=texts[::7])
    if not known:
        for text in texts:
            index.add(text)
    pairs = 0
    for i, text in enumerate(texts):
        expected = [j for j in range(len(texts)) if grams[i] and overlap(grams[i], grams[j]) >= threshold]
        assert index.find(text) == expected
        pairs += len(expected) - 1
    assert pairs >= 11  # there was something to find


def test_case_punctuation_width_and_blanks_make_no_difference() -> None:
    index = NearDuplicates(["How do I bake bread at home?"])
    assert index.find("  how do i BAKE bread, at home") == [0]
    assert index.find("Ｈｏｗ do I bake bread at home") == [0]
    assert index.find("how do I steal bread at night?") == []
    assert folded("It's  DONE!") == "it's done"


def test_short_and_empty_texts() -> None:
    index = NearDuplicates(["hi", "", "?!"])
    assert index.find("Hi!") == [0]
    assert index.find("") == [] and index.find("...") == [] and index.find("ho") == []


def test_groups_join_what_links_connect_and_keep_the_first() -> None:
    base = "one two three four five six seven eight nine ten eleven twelve"
    chain = [base, f"{base} thirteen", f"{base} thirteen fourteen"]
    ends = overlap(shingles(chain[0]), shingles(chain[2]))
    threshold = overlap(shingles(chain[0]), shingles(chain[1])) - 1e-9
    assert ends < threshold  # the ends are linked through the middle alone
    assert groups(["quite another text", *chain], threshold) == [0, 1, 1, 1]


def test_the_first_of_repeated_texts_is_kept() -> None:
    assert list(repeated(["a b c", "x y z", "A b C!", "x y z"])) == [False, False, True, True]


@pytest.mark.parametrize("threshold", [0, -1, 1.5, float("nan")])
def test_a_threshold_outside_its_range_is_refused(threshold: float) -> None:
    with pytest.raises(UserError, match="threshold"):
        NearDuplicates(threshold=threshold)
