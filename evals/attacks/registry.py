"""All attacks by name, and several of them one after the other."""

import random
from collections.abc import Callable, Sequence

from core_llm.errors import UserError
from evals.attacks.base import Attack
from evals.attacks.dialogue import DIALOGUE
from evals.attacks.encodings import ENCODINGS
from evals.attacks.media import MEDIA
from evals.tasks.base import Sample

ATTACKS: dict[str, Attack] = {attack.name: attack for attack in (*ENCODINGS, *DIALOGUE, *MEDIA)}
THEN = "+"  # between the names of attacks that follow each other


def find(name: str) -> Attack:
    """The attack of that name; "rot13+typographic" is one after the other.

    Raises `UserError` that lists the known ones, or names the two that cannot follow each other.
    """
    parts = [part.strip() for part in name.split(THEN)]
    unknown = [part for part in parts if part not in ATTACKS]
    if unknown:
        raise UserError(f"unknown attack '{unknown[0]}'; known attacks: {', '.join(ATTACKS)}")
    return compose(*parts)


def compose(*names: str) -> Attack:
    """The attacks in this order, as one; its `undo` exists where all of them have one."""
    if not names:
        raise UserError(f"no attack named; known attacks: {', '.join(ATTACKS)}")
    steps = [ATTACKS[name] if name in ATTACKS else find(name) for name in names]
    if len(steps) == 1:
        return steps[0]
    text = True
    for before, step in zip([None, *steps], steps):
        if step.reads and not text:
            assert before is not None
            raise UserError(
                f"attack '{step.name}' needs a typed request, and after '{before.name}' there is none; "
                f"put '{step.name}' before it"
            )
        text = text and step.leaves_text
    return Attack(
        name=THEN.join(step.name for step in steps),
        title=", then ".join(step.title for step in steps),
        source="; ".join(dict.fromkeys(step.source for step in steps)),
        undo=_undone(steps),
        reads=steps[0].reads,
        leaves_text=text,
        needs=tuple(dict.fromkeys(need for step in steps for need in step.needs)),
        all=_in_turn(steps),
    )


def _in_turn(
    steps: Sequence[Attack],
) -> Callable[[Sequence[Sample], Sequence[random.Random]], list[Sample]]:
    def change(samples: Sequence[Sample], rngs: Sequence[random.Random]) -> list[Sample]:
        changed = list(samples)
        for step in steps:
            changed = step.many(changed, rngs)
        return changed

    return change


def _undone(steps: Sequence[Attack]) -> Callable[[str], str] | None:
    undos = [step.undo for step in steps]
    if any(undo is None for undo in undos):
        return None

    def undo(text: str) -> str:
        for each in reversed(undos):
            assert each is not None
            text = each(text)
        return text

    return undo
