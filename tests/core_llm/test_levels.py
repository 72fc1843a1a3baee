"""Questions of every level have the answer that an independent reading of the drawn positions gives."""

import random
import re
from collections import Counter

import pytest

from core_llm.data.levels import LEVELS, ask, level_question, sample_level_scene
from core_llm.data.scenes import COLUMNS, NUMBERS, ROWS, Item, Scene


def at(item: Item) -> tuple[int, int]:
    return COLUMNS.index(item.column), ROWS.index(item.row)


def on_side(side: str, a: Item, b: Item) -> bool:
    (xa, ya), (xb, yb) = at(a), at(b)
    return {"left": xa < xb, "right": xa > xb, "above": ya < yb, "below": ya > yb}[side]


def named(scene: Scene, name: str) -> Item:
    (found,) = [item for item in scene.items if f"{item.color} {item.shape}" == name]
    return found


def relation_answer(scene: Scene, text: str) -> str:
    if match := re.fullmatch(r"what is (left|right|above|below)(?: of)? the (\w+ \w+)\?", text):
        (one,) = [i for i in scene.items if on_side(match[1], i, named(scene, match[2]))]
        return f"{one.color} {one.shape}"
    if match := re.fullmatch(r"is the (\w+ \w+) (left|above) or (right|below)(?: of)? the (\w+ \w+)\?", text):
        first, second = named(scene, match[1]), named(scene, match[4])
        return next(side for side in (match[2], match[3]) if on_side(side, first, second))
    match = re.fullmatch(r"is the (\w+ \w+) (left|right|above|below)(?: of)? the (\w+ \w+)\?", text)
    assert match, text
    return "yes" if on_side(match[2], named(scene, match[1]), named(scene, match[3])) else "no"


def chart_answer(scene: Scene, text: str) -> str:
    height = {bar.color: bar.height for bar in scene.bars}
    words = text.rstrip("?").split()
    if words[0] == "which":
        extreme = (max if "tallest" in words else min)(height.values())
        (color,) = [color for color, value in height.items() if value == extreme]
        return color
    if words[0] == "is":
        return "yes" if height[words[2]] > height[words[7]] else "no"
    return NUMBERS[height[words[4]] if words[1] == "tall" else len(height)]


def count_answer(scene: Scene, text: str) -> str:
    match = re.match(r"how many (.*) are (?:there|in the image)\?", text)
    assert match, text
    noun = match[1].split()
    n = sum(all(w in ("shapes", i.color, f"{i.shape}s") for w in noun) for i in scene.items)
    return NUMBERS[n]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("skill", LEVELS[3].skills)
def test_answers_are_true(level: int, skill: str) -> None:
    if skill not in LEVELS[level].skills:
        with pytest.raises(ValueError, match="has no questions of skill"):
            sample_level_scene(random.Random(0), level, skill)
        return
    rng = random.Random(f"{level} {skill}")
    answers: Counter[str] = Counter()
    for _ in range(400):
        scene, asked = ask(rng, level, skill)
        (question,) = asked
        assert question.skill == skill
        answers[question.answer] += 1
        if skill == "relation":
            assert question.answer == relation_answer(scene, question.text)
        elif skill == "chart":
            assert question.answer == chart_answer(scene, question.text)
        elif skill == "count":
            assert question.answer == count_answer(scene, question.text)
        elif skill == "word":
            assert question.answer == scene.word and len(question.answer.split()) == LEVELS[level].words
        elif skill == "position" and question.text.startswith("what is at the "):
            place = question.text.removeprefix("what is at the ").rstrip("?")
            assert (question.answer, place) in {(item.name, item.place) for item in scene.items}
        elif skill == "position":
            assert named(scene, " ".join(question.text.rstrip("?").split()[-2:])).place == question.answer
    assert len(answers) > 1 and answers.most_common(1)[0][1] < 0.65 * 400, answers


def test_levels_keep_their_sizes_and_seeds_their_scenes() -> None:
    for level, shape in LEVELS.items():
        for skill in shape.skills:
            again = [ask(random.Random(f"{level} {skill}"), level, skill, 4, shape.skills) for _ in range(2)]
            assert again[0] == again[1] and len(again[0][1]) == 4
            scene = again[0][0]
            for found, (least, most) in ((scene.items, shape.shapes), (scene.bars, shape.bars)):
                assert not found or least <= len(found) <= most
            cells = {(item.row, item.column) for item in scene.items}
            assert len(cells) == len(scene.items)
            assert len({bar.color for bar in scene.bars}) == len(scene.bars)


def test_unknown_level_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="known: 1, 2, 3"):
        sample_level_scene(random.Random(0), 4, "count")


def test_ambiguous_relations_are_not_asked() -> None:
    twins = tuple(Item("circle", "red", "small", "top", column) for column in COLUMNS)
    assert level_question(Scene(twins), random.Random(0), 2, "relation") is None
    assert level_question(Scene((), "cat"), random.Random(0), 2, "relation") is None
