"""One process's share of a batch: the batch is that of the whole run, however many processes there are."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor

from core_llm import processes
from core_llm.errors import UserError


def rows(batch: Any) -> int:
    """How many examples a batch has.

    A batch is a tensor or a list, one row per example; a tuple or mapping of such columns; or a dataclass
    whose tensors and lists are columns, other fields being the same for all. Raises ValueError for anything
    else.
    """
    lengths = {len(column) for column in _columns(batch)}
    if len(lengths) != 1:
        raise ValueError(f"a batch of type {type(batch).__name__} has no single number of rows: {lengths}")
    return lengths.pop()


def _columns(batch: Any) -> list[Any]:
    if isinstance(batch, Tensor | list):
        return [batch]
    if isinstance(batch, tuple):
        return [column for part in batch for column in _columns(part)]
    if isinstance(batch, Mapping):
        return [column for part in batch.values() for column in _columns(part)]
    if is_dataclass(batch):
        return [value for field in fields(batch) if _is_column(value := getattr(batch, field.name))]
    raise ValueError(f"a batch of type {type(batch).__name__} cannot be split")


def _is_column(value: Any) -> bool:
    return isinstance(value, Tensor | list)


def _cut(batch: Any, start: int, stop: int) -> Any:
    if isinstance(batch, tuple):
        return tuple(_cut(part, start, stop) for part in batch)
    if isinstance(batch, Mapping):
        return {name: _cut(part, start, stop) for name, part in batch.items()}
    if is_dataclass(batch) and not isinstance(batch, type):
        names = [f.name for f in fields(batch) if _is_column(getattr(batch, f.name))]
        return replace(batch, **{name: getattr(batch, name)[start:stop] for name in names})
    return batch[start:stop]


def share(batch: Any, rank: int, count: int) -> Any:
    """The rows of one of `count` processes, neighbours as equal in number as can be.

    Raises `UserError` where there are fewer rows than processes.
    """
    n = rows(batch)
    if n < count:
        raise UserError(
            f"a batch of {n} cannot be split over {count} processes; take fewer, or --batch larger"
        )
    return _cut(batch, rank * n // count, (rank + 1) * n // count)


def weighed(task: Any, batch: Any) -> tuple[Any, float]:
    """This process's rows, and the part that their loss has in the loss of the whole batch.

    Where a task's loss is a mean over anything but rows, its method `weight(batch)` says over how many: with
    it the sum over processes is the loss of one process. Without it, rows count alike.
    """
    if processes.count() == 1:
        return batch, 1.0
    own = share(batch, processes.rank(), processes.count())
    weight = getattr(task, "weight", rows)
    known: Sequence[float] = processes.gathered(float(weight(own)))
    return own, known[processes.rank()] / sum(known) if sum(known) else 0.0
