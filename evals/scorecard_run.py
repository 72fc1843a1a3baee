"""`evals scorecard`: everything about one model in one run, and one page, one table, one JSON of it."""

import errno
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from core_llm import processes, provenance
from core_llm.chat import Text
from core_llm.digests import code_digest
from core_llm.errors import DataError, UserError
from core_llm.files import check_writable
from core_llm.journal import Journal
from evals import results, scorecard_answers, scorecard_calibration, scorecard_forms, scorecard_speed
from evals.models import Model, folders, open_model
from evals.models_guarded import GuardedModel
from evals.runner import Evaluation, evaluate
from evals.scorecard_answers import Answers, Gap, Refusals
from evals.scorecard_calibration import Calibrated
from evals.scorecard_speed import Figure
from evals.tasks import QUICKSTART, registry
from evals.tasks.base import Options, Sample, Task
from evals.tasks.requests import MAX_NEW_TOKENS

# Judgement of the guard on one request in three forms; asked where the registry has it.
FORMS_TASK = "guard-modalities"
QUICK = (*QUICKSTART, FORMS_TASK)
# Tasks whose rows are single requests, safe or unsafe: what the answers are measured on.
REQUESTS_QUICK = ("guard-basics",)
REQUESTS = (
    "guard-basics",
    "xstest",
    "simple-safety-tests",
    "mitre-frr",
    "ailuminate",
    "strongreject",
    "harmbench",
)
PAGE, TABLE, VALUES = "index.html", "scorecard.md", "scorecard.json"
_FORM_METRICS = ("auprc", "recall", "fpr")
# What befalls the whole run, not one task: no place is left for answers.
_NO_PLACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO})


@dataclass(frozen=True)
class Plan:
    """What to measure. tasks: names; empty: all that the model can do. guard: None for the model's own."""

    model: str
    options: Options
    quick: bool = False
    tasks: tuple[str, ...] = ()
    guard: str | None = None


@dataclass
class Measured:
    """All that the page, the table and the JSON show. left_out: what could not be measured, and why."""

    plan: Plan
    provenance: dict[str, Any]
    judge: str
    guard: str | None
    evaluations: list[Evaluation] = field(default_factory=list)
    entries: list[results.Entry] = field(default_factory=list)
    answers: list[Answers] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    calibration: list[Calibrated] = field(default_factory=list)
    speed: list[Figure] = field(default_factory=list)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def leave_out(self, what: str, why: Exception) -> None:
        """Note what this run goes without, on stderr too. A full disk is not noted but raised."""
        if isinstance(why.__cause__, OSError) and why.__cause__.errno in _NO_PLACE:
            raise why
        self.left_out[what] = str(why)
        print(f"left out: {what}: {why}", file=sys.stderr)


def run(plan: Plan, out: Path, records: Path | None = None) -> Measured:
    """Measure and write DIR/index.html, scorecard.md and scorecard.json; returns what was measured.

    The same plan run again asks only for what the records lack. Raises `UserError` for a mistake of the
    user's before any work: an unknown model, task or guard, a place that cannot be written or that another
    scorecard is writing to; and where the disk is full later on.
    """
    from evals import scorecard_files

    _check(plan)
    for name in (PAGE, TABLE, VALUES):
        check_writable(out / name)
    model = open_model(plan.model)
    if plan.guard is not None:
        GuardedModel(model, plan.guard)  # says at once where there is no guard
    tasks = _tasks(plan, model)
    records = records or out / "records"
    # Open all the while: what another run holds would look like tasks that cannot be measured.
    with Journal(records / "speed.jsonl") if processes.is_writer() else nullcontext() as journal:
        measured = _new(plan, model)
        _ask_tasks(measured, tasks, model, records)
        _ask_requests(measured, model, records)
        for evaluation in measured.evaluations:
            if evaluation.task.ask == "score":
                found = scorecard_calibration.measure(evaluation, plan.options.seed)
                measured.calibration += [found] if found is not None else []
        if not measured.entries:
            raise UserError(f"nothing of '{plan.model}' could be measured; see the lines above")
        if journal is not None:
            _measure_speed(measured, model, journal)
            scorecard_files.write(measured, out)
    return measured


def _check(plan: Plan) -> None:
    options = plan.options
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit must be at least 1, not {options.limit}")
    if options.data_root is not None and not options.data_root.is_dir():
        raise UserError(f"--data-root {options.data_root}: no such folder")
    if plan.quick and (options.data_root is not None or plan.tasks):
        raise UserError("--quick runs the bundled samples alone; leave out --data-root and --tasks")


def _new(plan: Plan, model: Model) -> Measured:
    judge, _ = refusal_judge()
    shared = provenance.collect(plan.model, dict(model.part_hashes), plan.options.seed)
    shared |= {"split": plan.options.split, "limit": plan.options.limit, "quick": plan.quick}
    shared["harness_sha256"] = code_digest(Path(__file__).parent)
    return Measured(plan, shared, judge, plan.guard or _own_guard(plan.model))


def _own_guard(model: str) -> str | None:
    try:
        return model if "guard" in folders(model) else None
    except UserError:
        return None


def _tasks(plan: Plan, model: Model) -> list[Task]:
    """The tasks to run; what was named must be there, and the model must be able to do it."""
    known = registry()
    if plan.tasks:
        for name in plan.tasks:
            if name not in known:
                raise UserError(f"unknown task '{name}'; known tasks: {', '.join(known)}")
            model.require(known[name].needs, name)
        return [known[name] for name in dict.fromkeys(plan.tasks)]
    names = [name for name in QUICK if name in known] if plan.quick else list(known)
    return [known[name] for name in names]


def _ask_tasks(measured: Measured, tasks: Sequence[Task], model: Model, records: Path) -> None:
    options = measured.plan.options
    for task in tasks:
        try:
            model.require(task.needs, task.name)
            evaluation = evaluate(task, model, options, records, measured.provenance)
        except (UserError, DataError) as reason:
            measured.leave_out(task.name, reason)
            continue
        _add(measured, evaluation)
        if task.name == FORMS_TASK:
            measured.gaps += scorecard_answers.form_gaps(
                "verdicts", "the guard", evaluation, _FORM_METRICS, options.seed
            )


def _add(measured: Measured, evaluation: Evaluation) -> None:
    measured.evaluations.append(evaluation)
    measured.entries.append(results.entry(evaluation, measured.provenance))


def _ask_requests(measured: Measured, model: Model, records: Path) -> None:
    """Answers under every setting of the guard, in every form that the model takes."""
    options = measured.plan.options
    try:
        model.require(("core",), "answers")
        samples = _in_forms(measured, _requests(measured), model)
    except (UserError, DataError) as reason:
        measured.leave_out("answers", reason)
        return
    try:
        measured.answers = scorecard_answers.measure(
            model,
            measured.guard,
            samples,
            refusal_judge()[1],
            options,
            records,
            scorecard_answers.MAX_NEW_TOKENS if measured.plan.quick else MAX_NEW_TOKENS,
            [evaluation for evaluation in measured.evaluations if evaluation.task.name in REQUESTS],
        )
    except UserError as reason:
        measured.leave_out("answers", reason)
        return
    if measured.guard is None:
        measured.leave_out("guard on", UserError("no guard: give one with --guard nano"))
    for answers in measured.answers:
        _add(measured, answers.own)
    measured.gaps += scorecard_answers.gaps(measured.answers, options.seed)


def _requests(measured: Measured) -> list[Sample]:
    """Typed single requests of all sets that are there."""
    plan, known = measured.plan, registry()
    found: list[Sample] = []
    for name in REQUESTS_QUICK if plan.quick else REQUESTS:
        if name not in known:
            continue
        try:
            rows = known[name].load(plan.options)
        except (UserError, DataError) as reason:
            measured.leave_out(f"answers to {name}", reason)
            continue
        found += [
            replace(row, id=f"{name} {row.id}", group=f"{name} {row.group}") for row in rows if _is_typed(row)
        ]
    return found


def _is_typed(sample: Sample) -> bool:
    return len(sample.messages) == 1 and all(isinstance(part, Text) for part in sample.messages[0].parts)


def _in_forms(measured: Measured, samples: Sequence[Sample], model: Model) -> list[Sample]:
    made: list[Sample] = []
    for form in scorecard_forms.FORMS:
        try:
            model.require(("core", scorecard_forms.NEEDS[form]), f"requests as {form}")
            found = scorecard_forms.in_forms(samples, (form,))
            if len(found) < len(samples):
                missing = f"{len(samples) - len(found)} of {len(samples)} are too long for it"
                measured.leave_out(f"requests as {form}", DataError(missing))
            made += found
        except UserError as reason:
            measured.leave_out(f"requests as {form}", reason)
    return made


def _measure_speed(measured: Measured, model: Model, journal: Journal) -> None:
    """Figures of speed are kept like answers: a page made again shows the same ones."""
    measured.sizes = scorecard_speed.sizes(measured.plan.model)
    key = f"{model.fingerprint(('core', 'image', 'audio', 'guard'))} {measured.provenance['hardware']}"
    try:
        if key not in journal.known:
            figures = scorecard_speed.measure(measured.plan.model)
            journal.append([{"key": key, "output": {"figures": [asdict(f) for f in figures]}}])
    except UserError as reason:
        measured.leave_out("speed", reason)
        return
    measured.speed = scorecard_speed.from_json(journal.known[key]["figures"])


def refusal_judge() -> tuple[str, Refusals]:
    """Who says whether an answer refuses, with its measured error in words, and the judge itself."""
    from evals.judge import default_judge

    judge = default_judge()
    return judge.error.words, lambda requests, answers: judge.refused(answers)
