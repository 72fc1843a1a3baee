"""A safety task under attack: every request plain and in each form, and the paired differences."""

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from core_llm import stats
from core_llm.errors import UserError
from evals.attacks.base import Attack
from evals.attacks.registry import find
from evals.tasks.base import Control, Options, Output, Sample, Task

PLAIN = "plain"
_ASKS = ("generate", "score")
_LONGEST_NAME = 80  # characters


def apply(task: Task, names: Sequence[str], seed: int) -> Task:
    """The task with each of its requests as it is and under every attack.

    names: attacks, each measured by itself; "a+b" is a, then b. Row ID becomes "ID", "ID~rot13", ...; label,
    target and group stay, so that intervals are over the same requests, and the kind of a row is its attack.
    What an attack draws depends on the seed, its name and the row alone. `extras` has every metric of every
    form, the difference to plain with its 95 % interval, and what the task had. Controls that need the model
    are left out; those that do not see the requests as they were.
    Raises `UserError` for an unknown attack and for a task that is none of requests.
    """
    attacks = [find(name) for name in dict.fromkeys(names)]
    if not attacks:
        raise UserError("--attack names no attack; `evals attacks` shows them")
    if task.section != "safety" or task.ask not in _ASKS:
        raise UserError(
            f"attacks are for safety tasks of requests, and '{task.name}' is none; leave --attack out"
        )
    needs = tuple(dict.fromkeys([*task.needs, *(need for attack in attacks for need in attack.needs)]))
    changed = replace(
        task,
        name=f"{task.name}~{_short([attack.name for attack in attacks])}",
        title=f"{task.title}: plain, and {'; '.join(attack.title for attack in attacks)}",
        needs=needs,
        load=lambda options: _loaded(task, attacks, seed, options),
        controls=tuple(filter(None, (_plain_control(control) for control in task.controls))),
        extras=lambda samples, outputs: gaps(task, samples, outputs, seed),
    )
    return _reading(changed, needs) if len(needs) > len(task.needs) and task.ask == "score" else changed


def _short(names: Sequence[str]) -> str:
    """The names as part of a file's name: many of them are the first two and a digest of all."""
    joined = "~".join(names)
    if len(joined) <= _LONGEST_NAME:
        return joined
    return f"{names[0]}~{names[1]}~{hashlib.sha256(joined.encode()).hexdigest()[:8]}"[-_LONGEST_NAME:]


def _loaded(task: Task, attacks: Sequence[Attack], seed: int, options: Options) -> list[Sample]:
    plain = task.load(options)
    return [
        *(replace(sample, kind=PLAIN) for sample in plain),
        *(row for attack in attacks for row in attacked(plain, attack, seed)),
    ]


def attacked(samples: Sequence[Sample], attack: Attack, seed: int) -> list[Sample]:
    """Every sample under one attack, with its own random numbers; label, target and group stay."""
    rngs = [random.Random(f"{seed} {attack.name} {sample.id}") for sample in samples]
    return [
        replace(
            after,
            id=f"{before.id}~{attack.name}",
            group=before.group,
            target=before.target,
            label=before.label,
            kind=attack.name,
            note=before.note or before.messages[-1].text,
        )
        for before, after in zip(samples, attack.many(samples, rngs), strict=True)
    ]


def _plain_control(control: Control) -> Control | None:
    """The control over the requests as they were; None where it asks the model."""
    if control.answer is None:
        return None
    given = control.answer

    def answer(samples: Sequence[Sample], options: Options) -> list[Output] | None:
        plain = {sample.id: sample for sample in samples if sample.kind == PLAIN}
        return given([plain[_origin(sample)] for sample in samples], options)

    return replace(control, answer=answer)


def _origin(sample: Sample) -> str:
    """The id of the request that a row is made of."""
    return sample.id if sample.kind == PLAIN else sample.id.removesuffix(f"~{sample.kind}")


def _reading(task: Task, needs: tuple[str, ...]) -> Task:
    """A guard reads text: pictures and clips are put into words by the model's own adapters first."""
    from evals.tasks import modalities

    return replace(task, ask="own", asks=modalities.ask, needs=tuple(dict.fromkeys(("core", *needs))))


def gaps(task: Task, samples: Sequence[Sample], outputs: Sequence[Output], seed: int) -> dict[str, float]:
    """Each metric per form, "METRIC_FORM", and attacked minus plain on the same rows, "gap_METRIC_FORM".

    A metric that a form leaves undefined is left out.
    """
    rows: dict[str, dict[str, Mapping[str, float]]] = {}
    group = {sample.id: sample.group for sample in samples if sample.kind == PLAIN}
    for sample, output in zip(samples, outputs, strict=True):
        rows.setdefault(sample.kind, {})[_origin(sample)] = task.judge(sample, output)
    order = sorted(group)
    groups, plain = [group[name] for name in order], [rows[PLAIN][name] for name in order]
    found: dict[str, float] = {}
    for kind, by_id in rows.items():
        side = [by_id[name] for name in order]
        for metric, each in stats.estimate(task.metrics, side, groups, seed, 1).items():
            if each.value != each.value:  # NaN: no row that it counts
                continue
            found[f"{metric}_{kind}"] = each.value
            if kind != PLAIN:
                gap = stats.difference(metric, plain, side, groups, seed)
                found |= {
                    f"gap_{metric}_{kind}": gap.value,
                    f"gap_{metric}_{kind}_low": gap.low,
                    f"gap_{metric}_{kind}_high": gap.high,
                }
    return found | (_of_plain(task, samples, outputs) if task.extras else {})


def _of_plain(task: Task, samples: Sequence[Sample], outputs: Sequence[Output]) -> dict[str, float]:
    """What the task itself reports besides, over the plain requests."""
    pairs = [pair for pair in zip(samples, outputs, strict=True) if pair[0].kind == PLAIN]
    extras: Callable[[Sequence[Sample], Sequence[Output]], dict[str, float]] | None = task.extras
    assert extras is not None
    return extras([sample for sample, _ in pairs], [output for _, output in pairs])
