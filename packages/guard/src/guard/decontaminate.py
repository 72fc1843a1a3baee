"""What may not be trained on: near-duplicates of held-out conversations and contexts, and repetitions."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from core_llm.data.near_duplicates import THRESHOLD, NearDuplicates, repeated
from guard.examples import Example


@dataclass(frozen=True)
class Dropped:
    """Rows of one set that were left out. held_out: near-duplicates of held-out rows or of their contexts;
    repeated: near-duplicates of a row of the same set and verdict.
    """

    held_out: int = 0
    repeated: int = 0


def text_of(example: Example) -> str:
    """All that was said."""
    return "\n".join(message.text for message in example.messages)


class HeldOut:
    """The conversations that figures are of."""

    def __init__(self, examples: Iterable[Example], threshold: float = THRESHOLD) -> None:
        held_out = list(examples)
        self._texts = NearDuplicates(map(text_of, held_out), threshold)
        self._contexts = NearDuplicates(dict.fromkeys(e.context for e in held_out), threshold)

    def holds(self, example: Example) -> bool:
        """Whether this conversation, or the context that it shares with others, is among them."""
        return bool(self._contexts.find(example.context) or self._texts.find(text_of(example)))


def decontaminated(
    examples: Sequence[Example],
    held_out: HeldOut,
    threshold: float = THRESHOLD,
    once: bool = True,
    progress: Callable[[Sequence[Example]], Iterable[Example]] = iter,
) -> tuple[list[Example], Dropped]:
    """The rows that may be trained on, in order, and how many were dropped why.

    once: drop repetitions too. Of rows that repeat each other with the same verdict the first is kept; with
    another verdict, both.
    """
    clean = [example for example in progress(examples) if not held_out.holds(example)]
    if not once:
        return clean, Dropped(held_out=len(examples) - len(clean))
    kept: list[tuple[int, Example]] = []
    numbers = {id(example): i for i, example in enumerate(clean)}
    for verdict in (False, True):
        part = [example for example in clean if example.unsafe == verdict]
        known = repeated([text_of(example) for example in part], threshold)
        kept += [(numbers[id(e)], e) for e, again in zip(part, known, strict=True) if not again]
    rows = [example for _, example in sorted(kept, key=lambda pair: pair[0])]
    return rows, Dropped(len(examples) - len(clean), len(clean) - len(rows))
