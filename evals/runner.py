"""Task x model -> outputs -> scores with intervals and controls."""

import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core_llm import stats
from core_llm.digests import conversation_digest
from core_llm.errors import DataError
from evals import records
from evals.asking import Asker
from evals.models import Model
from evals.tasks import data
from evals.tasks.base import Control, Options, Output, Sample, Task


@dataclass
class Scored:
    """Scores of one set of rows: the task itself, or one of its controls."""

    name: str
    role: str
    n: int
    estimates: dict[str, stats.Estimate]

    def as_json(self) -> dict[str, Any]:
        return {"role": self.role, "n": self.n, "metrics": metrics_json(self.estimates)}


@dataclass
class Evaluation:
    """All that the scorecard and the report show of one task."""

    task: Task
    samples: list[Sample]
    outputs: list[Output]
    rows: list[dict[str, float]]
    scored: Scored
    controls: list[Scored]
    kinds: list[Scored]
    interval: str
    extra: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    model_seconds: float = 0.0
    reused: int = 0
    fingerprint: str = ""

    @property
    def without_evidence(self) -> list[str]:
        """Names of the controls that the headline score does not beat."""
        name = self.task.headline
        own = self.scored.estimates[name]
        return [
            control.name
            for control in self.controls
            if control.role == "control" and stats.no_evidence(name, own, control.estimates[name])
        ]


def metrics_json(estimates: dict[str, stats.Estimate]) -> dict[str, Any]:
    """Estimates as JSON; an undefined score is null."""

    def clean(value: float) -> float | None:
        return None if math.isnan(value) else value

    return {
        name: {"value": clean(e.value), "ci95": [clean(e.low), clean(e.high)]}
        for name, e in estimates.items()
    }


def evaluate(
    task: Task, subject: Model, options: Options, folder: Path, run: Mapping[str, Any] | None = None
) -> Evaluation:
    """Run one task with its controls; what `folder` already holds is not asked again.

    run: provenance (see `records.claim`), kept beside the answers; rows that have changed since they were
    begun are then refused.
    """
    started = time.perf_counter()
    samples = task.load(options)
    if not samples:
        raise DataError(f"task '{task.name}' has no sample under these options")
    digests = [conversation_digest(sample.messages) for sample in samples]
    fingerprint = data.fingerprint(list(zip((s.id for s in samples), digests, strict=True)))
    with records.RecordStore(folder, task.name) as store:
        asked = Asker(task, subject, store)
        if run is not None:
            chosen: dict[str, Any] = {"split": options.split, "limit": options.limit, "seed": options.seed}
            chosen |= {"answers_sha256": asked.checkpoint, "data_root": _place(options)}
            records.claim(folder, task, fingerprint, chosen, run)
        outputs = asked.answers(samples, task.name, digests)
        controls = [
            scored
            for control in task.controls
            if (scored := _control(task, control, samples, options, asked)) is not None
        ]
    rows = [dict(task.judge(sample, output)) for sample, output in zip(samples, outputs, strict=True)]
    groups = [sample.group for sample in samples]
    return Evaluation(
        task=task,
        samples=samples,
        outputs=outputs,
        rows=rows,
        scored=Scored(
            task.name, "score", len(rows), stats.estimate(task.metrics, rows, groups, options.seed)
        ),
        controls=controls,
        kinds=_by_kind(task, samples, rows, options.seed),
        interval=_interval(groups),
        extra=task.extras(samples, outputs) if task.extras else {},
        seconds=time.perf_counter() - started,
        model_seconds=asked.seconds,
        reused=asked.reused,
        fingerprint=fingerprint,
    )


def _place(options: Options) -> str | None:
    """Which copy of the data, without saying where it lies."""
    if options.data_root is None:
        return None
    return hashlib.sha256(str(options.data_root.resolve()).encode()).hexdigest()[:16]


def _interval(groups: Sequence[str]) -> str:
    """How the interval was made, in words."""
    count = len(set(groups))
    if count == 1:
        return "bootstrap over rows; all rows are of one group, so other groups may differ more"
    if count == len(groups):
        return "bootstrap over rows"
    return f"bootstrap over {count} groups of rows"


def _by_kind(
    task: Task, samples: Sequence[Sample], rows: Sequence[dict[str, float]], seed: int
) -> list[Scored]:
    """The headline per slice, for slices that are large enough to say something."""
    members: dict[str, list[int]] = defaultdict(list)
    for i, sample in enumerate(samples):
        members[sample.kind].append(i)
    large = {kind: index for kind, index in members.items() if len(index) >= 4}
    if len(large) < 2:
        return []
    name = "accuracy" if "accuracy" in task.metrics else task.headline
    return [
        Scored(
            kind,
            "slice",
            len(index),
            stats.estimate([name], [rows[i] for i in index], [samples[i].group for i in index], seed, 1000),
        )
        for kind, index in sorted(large.items())
    ]


def _control(
    task: Task, control: Control, samples: Sequence[Sample], options: Options, asked: Asker
) -> Scored | None:
    """The task's metrics under a control, or None where it cannot be had for these rows."""
    altered: Sequence[Sample] = samples
    outputs: list[Output] | None
    if control.ask is not None:
        if len(samples) < 2:
            return None
        altered = control.ask(samples, options)
        outputs = asked.answers(altered, f"{task.name}: {control.name}")
    else:
        assert control.answer is not None
        outputs = control.answer(samples, options)
    if outputs is None:
        return None
    rows = [task.judge(sample, output) for sample, output in zip(altered, outputs, strict=True)]
    groups = [sample.group for sample in altered]
    estimates = stats.estimate(control.metrics or task.metrics, rows, groups, options.seed)
    return Scored(control.name, control.role, len(rows), estimates)
