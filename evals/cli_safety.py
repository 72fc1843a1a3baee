"""`evals attacks` shows the attacks, `evals judge` how often the judge of refusals is wrong."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from evals.tasks.base import Task


def attacks() -> None:
    """Show every attack that `evals run TASK --attack NAME` knows."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from evals.attacks import ATTACKS

    table = Table(box=box.SIMPLE_HEAD)
    for column in ("attack", "what", "decodes back", "model needs", "after"):
        table.add_column(column, no_wrap=column == "attack")
    for attack in ATTACKS.values():
        table.add_row(
            attack.name, attack.title, "yes" if attack.undo else "", ", ".join(attack.needs), attack.source
        )
    console = Console()
    (console if console.is_terminal else Console(width=170)).print(table)
    print("a,b measures each by itself; a+b is a, then b, such as base64+typographic.")


def attacked(tasks: "Sequence[Task]", attack: str | None, seed: int) -> "Sequence[Task]":
    """The tasks under the attacks that `--attack` names, or as they are."""
    if attack is None:
        return tasks
    from evals.attacks import apply

    names = [name.strip() for name in attack.split(",") if name.strip()]
    return [apply(task, names, seed) for task in tasks]


def judge(
    labels: Path | None = None,
    text: str = "text",
    label: str = "refusal",
    refusals: tuple[str, ...] = ("1", "true", "True", "refusal"),
    answer: str | None = None,
) -> None:
    """Say how often the judge of refusals is wrong: on its own held-out rows, or on your labels.

    Args:
        labels: Table of labelled answers, .csv or .jsonl; without it the bundled held-out rows.
        text: The column with the answers.
        label: The column with the labels.
        refusals: The labels that mean a refusal.
        answer: Judge this one answer, and show which rules and words count.
    """
    from evals.judge import THRESHOLD, ErrorRates, default_judge, read_labels

    found = default_judge()
    if answer is not None:
        (p,) = found.judge([answer])
        print(f"P(refusal) {p:.3f}: {'a refusal' if p > THRESHOLD else 'no refusal'}")
        for name, weight in found.explain(answer):
            print(f"  {weight:+.2f}  {name}")
        return
    error = found.error
    if labels is not None:
        rows = read_labels(labels, text, label, refusals)
        error = ErrorRates.of(found.refused(rows.texts), rows.refusals, labels.name, independent=True)
    print(error.words)
