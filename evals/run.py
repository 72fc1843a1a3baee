"""One run of the harness: checks first, then tasks, then results, scorecard and report."""

import sys
from collections.abc import Sequence
from pathlib import Path

from core_llm import processes, provenance
from core_llm.digests import code_digest
from core_llm.errors import UserError
from core_llm.files import check_writable
from evals import answers, results, scorecard
from evals.models import Device, open_model
from evals.runner import Evaluation, evaluate
from evals.tasks.base import Options, Task, Unavailable


def run_tasks(
    tasks: Sequence[Task],
    model: str,
    options: Options,
    records: Path,
    output: Path | None = None,
    report: Path | None = None,
    quantization: str | None = None,
    guard: str | None = None,
    guard_on: Sequence[str] = (),
    device: Device = "auto",
) -> Path | None:
    """Evaluate, print the scorecard, write what was asked for; returns the path of the report.

    What the user got wrong is refused before any work: no task, a limit below 1, a model without a
    part that a task needs, a place that cannot be written. A task that this machine lacks something for is
    left out with one line on stderr, unless it is the only one.
    """
    if not tasks:
        raise UserError("no task given; `evals list` shows the tasks")
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit must be at least 1, not {options.limit}")
    if options.data_root is not None and not options.data_root.is_dir():
        raise UserError(f"--data-root {options.data_root}: no such folder")
    places = [output, answers.beside(output)] if output else []
    for path in [*places, *([report / "index.html"] if report else [])]:
        check_writable(path)
    subject = open_model(model, quantization=quantization, guard=guard, guard_on=guard_on, device=device)
    for task in tasks:
        subject.require(task.needs, task.name)
    shared = provenance.collect(model, dict(subject.part_hashes), options.seed, quantization)
    shared |= {"model": _shown(model, shared["model"], guard, guard_on), "guard": guard and Path(guard).name}
    shared["harness_sha256"] = code_digest(Path(__file__).parent)
    evaluations: list[Evaluation] = []
    entries: list[results.Entry] = []
    for task in tasks:
        try:
            evaluations.append(evaluate(task, subject, options, records, shared))
        except Unavailable as reason:
            if len(tasks) == 1:
                raise
            print(f"skipped: {task.name}: {reason}", file=sys.stderr)
            continue
        entries.append(results.entry(evaluations[-1], {**shared, **_selection(options)}))
    if not entries:
        raise Unavailable("none of these tasks can be run here")
    if not processes.is_writer():
        return None
    if output is not None:
        results.write(output, entries)
        answers.write(answers.beside(output), entries, evaluations)
    scorecard.show(entries)
    if report is None:
        return None
    from evals.report import write

    return write(report, entries, evaluations)


def _shown(spec: str, name: str, guard: str | None, guard_on: Sequence[str]) -> str:
    """The model in words: folders by their last part, which alone says something elsewhere."""
    kind, _, place = spec.partition(":")
    if kind in ("hf", "openai") and not Path(place).is_dir():
        name = spec
    return (
        f"{name} + guard {Path(guard).name} on {' and '.join(guard_on) or 'input and output'}"
        if guard
        else name
    )


def _selection(options: Options) -> dict[str, object]:
    """Which rows were asked."""
    return {"split": options.split, "limit": options.limit}
