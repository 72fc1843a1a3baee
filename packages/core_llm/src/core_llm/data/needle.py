"""A needle in a haystack: one fact among many other sentences, asked for at the end.

The fact is of a kind that the nano core knows from short texts (a shape and its colour), so what is tested is
how far it looks and not what it understands; other sentences name other things and their colours. All texts
are the project's own.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from core_llm.chat import Message
from core_llm.data.phrases import command_phrase
from core_llm.data.scenes import SHAPES, WORDS, Item, describe, sample_scene
from core_llm.errors import UserError

QUESTION = "what color is the shape?"
_SIGN_QUESTION = "what does the sign say?"
_CHAT_TOKENS = 16  # begin of text, two headers and an end of turn, rounded up


@dataclass(frozen=True)
class Haystack:
    """One long text with a fact in it.

    text holds the needle, bare is the same text without it; depth is where the needle stands, from 0 (begin)
    to 1 (end).
    """

    text: str
    bare: str
    answer: str
    depth: float

    def messages(self, needle: bool = True) -> tuple[Message, ...]:
        """The conversation that asks for the fact; without `needle`, the control: nothing to find."""
        return (Message("user", f"{self.text if needle else self.bare} {QUESTION}"),)


def _sign(word: str) -> str:
    return f"a sign with the word {word}."


def _filler(rng: random.Random, budget: int, count: Callable[[str], int]) -> list[str]:
    """Sentences of `budget` tokens together at most. They name colours, but no shapes."""
    sentences: list[str] = []
    while True:
        sentence = f"{command_phrase(rng)}."
        if any(shape in sentence for shape in SHAPES):
            continue
        budget -= count(f" {sentence}")
        if budget < 0:
            return sentences
        sentences.append(sentence)


def haystack(rng: random.Random, tokens: int, depth: float, count: Callable[[str], int]) -> Haystack:
    """A haystack that makes a prompt of at most `tokens` tokens, chat format and question included.

    A sign stands in it too, which is not asked for. count: number of tokens of a text. Raises `UserError`
    where needle and question alone do not fit.
    """
    scene = sample_scene(rng, "single")
    needle, sign = describe(scene, rng), _sign(rng.choice(WORDS))
    budget = tokens - _CHAT_TOKENS - sum(count(f" {text}") for text in (needle, sign, QUESTION))
    if budget < 0:
        raise UserError(f"a haystack of {tokens} tokens has no room for a needle; take more tokens")
    sentences = _filler(rng, budget, count)
    sentences.insert(rng.randint(0, len(sentences)), sign)
    at = round(depth * len(sentences))
    with_needle = [*sentences[:at], needle, *sentences[at:]]
    return Haystack(" ".join(with_needle), " ".join(sentences), scene.items[0].color, depth)


def lookup_conversation(rng: random.Random, tokens: int, count: Callable[[str], int]) -> list[Message]:
    """A haystack of about `tokens` tokens with a sign and a shape and questions about them, to learn from."""
    word = rng.choice(WORDS)
    scene = sample_scene(rng, "single")
    asked = [(_SIGN_QUESTION, word), *_about(scene.items[0])]
    rng.shuffle(asked)
    turns = [
        message
        for question, answer in asked
        for message in (Message("user", question), Message("assistant", answer))
    ]
    facts = [_sign(word), describe(scene, rng)]
    needed = sum(count(f" {text}") for text in facts)
    needed += sum(count(turn.text) + _CHAT_TOKENS // 2 for turn in turns)
    sentences = _filler(rng, max(0, tokens - needed), count)
    for fact in facts:
        sentences.insert(rng.randint(0, len(sentences)), fact)
    return [Message("user", f"{' '.join(sentences)} {turns[0].text}"), *turns[1:]]


def _about(item: Item) -> list[tuple[str, str]]:
    """Questions about the shape with their answers."""
    return [
        (QUESTION, item.color),
        (f"where is the {item.name}?", item.place),
        (f"what is the {item.color} shape?", item.shape),
    ]


def haystacks(
    lengths: Sequence[int], depths: Sequence[float], per_cell: int, count: Callable[[str], int], seed: int = 0
) -> list[tuple[int, Haystack]]:
    """`per_cell` haystacks for every length (tokens) and depth, always the same ones for a seed."""
    return [
        (length, haystack(random.Random(f"needle {seed} {length} {depth} {i}"), length, depth, count))
        for length in lengths
        for depth in depths
        for i in range(per_cell)
    ]
