"""What quantising a core costs: the same rows asked of every form, with paired differences."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from core_llm import provenance, stats
from core_llm.errors import UserError
from core_llm.files import check_writable
from evals import results, scorecard
from evals.models import Subject
from evals.runner import Evaluation, evaluate, metrics_json
from evals.tasks.base import Options, Task

PLAIN = "none"


def compare(
    tasks: Sequence[Task], model: str, options: Options, records: Path, output: Path
) -> list[results.Entry]:
    """Evaluate the plain core and each of its quantised forms; print a table, write and return all entries.

    An entry is one of results.json with two more keys: `difference`, for each metric how much higher it
    is than the plain core's on the same rows, and `saved_bytes`, the size of the core's weights on disk.
    Controls are left out: they ask whether a skill is there, not what is left of it.
    Raises `UserError` for no task or one that does not ask the core.
    """
    from core_llm.quantize import SCHEMES, saved_bytes

    if not tasks:
        raise UserError("no task given; `evals list` shows the tasks")
    check_writable(output)
    subjects = {name: Subject(model, None if name == PLAIN else name) for name in (PLAIN, *SCHEMES)}
    for task in tasks:
        for subject in subjects.values():
            subject.require(task.needs, task.name)
    entries: list[results.Entry] = []
    plain: dict[str, Evaluation] = {}
    for name, subject in subjects.items():
        shared = provenance.collect(model, subject.part_hashes, options.seed, subject.quantization)
        shared |= {"split": options.split, "limit": options.limit}
        for task in tasks:
            done = evaluate(replace(task, controls=()), subject, options, records)
            plain.setdefault(task.name, done)
            entry = results.entry(done, shared)
            entry["difference"] = _differences(plain[task.name], done, options.seed) if name != PLAIN else {}
            entry["saved_bytes"] = saved_bytes(subject.assistant.core)
            entries.append(entry)
        subject.__dict__.pop("assistant", None)  # one form in memory at a time
    results.write(output, entries)
    show(entries)
    return entries


def _differences(plain: Evaluation, other: Evaluation, seed: int) -> dict[str, Any]:
    groups = [sample.group for sample in plain.samples]
    found = {
        name: stats.difference(name, plain.rows, other.rows, groups, seed) for name in plain.task.metrics
    }
    return metrics_json(found)


def show(entries: Sequence[results.Entry]) -> None:
    """Print one line per task, metric and form."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title="The cost of quantisation", title_justify="left")
    for column in ("task", "rows", "metric", "form", "MB on disk", "score", "difference", "95 % interval"):
        table.add_column(column, justify="right" if column in ("rows", "MB on disk", "score") else "left")
    for entry in sorted(entries, key=lambda entry: entry["task"]):
        for metric, score in entry["metrics"].items():
            change = entry["difference"].get(metric)
            interval = f"{change['ci95'][0]:+.4f} – {change['ci95'][1]:+.4f}" if change else ""
            table.add_row(
                entry["task"],
                f"{entry['n']:,}",
                scorecard.arrow(metric),
                entry["provenance"]["quantization"] or "plain",
                f"{entry['saved_bytes'] / 1e6:,.2f}",
                f"{score['value']:.4f}",
                f"{change['value']:+.4f}" if change else "",
                interval,
            )
    console = Console()
    (console if console.is_terminal else Console(width=130)).print(table)
