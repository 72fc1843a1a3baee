"""`evals compare`: two runs joined on (task, id), and what their difference is worth."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core_llm import provenance
from core_llm.errors import UserError
from core_llm.files import check_writable, write_text
from core_llm.stats import METRICS
from evals import answers, paired
from evals.answers import Answered, Answers
from evals.scorecard import arrow, number

LEVEL = 0.05


@dataclass(frozen=True)
class Compared:
    """One task of both runs.

    alone: samples that only the one or the other has. asked_differently: pairs whose conversations differ.
    adjusted: Holm's p of the headline among all tasks compared.
    """

    task: str
    tests: tuple[paired.Contrast, ...]
    alone: tuple[int, int]
    asked_differently: int
    adjusted: float = math.nan

    @property
    def verdict(self) -> str:
        """The headline's difference in words."""
        head = self.tests[0]
        if not self.adjusted < LEVEL or head.better == 0:
            return "no difference shown"
        return "second is better" if head.better > 0 else "first is better"

    def as_json(self) -> dict[str, Any]:
        """All figures of the task."""
        return {
            "task": self.task,
            "metrics": {test.metric: test.as_json() for test in self.tests},
            "p_holm": None if math.isnan(self.adjusted) else self.adjusted,
            "verdict": self.verdict,
            "only_in_first": self.alone[0],
            "only_in_second": self.alone[1],
            "asked_differently": self.asked_differently,
        }


def compare(first: Path, second: Path, tasks: Sequence[str] = (), seed: int = 0) -> list[Compared]:
    """Test every task that both runs hold; the first metric of each is adjusted for their number.

    Raises `UserError` where a file is none of a run's, or no sample is in both.
    """
    before, after = answers.read(first), answers.read(second)
    names = [name for name in before.rows if name in after.rows]
    for name in tasks:
        if name not in names:
            raise UserError(f"task '{name}' is not in both runs; both have: {', '.join(names) or 'none'}")
    found = [_task(name, before, after, seed) for name in names if not tasks or name in tasks]
    found = [one for one in found if one is not None]
    if not found:
        raise UserError(f"{first} and {second} have no sample in common; run both on the same tasks and rows")
    adjusted = paired.holm([one.tests[0].permutation for one in found if one is not None])
    return [
        Compared(one.task, one.tests, one.alone, one.asked_differently, p)
        for one, p in zip(found, adjusted, strict=True)
        if one is not None
    ]


def _task(name: str, before: Answers, after: Answers, seed: int) -> Compared | None:
    one, other = before.rows[name], after.rows[name]
    shared = [key for key in one if key in other]
    if not shared:
        return None
    left, right = [one[key] for key in shared], [other[key] for key in shared]
    _same_targets(name, left, right)
    metrics = [m for m in before.metrics[name] if m in after.metrics[name] and m in METRICS]
    if not metrics:
        raise UserError(f"task '{name}': the two runs have no metric in common; run both with this version")
    groups = [row.group for row in left]
    rows = [row.row for row in left], [row.row for row in right]
    return Compared(
        task=name,
        tests=tuple(paired.contrast(metric, *rows, groups, seed) for metric in metrics),
        alone=(len(one) - len(shared), len(other) - len(shared)),
        asked_differently=sum(a.asked != b.asked for a, b in zip(left, right, strict=True)),
    )


def _same_targets(name: str, left: Sequence[Answered], right: Sequence[Answered]) -> None:
    for a, b in zip(left, right, strict=True):
        if a.target != b.target:
            raise UserError(
                f"task '{name}': sample {a.id} has another right answer in each run, so their data differ; "
                "run both on the same data"
            )


def run(
    first: Path, second: Path, output: Path | None = None, tasks: Sequence[str] = (), seed: int = 0
) -> list[Compared]:
    """Compare two runs, print the table, and write it as JSON where asked to."""
    if output is not None:
        check_writable(output)
    found = compare(first, second, tasks, seed)
    if output is not None:
        headers = [dict(answers.read(path).header) for path in (first, second)]
        content = {
            "first": {"file": first.name, "runs": headers[0]},
            "second": {"file": second.name, "runs": headers[1]},
            "tasks": [one.as_json() for one in found],
            "note": _note(found),
            "provenance": provenance.collect("", {}, seed),
        }
        write_text(output, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    show(found, first, second)
    return found


def _note(found: Sequence[Compared]) -> str:
    """What was tested how often."""
    count = len(found)
    if count == 1:
        return (
            "One comparison: the p-value needs no adjustment. Other metrics of the task are not tested for."
        )
    return (
        f"{count} comparisons, one per task: the adjusted p (Holm) keeps the chance of any false alarm among "
        f"them at {LEVEL:.0%}. Other metrics of a task are not adjusted and prove nothing by themselves."
    )


def show(found: Sequence[Compared], first: Path, second: Path) -> None:
    """Print one line per task and metric."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=f"{first.name} → {second.name}", title_justify="left")
    columns = ("task", "pairs", "metric", "first", "second", "difference", "95 % interval")
    for column in (
        *columns,
        "wins / losses",
        "McNemar p",
        "permutation p",
        "Holm p",
        "detectable",
        "verdict",
    ):
        table.add_column(column, justify="left" if column in ("task", "metric", "verdict") else "right")
    for one in found:
        for i, test in enumerate(one.tests):
            table.add_row(*_cells(one, test, main=i == 0), style="" if i == 0 else "dim")
    console = Console()
    console = console if console.is_terminal else Console(width=190)
    console.print(table)
    console.print(_note(found))
    for one in found:
        if one.asked_differently:
            console.print(
                f"{one.task}: {one.asked_differently} samples were asked in other words in each run."
            )
        if sum(one.alone):
            a, b = one.alone
            console.print(
                f"{one.task}: {a} samples only in the first run and {b} only in the second, left out."
            )


def _cells(one: Compared, test: paired.Contrast, main: bool) -> list[str]:
    gap = test.difference
    return [
        one.task if main else "",
        f"{test.n:,}" if main else "",
        arrow(test.metric),
        number(test.metric, _clean(test.first)),
        number(test.metric, _clean(test.second)),
        f"{gap.value:+.4f}",
        f"{gap.low:+.4f} – {gap.high:+.4f}",
        "" if test.wins is None else f"{test.wins} / {test.losses}",
        "" if test.mcnemar is None else f"{test.mcnemar:.3g}",
        f"{test.permutation:.3g}",
        f"{one.adjusted:.3g}" if main else "",
        f"{test.detectable:.4f}",
        one.verdict if main else "",
    ]


def _clean(value: float) -> float | None:
    return None if math.isnan(value) else value
