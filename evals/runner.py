"""Task x model -> outputs -> scores with intervals and controls."""

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core_llm import stats
from core_llm.chat import Audio, Image, Text
from core_llm.digests import conversation_digest
from core_llm.errors import DataError, UserError
from evals import records
from evals.models import Model, Subject
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


def evaluate(task: Task, subject: Model, options: Options, folder: Path) -> Evaluation:
    """Run one task with its controls; what `folder` already holds is not asked again."""
    started = time.perf_counter()
    samples = task.load(options)
    if not samples:
        raise DataError(f"task '{task.name}' has no sample under these options")
    with records.RecordStore(folder, task.name) as store:
        asked = _Asked(task, subject, store)
        outputs = asked.answers(samples, task.name)
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
        reused=asked.reused,
        fingerprint=data.fingerprint([(s.id, conversation_digest(s.messages)) for s in samples]),
    )


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
    task: Task, control: Control, samples: Sequence[Sample], options: Options, asked: "_Asked"
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


class _Asked:
    """Asks the model for what the store does not have yet."""

    def __init__(self, task: Task, subject: Model, store: records.RecordStore) -> None:
        self.task, self.subject, self.store = task, subject, store
        needs = ("core", "image", "audio") if task.ask == "bit-equal" else task.needs
        self.checkpoint = subject.fingerprint(needs)
        self.reused = 0

    def answers(self, samples: Sequence[Sample], title: str) -> list[Output]:
        from tqdm import tqdm

        keys = [records.record_key(self.task, sample, self.checkpoint) for sample in samples]
        todo = {key: sample for key, sample in zip(keys, samples, strict=True) if key not in self.store.known}
        self.reused += len(samples) - len(todo)
        pending = sorted(todo, key=lambda key: _size(todo[key]))
        # Longest first: memory runs out at once or never, and the time left is not underestimated.
        pending.reverse()
        with tqdm(
            total=len(keys), initial=len(keys) - len(pending), desc=title, unit="row", dynamic_ncols=True
        ) as bar:
            for start in range(0, len(pending), self.task.batch_size):
                batch = pending[start : start + self.task.batch_size]
                rows = [todo[key] for key in batch]
                self.store.add(batch, rows, ask(self.task, self.subject, rows))
                bar.update(len(batch))
        return [self.store.known[key] for key in keys]


def _size(sample: Sample) -> tuple[int, str, str]:
    """Sort key: rows of like cost together, and questions on one image in one batch."""
    length = 0
    for message in sample.messages:
        for part in message.parts:
            if isinstance(part, Text):
                length += len(part.text)
            elif isinstance(part, Audio):
                length += _seconds(part) * 50
    has_image = any(isinstance(part, Image) for message in sample.messages for part in message.parts)
    return (0 if has_image else length, sample.group, sample.id)


def _seconds(part: Audio) -> int:
    """Rough duration: the exact one is not worth decoding a file twice."""
    import numpy as np

    if isinstance(part.data, np.ndarray):
        return int(len(part.data) / (part.rate or 16_000))
    size = len(part.data) if isinstance(part.data, bytes) else Path(part.data).stat().st_size
    return size // 16_000


def ask(task: Task, subject: Model, samples: Sequence[Sample]) -> list[Output]:
    """One batch through the model."""
    conversations = [sample.messages for sample in samples]
    if task.ask == "generate":
        return [{"text": text} for text in subject.generate(conversations, task.max_new_tokens)]
    if task.ask == "loglikelihood":
        found = subject.loglikelihood(conversations, [sample.target for sample in samples])
        return [{"logprob": logprob, "tokens": tokens} for logprob, tokens in found]
    if task.ask == "score":
        return [
            {
                "probability": float(verdict.probability),
                "unsafe": bool(verdict.unsafe),
                "categories": {name: round(float(p), 4) for name, p in verdict.categories.items()},
            }
            for verdict in subject.score(conversations)
        ]
    if task.ask == "own":
        assert task.asks is not None, f"task '{task.name}' says no way of asking"
        return task.asks(subject, samples)
    return _bit_equal(subject, samples)


def _bit_equal(subject: Model, samples: Sequence[Sample]) -> list[Output]:
    """Logits of the bare core against those with adapters, on the very same batch shape.

    The shape matters: matrix products of other sizes may sum in another order, with or without
    adapters. The bare core therefore gets the token ids of the whole batch, placeholders included.
    """
    import torch

    from core_llm.generate import Request, hidden_states
    from evals.tasks.regression import companions

    if not isinstance(subject, Subject):
        raise UserError(f"model '{subject.name}' has no bare core to compare with; leave out text-regression")

    outputs: dict[int, Output] = {}
    kinds = [adapter.part for adapter in subject.assistant.adapters]
    core, untouched = subject.assistant.core, subject.bare.core  # two, where an adapter updates its own
    for mixed in (False, True):
        index = [i for i, sample in enumerate(samples) if (sample.kind == "mixed batch") == mixed]
        if not index:
            continue
        rows = [samples[i].messages for i in index]
        rows += companions(kinds, seed=0) if mixed and kinds else []
        with torch.inference_mode():
            request = subject.assistant.prepare(rows)
            plain = Request(
                request.targets,
                None,
                request.lengths,
                request.targets,
                request.loss_mask,
                request.answer_starts,
            )
            ours = core.logits(hidden_states(core, request))
            bare = untouched.logits(hidden_states(untouched, plain))
        for row, i in enumerate(index):
            n = int(request.lengths[row])
            a, b = ours[row, :n], bare[row, :n]
            outputs[i] = {"equal": bool(torch.equal(a, b)), "max_difference": float((a - b).abs().max())}
    return [outputs[i] for i in range(len(samples))]
