"""Texts that the project makes itself: what the nano core learns to answer, repeat and be asked aloud."""

import random
from collections.abc import Iterator

from core_llm.chat import Message
from core_llm.data.scenes import (
    COLORS,
    COLUMNS,
    KINDS,
    NUMBERS,
    ROWS,
    SHAPES,
    WORDS,
    article,
    checklist,
    describe,
    presence_questions,
    questions,
    sample_scene,
)

DIGITS = NUMBERS
REPEAT_PROMPT = "Repeat after me in English:"
DESCRIBE_PROMPT = "Describe the image."
_VERBS = ("turn", "move", "show", "find", "count", "open", "close", "stop", "start", "bring", "draw", "read")
_THINGS = (
    "light",
    "door",
    "window",
    "music",
    "picture",
    "page",
    "table",
    "list",
    "word",
    "number",
    *WORDS[:20],
)
_ADVERBS = ("now", "again", "please", "slowly", "today", "first", "twice", "later")
# What a house hears beside these: the core learns to repeat every one of them (`command_conversation`).
_HOUSE_VERBS = (
    "call", "play", "set", "write", "clean", "cook", "help", "ask", "give", "take", "check", "raise",
    "lower", "wash", "print", "save", "lock", "send", "answer", "wait",
)  # fmt: skip
_HOUSE_THINGS = (
    "radio", "volume", "kitchen", "bedroom", "office", "garden", "water", "movie", "weather", "letter",
    "message", "temperature", "song", "coffee", "heater", "phone", "paper", "bottle", "ticket", "train",
    "doctor", "mother", "news", "story",
)  # fmt: skip
_HOUSE_ADVERBS = (
    "yesterday", "tonight", "outside", "inside", "together", "soon", "always", "never", "here",
)  # fmt: skip
_HOUSE_KINDS = ("big", "small", "old", "new", "warm", "cold", "loud", "fast")


def digits_phrase(rng: random.Random) -> str:
    """One to five digits in words; single digits are common."""
    n = 1 if rng.random() < 0.4 else rng.randint(2, 5)
    return " ".join(rng.choice(DIGITS) for _ in range(n))


def command_phrase(rng: random.Random) -> str:
    """A short command or statement over a closed vocabulary."""
    thing = rng.choice(_THINGS)
    return rng.choice(
        (
            f"{rng.choice(_VERBS)} the {thing} {rng.choice(_ADVERBS)}",
            f"please {rng.choice(_VERBS)} the {rng.choice(COLORS)} {thing}",
            f"{rng.choice(_VERBS)} {rng.choice(NUMBERS[2:7])} {thing}s {rng.choice(_ADVERBS)}",
            f"the {thing} is {rng.choice(COLORS)} and the {rng.choice(_THINGS)} is {rng.choice(COLORS)}",
            f"there is {article(rng.choice(COLORS))} {rng.choice(SHAPES)} "
            f"at the {rng.choice(ROWS)} {rng.choice(COLUMNS)}",
            f"{rng.choice(WORDS)} {rng.choice(WORDS)} {rng.choice(WORDS)}",
        )
    )


def house_phrase(rng: random.Random) -> str:
    """A short command or statement about a house, over a closed vocabulary of its own."""
    thing, verb = rng.choice(_HOUSE_THINGS), rng.choice(_HOUSE_VERBS)
    return rng.choice(
        (
            f"{verb} the {thing} {rng.choice(_HOUSE_ADVERBS)}",
            f"please {verb} the {rng.choice(_HOUSE_KINDS)} {thing}",
            f"{verb} the {thing} and the {rng.choice(_HOUSE_THINGS)} {rng.choice(_ADVERBS)}",
            f"the {thing} is {rng.choice(_HOUSE_KINDS)} and the {rng.choice(_HOUSE_THINGS)} is "
            f"{rng.choice(_HOUSE_KINDS)}",
        )
    )


def spoken_command(rng: random.Random) -> str:
    """A command or statement: with those of `question_phrase`, a vocabulary of about 200 words."""
    return command_phrase(rng) if rng.random() < 0.5 else house_phrase(rng)


def question_phrase(rng: random.Random) -> str:
    """A question about some scene, without the scene."""
    scene = sample_scene(rng, rng.choices(KINDS, (6, 3, 1))[0])
    return questions(scene, rng, 1)[0].text


def spoken_phrase(rng: random.Random) -> str:
    """Any text that the core can repeat: digits, questions, commands."""
    return rng.choices((digits_phrase, question_phrase, command_phrase), (3, 5, 2))[0](rng)


def _vary(text: str, rng: random.Random) -> str:
    """How people type: sometimes a capital letter, sometimes no question mark."""
    if rng.random() < 0.2:
        text = text[0].upper() + text[1:]
    return text.rstrip("?") if rng.random() < 0.1 else text


def scene_conversation(rng: random.Random, several: bool = True) -> list[Message]:
    """A described scene (with `several`, also one of several shapes) and one to four questions about it."""
    scene = sample_scene(rng, rng.choices(KINDS, (5, 4 if several else 0, 1))[0])
    description = describe(scene, rng)
    if rng.random() < 0.1:
        return [
            Message("user", f"{description} {DESCRIBE_PROMPT}"),
            Message("assistant", describe(scene, rng)),
        ]
    asked = questions(scene, rng, rng.choice((1, 2, 3, 4)))
    separator = rng.choice((" ", " ", "\n", ""))
    first = description + separator + _vary(asked[0].text, rng)
    conversation = [Message("user", first), Message("assistant", asked[0].answer)]
    for question in asked[1:]:
        conversation += [Message("user", _vary(question.text, rng)), Message("assistant", question.answer)]
    return conversation


def checklist_conversation(rng: random.Random) -> list[Message]:
    """A list of what is there and what is not, and yes-or-no questions.

    To compare a question with a description is hard for a small model; to look an entry up is not, and an
    adapter can put what a list says just where the core learns to look.
    """
    scene = sample_scene(rng, rng.choices(("single", "several"), (5, 4))[0])
    asked = presence_questions(scene, rng)
    known = checklist(scene, asked, rng)
    if rng.random() < 0.4:
        known = f"{describe(scene, rng)} {known}"
    conversation = [Message("user", f"{known} {asked[0].text}"), Message("assistant", asked[0].answer)]
    for question in asked[1:]:
        conversation += [Message("user", _vary(question.text, rng)), Message("assistant", question.answer)]
    return conversation


def presence_conversation(rng: random.Random, negated_share: float) -> list[Message]:
    """One described shape and four yes-or-no questions about what is there."""
    scene = sample_scene(rng, "single")
    asked = presence_questions(scene, rng, 4, negated_share)
    first = f"{describe(scene, rng)} {asked[0].text}"
    conversation = [Message("user", first), Message("assistant", asked[0].answer)]
    for question in asked[1:]:
        conversation += [Message("user", _vary(question.text, rng)), Message("assistant", question.answer)]
    return conversation


def repeat_conversation(rng: random.Random) -> list[Message]:
    """The recognition prompt of the Llama 3 paper (section 8), with text where audio will stand."""
    return _repeat(spoken_phrase(rng), rng)


def command_conversation(rng: random.Random) -> list[Message]:
    """A command to repeat, of the wider vocabulary."""
    return _repeat(spoken_command(rng), rng)


def _repeat(phrase: str, rng: random.Random) -> list[Message]:
    separator = " " if rng.random() < 0.8 else ""
    return [Message("user", REPEAT_PROMPT + separator + phrase), Message("assistant", phrase)]


def counting_conversation(rng: random.Random) -> list[Message]:
    """Small facts about numbers up to nine."""
    a = rng.randint(0, 8)
    b = rng.randint(0, 9 - a)
    text, answer = rng.choice(
        (
            (f"what comes after {DIGITS[a]}?", DIGITS[a + 1]),
            (f"what comes before {DIGITS[a + 1]}?", DIGITS[a]),
            (f"what is {DIGITS[a]} plus {DIGITS[b]}?", DIGITS[a + b]),
        )
    )
    return [Message("user", _vary(text, rng)), Message("assistant", answer)]


def sample_conversation(rng: random.Random, several: bool = True) -> list[Message]:
    """One training conversation of the nano core's own world; without `several`, its easier part."""
    kind = rng.choices(("scene", "repeat", "counting"), (7, 3, 0.5))[0]
    if kind == "scene":
        return scene_conversation(rng, several)
    return repeat_conversation(rng) if kind == "repeat" else counting_conversation(rng)


def sample_texts(seed: int, n: int) -> Iterator[str]:
    """n pieces of plain text for training a tokenizer: what `sample_conversation` says."""
    rng = random.Random(seed)
    for _ in range(n):
        yield "\n".join(message.text for message in sample_conversation(rng))
