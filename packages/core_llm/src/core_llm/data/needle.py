"""A needle in a haystack: one fact among many other sentences, asked for at the end.

Other facts of the same form stand around it, so that to answer is to look a key up, not to find the one odd
sentence. A fact is a pair of words, key and value; the answer repeats the fact. Sentences and words are the
project's own.
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

    @property
    def answer(self) -> str:
        """The one right answer."""
        return _answer(self.key, self.value)

    def messages(self, needle: bool = True) -> tuple[Message, ...]:
        """The conversation that asks for the value; without `needle`, the control: nothing to find."""
        return (Message("user", f"{self.text if needle else self.bare} {self.question}"),)


def _answer(key: str, value: str) -> str:
    return f"the pair {key} {value}"


def _fact(key: str, value: str) -> str:
    return f"remember {_answer(key, value)}."


def _question(key: str) -> str:
    return f"which pair begins with {key}?"


def _pairs(rng: random.Random, n: int) -> list[tuple[str, str]]:
    """Keys, all different, each with a value that is no key: `n` facts."""
    keys = rng.sample(WORDS, n)
    values = [word for word in WORDS if word not in keys]
    return [(key, rng.choice(values)) for key in keys]


def _filler(rng: random.Random, budget: int, keys: Sequence[str], count: Callable[[str], int]) -> list[str]:
    """Sentences of `budget` tokens together at most; none says anything about the keys."""
    sentences: list[str] = []
    while True:
        sentence = f"{command_phrase(rng)}."
        if any(key in sentence for key in keys):
            continue
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
    pairs = _pairs(rng, distractors + 1)
    key, value = pairs[0]
    facts = [_fact(*pair) for pair in pairs]
    budget = tokens - _CHAT_TOKENS - count(f" {_question(key)}") - sum(count(f" {fact}") for fact in facts)
    if budget < 0:
        raise UserError(f"a haystack of {tokens} tokens has no room for {len(facts)} facts; take more tokens")
    sentences = _filler(rng, budget, [key for key, _ in pairs], count)
    for fact in facts[1:]:
        sentences.insert(rng.randint(0, len(sentences)), fact)
    at = round(depth * len(sentences))
    with_needle = [*sentences[:at], facts[0], *sentences[at:]]
    return Haystack(" ".join(with_needle), " ".join(sentences), key, value, depth)


def lookup_conversation(
    rng: random.Random, tokens: int, count: Callable[[str], int], facts: int = 8
) -> list[Message]:
    """A haystack of about `tokens` tokens with several facts and a question about each, to learn from."""
    pairs = _pairs(rng, facts)
    turns: list[Message] = []
    for key, value in rng.sample(pairs, facts):
        turns += [Message("user", _question(key)), Message("assistant", _answer(key, value))]
    needed = sum(count(f" {_fact(*pair)}") for pair in pairs)
    needed += sum(count(turn.text) + _CHAT_TOKENS // 2 for turn in turns)
    sentences = _filler(rng, max(0, tokens - needed), [key for key, _ in pairs], count)
    for pair in pairs:
        sentences.insert(rng.randint(0, len(sentences)), _fact(*pair))
    first = Message("user", f"{' '.join(sentences)} {turns[0].text}")
    return [first, *turns[1:]]


def recital(rng: random.Random, words: int = 20) -> list[Message]:
    """A list of words, and the same list with its pieces in another order.

    Nearly every word said is told by where the one before it stood: the skill that a lookup needs, asked ten
    times as densely. A core that cannot do this learns it here and not from the lookups themselves.
    """
    listed = rng.sample(WORDS, words)
    pieces: list[list[str]] = []
    while listed[sum(map(len, pieces)) :]:
        start = sum(map(len, pieces))
        pieces.append(listed[start : start + rng.randint(3, 10)])
    said = [word for piece in rng.sample(pieces, len(pieces)) for word in piece]
    return [
        Message("user", f"the words {' '.join(listed)}"),
        Message("assistant", f"the words {' '.join(said)}"),
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
