"""Symbolic scenes: what is in a picture, said in words, with questions whose truth is known.

No pixels here. The core learns these as text; `vision_adapter.scenes` draws the same scenes, so an
image adapter can later take the place of the description.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("red", "green", "blue", "yellow", "brown", "gray", "black", "teal")
SIZES = ("small", "large")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = (
    "apple", "bird", "boat", "book", "bread", "bus", "cake", "car", "cat", "chair", "cloud", "cup",
    "dog", "door", "fish", "flag", "frog", "hat", "home", "key", "lamp", "leaf", "moon", "open", "park",
    "rain", "ring", "road", "rock", "ship", "shoe", "sky", "snow", "star", "stop", "sun", "taxi",
    "tent", "tree", "wave",
)  # fmt: skip
KINDS = ("single", "several", "word")
SKILLS = ("color", "shape", "presence", "count", "position", "word")


@dataclass(frozen=True)
class Item:
    """One shape; row and column name its cell in a 3 × 3 grid over the picture."""

    shape: str
    color: str
    size: str
    row: str
    column: str

    @property
    def name(self) -> str:
        """Colour and shape."""
        return f"{self.color} {self.shape}"

    @property
    def place(self) -> str:
        """Cell in words; the middle of the picture is "center"."""
        if self.row == "middle":
            return self.column
        return self.row if self.column == "center" else f"{self.row} {self.column}"


@dataclass(frozen=True)
class Bar:
    """One bar of a chart; no two bars of a chart share a colour. height: 1 to 6 units."""

    color: str
    height: int


@dataclass(frozen=True)
class Scene:
    """Shapes in different cells, or written words one above the other, or the bars of a chart."""

    items: tuple[Item, ...]
    word: str | None = None
    bars: tuple[Bar, ...] = ()


@dataclass(frozen=True)
class Question:
    """A question about a scene, its one right answer, and the skill that it tests."""

    text: str
    answer: str
    skill: str


def sample_scene(rng: random.Random, kind: str = "single") -> Scene:
    """A random scene: "single" one shape, "several" two to five in different cells, "word" a written word."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of scene '{kind}'; known: {', '.join(KINDS)}")
    if kind == "word":
        return Scene((), rng.choice(WORDS))
    n = 1 if kind == "single" else rng.randint(2, 5)
    cells = rng.sample([(row, column) for row in ROWS for column in COLUMNS], n)
    items = [
        Item(rng.choice(SHAPES), rng.choice(COLORS), rng.choice(SIZES), row, column) for row, column in cells
    ]
    return Scene(tuple(items))


def article(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def describe(scene: Scene, rng: random.Random) -> str:
    """The scene in words; the rng varies order and wording, never the facts."""
    if scene.word is not None:
        return rng.choice((f"the word {scene.word}.", f"a sign with the word {scene.word}."))
    items = list(scene.items)
    rng.shuffle(items)
    parts = [article(f"{item.size} {item.name}") + f" at the {item.place}" for item in items]
    return " and ".join(parts) + "." if len(parts) <= 2 else ", ".join(parts) + "."


def questions(scene: Scene, rng: random.Random, n: int = 4) -> list[Question]:
    """n questions about the scene, drawn over the skills that it allows."""
    if scene.word is not None:
        return [word_question(scene.word, rng) for _ in range(n)]
    if len(scene.items) == 1:
        # Presence with negation is the hardest to learn about one shape, and most of easy-VQA.
        makers = [presence_question, presence_question, presence_question, attribute_question, place_question]
    else:
        makers = [
            presence_question,
            count_question,
            count_question,
            attribute_of_one_question,
            place_question,
        ]
    return [rng.choice(makers)(scene.items, rng) for _ in range(n)]


def presence_questions(
    scene: Scene, rng: random.Random, n: int = 4, negated_share: float = 0.3
) -> list[Question]:
    """n questions of easy-VQA's yes-or-no kinds about a scene of shapes."""
    return [presence_question(scene.items, rng, negated_share) for _ in range(n)]


def checklist(scene: Scene, asked: Sequence[Question], rng: random.Random) -> str:
    """Which colours and shapes are there, spelled out for all that the questions ask for and some others."""
    words = {word for question in asked for word in question.text.rstrip("?").split()}
    every = [*COLORS, *SHAPES]
    listed = [value for value in every if value in words or rng.random() < 0.2]
    rng.shuffle(listed)
    present = {value for item in scene.items for value in (item.color, item.shape)}
    return ", ".join(f"{value}: {'yes' if value in present else 'no'}" for value in listed) + "."


def word_question(word: str, rng: random.Random) -> Question:
    """Which word is written?"""
    text = rng.choice(
        ("what word is written?", "what does the sign say?", "read the word.", "which word is in the image?")
    )
    return Question(text, word, "word")


def attribute_question(items: Sequence[Item], rng: random.Random) -> Question:
    """Colour or shape of the only item."""
    item = items[0]
    if rng.random() < 0.5:
        noun = rng.choice(("shape", item.shape))
        text = rng.choice((f"what color is the {noun}?", f"what is the color of the {noun}?"))
        return Question(text, item.color, "color")
    text = rng.choice(
        (
            "what shape is in the image?",
            "what shape does the image contain?",
            "what shape is present?",
            f"what is the {item.color} shape?",
        )
    )
    return Question(text, item.shape, "shape")


def presence_question(items: Sequence[Item], rng: random.Random, negated_share: float = 0.3) -> Question:
    """Is a colour or shape there, or not there?"""
    by_color = rng.random() < 0.6
    present = {item.color if by_color else item.shape for item in items}
    every = COLORS if by_color else SHAPES
    absent = [value for value in every if value not in present]
    truth = not absent or rng.random() < 0.5
    value = rng.choice(sorted(present) if truth else absent)
    noun = f"{value} shape" if by_color else value
    # Were half of the questions negated, neither presence nor negation alone would tell anything about the
    # answer, and a small model finds no way into such an exclusive-or.
    if rng.random() < 1 - negated_share:
        text = rng.choice(
            (
                f"is a {noun} present?",
                f"is there a {noun}?",
                f"is there a {noun} in the image?",
                f"does the image contain a {noun}?",
            )
        )
    else:
        truth = not truth
        text = rng.choice(
            (
                f"is no {noun} present?",
                f"is there not a {noun}?",
                f"is there not a {noun} in the image?",
                f"does the image not contain a {noun}?",
            )
        )
    return Question(text, "yes" if truth else "no", "presence")


def count_question(items: Sequence[Item], rng: random.Random) -> Question:
    """How many shapes, of one shape, or of one colour?"""
    way = rng.randrange(3)
    if way == 0:
        noun, n = "shapes", len(items)
    elif way == 1:
        shape = rng.choice(SHAPES)
        noun, n = f"{shape}s", sum(item.shape == shape for item in items)
    else:
        color = rng.choice([item.color for item in items] + [rng.choice(COLORS)])
        noun, n = f"{color} shapes", sum(item.color == color for item in items)
    text = rng.choice((f"how many {noun} are there?", f"how many {noun} are in the image?"))
    return Question(text, NUMBERS[n], "count")


def attribute_of_one_question(items: Sequence[Item], rng: random.Random) -> Question:
    """Colour by shape or shape by colour, where that names one item alone; else what stands at a place."""
    item = rng.choice(list(items))
    if sum(other.shape == item.shape for other in items) == 1 and rng.random() < 0.5:
        text = rng.choice((f"what color is the {item.shape}?", f"what is the color of the {item.shape}?"))
        return Question(text, item.color, "color")
    if sum(other.color == item.color for other in items) == 1 and rng.random() < 0.5:
        return Question(f"what is the {item.color} shape?", item.shape, "shape")
    return Question(f"what is at the {item.place}?", f"{item.color} {item.shape}", "position")


def place_question(items: Sequence[Item], rng: random.Random) -> Question:
    """Where is an item whose name is its own? Falls back to a count where every name is shared."""
    unique = [item for item in items if sum(other.name == item.name for other in items) == 1]
    if not unique:
        return count_question(items, rng)
    item = rng.choice(unique)
    return Question(f"where is the {item.name}?", item.place, "position")
