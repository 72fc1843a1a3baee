"""A needle in a haystack: one fact among many other sentences, asked for at the end.

Other facts of the same form stand around it, so that to answer is to look a key up, not to find the one odd
sentence. Sentences and words are the project's own.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from core_llm.chat import Message
from core_llm.data.phrases import command_phrase
from core_llm.data.scenes import WORDS
from core_llm.errors import UserError

DISTRACTORS = 3  # facts with other keys beside the one that is asked for
_CHAT_TOKENS = 16  # begin of text, two headers and an end of turn, rounded up


@dataclass(frozen=True)
class Haystack:
    """One long text with a fact in it.

    text holds the needle, bare is the same text without it; depth is where the needle stands, from 0 (begin)
    to 1 (end).
    """

    text: str
    bare: str
    key: str
    value: str
    depth: float

    @property
    def question(self) -> str:
        """What is asked after the text."""
        return _question(self.key)

    def messages(self, needle: bool = True) -> tuple[Message, ...]:
        """The conversation that asks for the value; without `needle`, the control: nothing to find."""
        return (Message("user", f"{self.text if needle else self.bare} {self.question}"),)


def _fact(key: str, value: str) -> str:
    return f"the secret word of the {key} is {value}."


def _question(key: str) -> str:
    return f"what is the secret word of the {key}?"


def _filler(rng: random.Random, budget: int, count: Callable[[str], int]) -> list[str]:
    """Sentences of `budget` tokens together at most."""
    sentences: list[str] = []
    while True:
        sentence = f"{command_phrase(rng)}."
        budget -= count(f" {sentence}")
        if budget < 0:
            return sentences
        sentences.append(sentence)


def haystack(
    rng: random.Random, tokens: int, depth: float, count: Callable[[str], int], distractors: int = DISTRACTORS
) -> Haystack:
    """A haystack that makes a prompt of at most `tokens` tokens, chat format and question included.

    count: number of tokens of a text. Raises `UserError` where the needle alone does not fit.
    """
    keys = rng.sample(WORDS, distractors + 1)
    values = [rng.choice([word for word in WORDS if word != key]) for key in keys]
    facts = [_fact(key, value) for key, value in zip(keys, values, strict=True)]
    budget = (
        tokens - _CHAT_TOKENS - count(f" {_question(keys[0])}") - sum(count(f" {fact}") for fact in facts)
    )
    if budget < 0:
        raise UserError(f"a haystack of {tokens} tokens has no room for {len(facts)} facts; take more tokens")
    sentences = _filler(rng, budget, count)
    for fact in facts[1:]:
        sentences.insert(rng.randint(0, len(sentences)), fact)
    at = round(depth * len(sentences))
    with_needle = [*sentences[:at], facts[0], *sentences[at:]]
    return Haystack(" ".join(with_needle), " ".join(sentences), keys[0], values[0], depth)


def lookup_conversation(
    rng: random.Random, tokens: int, count: Callable[[str], int], facts: int = 8
) -> list[Message]:
    """A haystack of about `tokens` tokens with several facts and a question about each, to learn from."""
    keys = rng.sample(WORDS, facts)
    pairs = [(key, rng.choice([word for word in WORDS if word != key])) for key in keys]
    turns: list[Message] = []
    for key, value in rng.sample(pairs, facts):
        turns += [Message("user", _question(key)), Message("assistant", value)]
    needed = sum(count(f" {_fact(*pair)}") for pair in pairs)
    needed += sum(count(turn.text) + _CHAT_TOKENS // 2 for turn in turns)
    sentences = _filler(rng, max(0, tokens - needed), count)
    for pair in pairs:
        sentences.insert(rng.randint(0, len(sentences)), _fact(*pair))
    first = Message("user", f"{' '.join(sentences)} {turns[0].text}")
    return [first, *turns[1:]]


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
