"""One evaluation: checks first, then scores, temperature, baselines, figures, report."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from core_llm import provenance
from core_llm.errors import UserError
from core_llm.files import check_writable
from core_llm.hub import find_model
from guard import calibration
from guard.calibration import Calibration
from guard.evaluation import baselines, report
from guard.evaluation.measure import AFTER, BEFORE, LINEAR, MAJORITY, TFIDF, Measured, Scored, measure
from guard.evaluation.rows import DEFAULT_SETS, EvalSet, named_set, own_set
from guard.evaluation.scoring import Score, fingerprint, score
from guard.guard import MIN_MASS, NANO, Guard

SCORES = "scores.jsonl"


@dataclass(frozen=True)
class Settings:
    """What `guard evaluate` was asked for; see there."""

    sets: Sequence[str] = ()
    model: str = "nano"
    data: Path | None = None
    data_root: Path | None = None
    out: Path = Path("runs/guard_evaluation")
    save: Path | None = None
    core: str = "nano"
    baseline_rows: int = 10_000
    limit: int | None = None
    batch_size: int = 32
    resamples: int = 2000
    seed: int = 0


@dataclass
class Evaluation:
    """All that the report shows. before: the temperature that the guard came with. fitted: None where the
    validation rows could not tell one, for the reason in `notes`.
    """

    guard: str
    threshold: float
    before: float
    fitted: Calibration | None
    sets: list[Measured]
    validation: dict[str, int]
    notes: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)


def run(settings: Settings) -> Evaluation:
    """Evaluate, print, write; raises `UserError` before any work for what the user got wrong."""
    _check(settings)
    made = _sets(settings)
    guard = Guard.load(settings.model)
    result = evaluate(guard, made, settings)
    report.show(result)
    written = report.write(settings.out, result)
    print(f"report: {written}")
    if settings.save is not None:
        if result.fitted is None:
            raise UserError(
                f"no temperature was saved: {result.notes[0] if result.notes else 'none was fitted'}"
            )
        print(f"temperature {result.fitted.temperature:.4g} saved in {_save(settings, result.fitted)}")
    return result


def _check(settings: Settings) -> None:
    if settings.batch_size < 1 or settings.resamples < 100 or settings.baseline_rows < 1:
        raise UserError("--batch-size and --baseline-rows must be at least 1, --resamples at least 100")
    if settings.limit is not None and settings.limit < 1:
        raise UserError(f"--limit must be at least 1, not {settings.limit}")
    if settings.data_root is not None and not settings.data_root.is_dir():
        raise UserError(f"--data-root {settings.data_root}: no such folder")
    check_writable(settings.out / "report.html")
    if settings.save is not None:
        check_writable(settings.save / calibration.SETTINGS)
        if _folder(settings.model).resolve() == NANO.resolve() == settings.save.resolve():
            raise UserError("the bundled guard stays as it is: give --save another folder, it gets a copy")
        if settings.save.exists() and settings.save.resolve() != _folder(settings.model).resolve():
            raise UserError(
                f"--save {settings.save}: exists and is not --model; give the guard's own folder or a new one"
            )


def _folder(model: str) -> Path:
    return find_model(model, NANO)


def _sets(settings: Settings) -> list[EvalSet]:
    names = list(dict.fromkeys(settings.sets)) or ([] if settings.data else list(DEFAULT_SETS))
    made = [named_set(name, settings.data_root, settings.limit) for name in names]
    if settings.data is not None:
        made.append(own_set(settings.data, settings.limit))
    return made


def evaluate(guard: Guard, made: Sequence[EvalSet], settings: Settings) -> Evaluation:
    """Scores, temperature, baselines and figures; nothing is printed or written but the scores."""
    own = guard.temperature
    identity = fingerprint(_folder(settings.model), guard.policy.digest + str(guard.policy.brief))
    guard.calibrate(temperature=1.0)
    scores: dict[tuple[str, str], list[Score]] = {}
    try:
        for each in made:
            for part, rows in (("validation", each.validation), ("test", each.test)):
                scores[each.name, part] = score(
                    rows, lambda asked: guard.classify(asked, settings.batch_size), identity,
                    settings.out / SCORES, settings.batch_size, f"{each.name}, {part}",
                )  # fmt: skip
    finally:
        guard.calibrate(temperature=own)
    notes: list[str] = []
    fitted = _fit(made, scores, notes)
    temperatures = {BEFORE: own} | ({AFTER: fitted.temperature} if fitted else {})
    learners = _learners(settings.core, made)
    pooled = [row for each in made for row in each.train]
    measured = []
    for each in made:
        scored = {
            who: _at(scores[each.name, "test"], guard.threshold, temperature)
            for who, temperature in temperatures.items()
        }
        for who, learner in learners.items():
            found, learnt = baselines.probabilities(
                learner, each.train, pooled, each.test, settings.baseline_rows
            )
            scored[who] = Scored(found, found >= 0.5, learnt)
        measured.append(measure(each, scored, settings.resamples, settings.seed))
    return Evaluation(
        guard.name,
        guard.threshold,
        own,
        fitted,
        measured,
        {each.name: len(each.validation) for each in made},
        notes,
        provenance.collect(settings.model, {"guard": identity}, settings.seed),
    )


def _fit(
    made: Sequence[EvalSet], scores: dict[tuple[str, str], list[Score]], notes: list[str]
) -> Calibration | None:
    """One temperature for all sets: the guard does not know where a request comes from.

    Sets of one kind take no part: they would pull every score to one side.
    """
    probability: list[float] = []
    labels: list[int] = []
    for each in made:
        if len({row.label for row in each.validation}) < 2:
            continue
        probability += [s.probability for s in scores[each.name, "validation"]]
        labels += [row.label for row in each.validation]
    try:
        return calibration.fit(probability, labels)
    except UserError as error:
        notes.append(str(error))
        return None


def _at(scores: Sequence[Score], threshold: float, temperature: float) -> Scored:
    """The scores at a temperature, and the decisions that the guard makes then."""
    probability = calibration.scaled([s.probability for s in scores], temperature)
    no_verdict = np.array([s.mass < MIN_MASS for s in scores])
    return Scored(probability, (probability >= threshold) | no_verdict)


def _learners(core: str, made: Sequence[EvalSet]) -> dict[str, baselines.Learner]:
    from core_llm.checkpoint import load_core

    return {
        MAJORITY: baselines.majority,
        TFIDF: baselines.tfidf,
        LINEAR: baselines.LinearHead(*load_core(core)),
    }


def _save(settings: Settings, fitted: Calibration) -> Path:
    """The guard with its temperature: in place, or as a copy in a folder that does not exist yet."""
    assert settings.save is not None
    target, source = settings.save, _folder(settings.model)
    if target.resolve() == source.resolve():
        calibration.store(target, fitted)
        return target
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copytree(source, temporary, ignore=shutil.ignore_patterns("state", "__pycache__"))
        calibration.store(temporary, fitted)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
