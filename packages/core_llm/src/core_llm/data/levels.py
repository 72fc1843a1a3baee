"""Scenes and questions in three levels of difficulty, by skill; every answer follows from the symbols.

Level 1 is one shape. Level 2 has two to five shapes, one word, or a chart of two to four bars. Level 3 has
six to nine shapes, two words, or a chart of five or six bars whose heights are asked for. The nano core's
own texts stop at `core_llm.data.scenes`: relations and charts are what an image adapter adds.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from core_llm.data.scenes import (
    COLORS,
    COLUMNS,
    NUMBERS,
    ROWS,
    SHAPES,
    SIZES,
    WORDS,
    Bar,
    Item,
    Question,
    Scene,
    attribute_of_one_question,
    attribute_question,
    count_question,
    place_question,
    presence_question,
    word_question,
)

SKILLS = ("color", "shape", "presence", "position", "count", "relation", "word", "chart")
TALLEST = 6  # units of the highest bar
_SIDES = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}  # row, column


@dataclass(frozen=True)
class Level:
    """How many shapes, words and bars a scene has (least, most), and what may be asked."""

    shapes: tuple[int, int]
    words: int
    bars: tuple[int, int]
    skills: tuple[str, ...]


LEVELS = {
    1: Level((1, 1), 0, (0, 0), ("color", "shape", "presence", "position")),
    2: Level((2, 5), 1, (2, 4), SKILLS),
    3: Level((6, 9), 2, (5, 6), SKILLS),
}


def sample_level_scene(rng: random.Random, level: int, skill: str) -> Scene:
    """A random scene of a level about which the skill can be asked.

    Raises `ValueError` for a level or a skill that there is not.
    """
    shape = _level(level)
    if skill not in shape.skills:
        raise ValueError(
            f"level {level} has no questions of skill '{skill}'; it has {', '.join(shape.skills)}"
        )
    if skill == "word":
        return Scene((), " ".join(rng.sample(WORDS, shape.words)))
    if skill == "chart":
        colors = rng.sample(COLORS, rng.randint(*shape.bars))
        return Scene((), None, tuple(Bar(color, rng.randint(1, TALLEST)) for color in colors))
    cells = rng.sample([(row, column) for row in ROWS for column in COLUMNS], rng.randint(*shape.shapes))
    return Scene(
        tuple(
            Item(rng.choice(SHAPES), rng.choice(COLORS), rng.choice(SIZES), row, column)
            for row, column in cells
        )
    )


def level_question(scene: Scene, rng: random.Random, level: int, skill: str) -> Question | None:
    """A question of that skill about the scene, or None where the scene has no unambiguous one."""
    if scene.word is not None:
        maker = words_question if " " in scene.word else word_question
        return maker(scene.word, rng) if skill == "word" else None
    if scene.bars:
        return chart_question(scene.bars, rng, heights=level >= 3) if skill == "chart" else None
    return _MAKERS[skill](scene.items, rng, level) if skill in _MAKERS else None


def ask(
    rng: random.Random, level: int, skill: str, n: int = 1, others: Sequence[str] = ()
) -> tuple[Scene, list[Question]]:
    """A scene of a level with n questions, the first of that skill, the others drawn over `others` too."""
    while True:
        scene = sample_level_scene(rng, level, skill)
        first = level_question(scene, rng, level, skill)
        if first is not None:
            break
    asked = [first]
    while len(asked) < n:
        more = level_question(scene, rng, level, rng.choice((skill, *others)))
        if more is not None:
            asked.append(more)
    return scene, asked


def relation_question(items: Sequence[Item], rng: random.Random) -> Question | None:
    """How two items stand to each other: yes or no, which of two sides, or what is on a side of one."""
    named = _by_own_name(items)
    if len(named) < 2:
        return None
    first, second = rng.sample(named, 2)
    way = rng.randrange(3)
    if way == 2:
        side = rng.choice(tuple(_SIDES))
        there = [item for item in items if _is(item, side, second)]
        if len(there) != 1:
            return None
        return Question(f"what is {_phrase(side)} the {second.name}?", there[0].name, "relation")
    options = [("left", "right")] * (first.column != second.column)
    options += [("above", "below")] * (first.row != second.row)
    sides = rng.choice(options)
    truth = next(side for side in sides if _is(first, side, second))
    if way == 1:
        text = f"is the {first.name} {_either(sides)} the {second.name}?"
        return Question(text, truth, "relation")
    said = rng.choice(sides)
    text = f"is the {first.name} {_phrase(said)} the {second.name}?"
    return Question(text, "yes" if said == truth else "no", "relation")


def chart_question(bars: Sequence[Bar], rng: random.Random, heights: bool) -> Question | None:
    """Which bar is the tallest or shortest, which of two is taller, how many there are; with `heights`, how
    tall one is."""
    way = rng.choice(("extreme", "extreme", "compare", "count", *(("height", "height") if heights else ())))
    if way == "extreme":
        tallest = rng.random() < 0.5
        extreme = (max if tallest else min)(bar.height for bar in bars)
        found = [bar for bar in bars if bar.height == extreme]
        text = f"which bar is the {'tallest' if tallest else 'shortest'}?"
        return Question(text, found[0].color, "chart") if len(found) == 1 else None
    if way == "compare":
        first, second = rng.sample(list(bars), 2)
        text = f"is the {first.color} bar taller than the {second.color} bar?"
        return Question(text, "yes" if first.height > second.height else "no", "chart")
    if way == "count":
        return Question("how many bars are there?", NUMBERS[len(bars)], "chart")
    bar = rng.choice(list(bars))
    return Question(f"how tall is the {bar.color} bar?", NUMBERS[bar.height], "chart")


def named_count_question(items: Sequence[Item], rng: random.Random) -> Question:
    """How many of one colour and shape together? Three times in ten of a pair drawn at random."""
    color, shape = rng.choice([(item.color, item.shape) for item in items])
    if rng.random() < 0.3:
        color, shape = rng.choice(COLORS), rng.choice(SHAPES)
    n = sum(item.name == f"{color} {shape}" for item in items)
    return Question(f"how many {color} {shape}s are there?", NUMBERS[n], "count")


def words_question(words: str, rng: random.Random) -> Question:
    """Which words are written, from top to bottom?"""
    text = rng.choice(("what words are written?", "what does the sign say?", "read the words."))
    return Question(text, words, "word")


def _level(level: int) -> Level:
    if level not in LEVELS:
        raise ValueError(f"unknown level {level}; known: {', '.join(map(str, LEVELS))}")
    return LEVELS[level]


def _by_own_name(items: Sequence[Item]) -> list[Item]:
    return [item for item in items if sum(other.name == item.name for other in items) == 1]


def _is(first: Item, side: str, second: Item) -> bool:
    """Whether the first lies on that side of the second, by the cells' rows and columns."""
    down, across = _SIDES[side]
    if down:
        return (ROWS.index(first.row) - ROWS.index(second.row)) * down > 0
    return (COLUMNS.index(first.column) - COLUMNS.index(second.column)) * across > 0


def _phrase(side: str) -> str:
    return side if side in ("above", "below") else f"{side} of"


def _either(sides: tuple[str, str]) -> str:
    return f"{sides[0]} or {_phrase(sides[1])}"


def _attribute(items: Sequence[Item], rng: random.Random, skill: str) -> Question | None:
    asked = attribute_question(items, rng) if len(items) == 1 else attribute_of_one_question(items, rng)
    return asked if asked.skill == skill else None


def _count(items: Sequence[Item], rng: random.Random, level: int) -> Question:
    named = level >= 3 and rng.random() < 0.4
    return named_count_question(items, rng) if named else count_question(items, rng)


def _located(items: Sequence[Item], rng: random.Random) -> Question | None:
    if len(items) > 1 and rng.random() < 0.5:
        item = rng.choice(list(items))
        return Question(f"what is at the {item.place}?", item.name, "position")
    asked = place_question(items, rng)
    return asked if asked.skill == "position" else None


_MAKERS: dict[str, Callable[[Sequence[Item], random.Random, int], Question | None]] = {
    "color": lambda items, rng, level: _attribute(items, rng, "color"),
    "shape": lambda items, rng, level: _attribute(items, rng, "shape"),
    "presence": lambda items, rng, level: presence_question(items, rng),
    "position": lambda items, rng, level: _located(items, rng),
    "count": _count,
    "relation": lambda items, rng, level: relation_question(items, rng),
}
