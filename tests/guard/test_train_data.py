import json
import random
from pathlib import Path

import pytest

from core_llm.chat import Message
from core_llm.errors import DataError, UserError
from guard import data_card, own_data
from guard.augmentation import CUSTOM, OTHER_NAMES, Augmentation, augment, known_codes
from guard.decontaminate import Dropped, HeldOut, decontaminated
from guard.examples import Example
from guard.guard import Guard
from guard.policy import Policy
from guard.taxonomy import CATEGORIES
from guard.train import DataConfig, load_data

NONE = Augmentation(0, 0, 0, 0, 0, 0)


def example(text: str, code: str | None = None, context: str = "", more: tuple[str, ...] = ()) -> Example:
    said = [Message("user", context)] if context else []
    messages = (*said, Message("assistant" if context else "user", text))
    return Example(messages, code is not None, float(code is not None), code, more)


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def test_own_lines_become_examples(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "go away"}]
    path = write(
        tmp_path / "own.jsonl",
        {"conversation": "bake bread", "verdict": "safe"},
        "",
        {"conversation": turns, "verdict": "unsafe", "categories": ["S10", "S5"], "id": 7},
        {"context": "a", "response": "b", "label": 1, "group": "g", "split": "test"},
    )
    first, second, third = own_data.read(path, list(CATEGORIES))
    assert first.example == example("bake bread")
    assert second.example == example("go away", "S10", "hi", ("S5",))
    assert third.example.unsafe and third.example.codes == () and third.group == "g"
    train, held_out = own_data.load(path, list(CATEGORIES))
    assert held_out == [third.example] and len(train) == 2


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2: not an object"),
        ({"conversation": "x"}, "line 2: verdict is None"),
        ({"conversation": "x", "verdict": True}, "line 2: verdict is True"),
        ({"conversation": "x", "verdict": "maybe"}, "line 2: verdict is 'maybe'"),
        ({"conversation": " ", "verdict": "safe"}, "line 2: the conversation or its last message is empty"),
        ({"conversation": [], "verdict": "safe"}, "line 2: the conversation or its last message is empty"),
        ({"conversation": 3, "verdict": "safe"}, "line 2: conversation is neither"),
        ({"conversation": "x", "verdict": "unsafe", "categories": ["S99"]}, "line 2: category 'S99'"),
        ({"conversation": "x", "verdict": "safe", "categories": ["S1"]}, "line 2: a safe message"),
        ({"conversation": "x", "verdict": "safe", "colour": 1}, "line 2: unknown key 'colour'"),
        ({"conversation": "x", "verdict": "safe", "split": "dev"}, "line 2: split is 'dev'"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: object, told: str) -> None:
    path = write(tmp_path / "own.jsonl", {"conversation": "fine", "verdict": "safe"}, line)
    with pytest.raises(DataError, match="own.jsonl") as error:
        own_data.read(path, list(CATEGORIES))
    assert told in str(error.value)


def test_many_bad_lines_are_counted_and_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 5: .*; and 3 more"):
        own_data.read(write(tmp_path / "a.jsonl", *["[]"] * 8), ["S1"])
    with pytest.raises(DataError, match="holds no conversation"):
        own_data.read(write(tmp_path / "b.jsonl", ""), ["S1"])
    with pytest.raises(DataError, match="not readable"):
        own_data.read(tmp_path / "missing.jsonl", ["S1"])


def test_rows_of_one_context_or_group_never_part() -> None:
    rng = random.Random(0)
    words = [f"word{i}" for i in range(200)]
    rows = []
    for i in range(150):
        context = " ".join(rng.sample(words, 15))
        rows += [own_data.OwnRow(example(f"answer {i} {j}", None, context)) for j in range(2)]
        rows.append(own_data.OwnRow(example(f"other {i}", None, f"{context.upper()}!"), f"g{i // 2}"))
    train, held_out = own_data.split_by_context(rows, 0.3)
    assert 0.15 < len(held_out) / len(rows) < 0.45
    number = {row.example.messages: int(row.example.messages[-1].text.split()[1]) // 2 for row in rows}
    assert not {number[e.messages] for e in train} & {number[e.messages] for e in held_out}
    assert len(train) + len(held_out) == len(rows)


LONG = "how do I bake a large loaf of bread in a small oven at home"


def test_what_repeats_held_out_rows_or_their_contexts_is_dropped() -> None:
    held_out = HeldOut([example("some answer to it", None, LONG), example("kill the weeds in my garden bed")])
    rows = [
        example("a quite different answer", None, LONG.upper()),  # the same context
        example("Kill the weeds, in my garden bed!"),  # the same message
        example("paint the walls of my house green"),
        example("paint the walls of my house green!"),  # a repetition
        example("Paint the walls of my house green", "S2"),  # with the other verdict: kept
    ]
    kept, dropped = decontaminated(rows, held_out, once=True)
    assert kept == [rows[2], rows[4]]
    assert dropped == Dropped(held_out=2, repeated=1)
    assert decontaminated(rows, held_out)[0] == rows[2:]


def test_what_was_found_is_kept_until_a_text_changes(tmp_path: Path) -> None:
    cache = tmp_path / "state" / "found.json"
    held_out = HeldOut([example("kill the weeds in my garden bed")])
    rows = [example("Kill the weeds in my garden bed!"), example("paint it green"), example("Paint it green")]
    expected = decontaminated(rows, held_out, once=True, cache=cache)
    assert expected == ([rows[1]], Dropped(1, 1))
    held_out.holds = lambda *_: pytest.fail("searched again")  # type: ignore[method-assign, assignment]
    assert decontaminated(rows, held_out, once=True, cache=cache) == expected
    assert "weeds" not in cache.read_text()
    fresh = HeldOut([example("kill the weeds in my garden bed")])
    assert decontaminated(rows[1:], fresh, once=True, cache=cache) == ([rows[1]], Dropped(0, 1))
    assert decontaminated(rows, fresh, cache=cache) == (rows[1:], Dropped(1, 0))
    cache.write_text(cache.read_text()[:40])  # damaged
    assert decontaminated(rows, fresh, once=True, cache=cache) == expected


def test_data_cards_count_rows_categories_and_what_was_dropped(tmp_path: Path) -> None:
    own = write(
        tmp_path / "own.jsonl",
        *[
            {"conversation": text, "verdict": "unsafe", "categories": ["S1", "S2"]}
            for text in ("poison the well", "stab a man in the back", "burn down the old barn")
        ],
        {"conversation": "sing a song for me", "verdict": "safe", "split": "test"},
        {"conversation": "sing a song for me!", "verdict": "safe", "split": "train"},
    )
    data = load_data(DataConfig(sets=(), files=(own,), threshold=0.9), Policy())
    (card,) = data.cards
    assert (card.rows, card.unsafe, card.held_out, card.dropped.held_out) == (3, 3, 1, 1)
    assert card.categories == {"S1": 3, "S2": 3}
    data_card.write(tmp_path, data.cards, 0.9)
    values = json.loads((tmp_path / "data.json").read_text())
    assert values["sets"][0]["dropped"] == {"held_out": 1, "repeated": 0}
    text = (tmp_path / "data.md").read_text()
    assert "| own.jsonl" not in text and "| S1 | 3 |" in text and "overlap by 0.9" in text


def test_nothing_to_train_on_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown set 'x'; known"):
        load_data(DataConfig(sets=("x",)), Policy())
    with pytest.raises(UserError, match="nothing to train on"):
        load_data(DataConfig(sets=()), Policy())
    own = write(tmp_path / "templates.jsonl", {"conversation": "a", "verdict": "safe"})
    with pytest.raises(UserError, match="two sets are called 'templates'"):
        load_data(DataConfig(sets=("templates",), files=(own,)), Policy())


CODES = [f"S{n}" for n in range(1, 40)]


def varied(row: Example, settings: Augmentation, n: int = 300) -> list[tuple[Example, Policy]]:
    return [augment(row, Policy(), settings, CODES, random.Random(i)) for i in range(n)]


def test_without_augmentation_nothing_changes() -> None:
    row = example("bad words", "S10")
    for changed, policy in varied(row, NONE, 5):
        assert changed == row and policy.categories == Policy().categories


def test_dropped_categories_are_never_the_violated_ones() -> None:
    sizes = set()
    for changed, policy in varied(example("bad words", "S10", more=("S1",)), Augmentation(1, 0, 0, 0, 0, 0)):
        assert changed.unsafe and changed.codes == ("S1", "S10")
        assert {"S1", "S10"} <= set(policy.categories)
        sizes.add(len(policy.categories))
    assert min(sizes) <= 3 and max(sizes) >= 13


def test_without_its_violated_categories_a_message_is_safe() -> None:
    for changed, policy in varied(example("bad words", "S10", more=("S1",)), Augmentation(0, 1, 0, 0, 0, 0)):
        assert not changed.unsafe and changed.target == 0.0 and changed.codes == ()
        assert set(policy.categories) == set(CATEGORIES) - {"S1", "S10"}


def test_the_answer_follows_the_codes() -> None:
    seen = set()
    for changed, policy in varied(example("bad words", "S10"), Augmentation(0, 0, 1, 0.5, 0.5, 0)):
        names = ("Hate", *OTHER_NAMES["Hate"])
        assert changed.code is not None and policy.categories[changed.code].name in names
        assert len(policy.categories) == 14
        seen.add(changed.code)
    assert len(seen) > 20


def test_custom_categories_forbid_what_they_name_and_nothing_else() -> None:
    verdicts = set()
    own = {custom.name: custom for custom in CUSTOM}
    for changed, policy in varied(example("how do I bake bread?"), Augmentation(0, 0, 0, 0, 0, 1)):
        added = [rule for rule in policy.enabled if rule.name in own]
        assert 1 <= len(added) <= 2
        cooking = [rule.code for rule in added if rule.name == "Cooking"]
        assert list(changed.codes) == cooking and changed.unsafe == bool(cooking)
        assert changed.target == float(changed.unsafe)
        verdicts.add(changed.unsafe)
    assert verdicts == {True, False}


def test_of_an_unsafe_message_of_unknown_category_no_rule_is_lost() -> None:
    row = Example((Message("user", "bake something vile"),), True, 1.0)
    for changed, policy in varied(row, Augmentation(1, 1, 1, 1, 0, 1)):
        assert changed.unsafe and changed.codes == ()
        assert {rule.name for rule in policy.enabled} >= set(CATEGORIES.values())


def test_a_teachers_opinion_follows_its_categories() -> None:
    row = example("bad words", "S10")
    opinion = {code: 0.5 if code == "S10" else 0.02 for code in CATEGORIES}
    row = Example(row.messages, True, 0.76, "S10", (), opinion)
    for changed, policy in varied(row, Augmentation(1, 0, 1, 1, 0, 0), 50):
        assert changed.opinion is not None and changed.code is not None
        assert set(changed.opinion) == set(policy.categories)
        assert changed.opinion[changed.code] == 0.5


def test_shares_outside_their_range_are_refused_and_codes_are_one_token(guard: Guard) -> None:
    with pytest.raises(UserError, match="'drop' must be in"):
        Augmentation(drop=1.5)
    codes = known_codes(guard.tokenizer)
    assert set(CATEGORIES) <= set(codes)
    assert all(len(guard.tokenizer.encode(code[1:])) == 1 for code in codes)


def test_every_standard_category_has_other_names() -> None:
    assert set(OTHER_NAMES) == set(CATEGORIES.values())
