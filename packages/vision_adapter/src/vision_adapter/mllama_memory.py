"""What the core reads of pictures of different lengths: one piece per layer, neither padded nor copied.

Axes: P pictures, S memory positions of all pictures, B batch, T text positions, G key/value heads,
D head dim, H query heads, R rows that are read together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core_llm.adapters import Spans
from core_llm.kernels import Mask, attend


@dataclass(frozen=True, eq=False)
class TileMemory:
    """Keys and values [G, S, D] per cross-attention block; picture p has positions bounds[p]..bounds[p + 1].

    With the positions side by side under each head, the pictures of any row are a slice.
    """

    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]
    bounds: tuple[int, ...]
    _sorted: dict[tuple[int, ...], "TileMemory"] = field(default_factory=dict, repr=False)

    @property
    def count(self) -> int:
        """P."""
        return len(self.bounds) - 1

    def select(self, pictures: Tensor | Sequence[int]) -> "TileMemory":
        """The memory of `pictures` [P'], in that order; a picture may come several times."""
        chosen = [int(p) for p in pictures]
        device = next(iter(self.keys.values())).device
        parts = [torch.arange(self.bounds[p], self.bounds[p + 1]) for p in chosen]
        index = torch.cat(parts).to(device) if parts else torch.zeros(0, dtype=torch.long, device=device)
        bounds = [0]
        for part in parts:
            bounds.append(bounds[-1] + len(part))
        keys = {layer: tensor.index_select(1, index) for layer, tensor in self.keys.items()}
        values = {layer: tensor.index_select(1, index) for layer, tensor in self.values.items()}
        return TileMemory(keys, values, tuple(bounds))

    def in_order(self, rows: Tensor) -> tuple["TileMemory", list[int]]:
        """The memory with the pictures of a row side by side, and which picture stands where.

        As an Assistant lists them they do already; otherwise they are copied, once per request.
        """
        listed = rows.tolist()
        order = sorted(range(len(listed)), key=listed.__getitem__)
        if order == list(range(len(order))):
            return self, order
        key = tuple(order)
        if key not in self._sorted:
            self._sorted[key] = self.select(order)
        return self._sorted[key], order


@dataclass(frozen=True, eq=False)
class Reading:
    """R rows of the batch that read equally long, adjoining parts of the memory, from `start` to `stop`."""

    rows: tuple[int, ...]
    start: int
    stop: int
    mask: Mask

    def read(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Queries [R, H, T, D] of these rows over memory [G, S, D] → [R, H, T, D]."""
        k, v = (
            tensor[:, self.start : self.stop].unflatten(1, (len(self.rows), -1)).transpose(0, 1)
            for tensor in (keys, values)
        )
        return attend(q, k, v, self.mask)


@dataclass(frozen=True, eq=False)
class Plan:
    """Who reads what in a pass: `rows` have pictures; `sees` [len(rows), T], None where all positions do."""

    readings: tuple[Reading, ...]
    rows: tuple[int, ...]
    sees: Tensor | None


def plan(spans: Spans, bounds: Sequence[int], order: Sequence[int]) -> Plan:
    """Split a pass into readings; `order` says which picture of the spans is number 0, 1, ... of `bounds`."""
    if spans.positions.shape[1] == 1:
        return _decoding(spans, bounds, order)
    visible = spans.visible()[:, :, list(order)]  # [B, T, P]
    rows = spans.rows.tolist()
    readings: list[Reading] = []
    seen: list[Tensor] = []
    for row in sorted(set(rows)):
        own = [n for n, p in enumerate(order) if rows[p] == row]
        mine = visible[row, :, own[0] : own[-1] + 1]  # [T, n]
        used = mine.any(0).nonzero()[:, 0].tolist()
        if not used:
            continue
        mine = mine[:, used[0] : used[-1] + 1]
        first, last = own[0] + used[0], own[0] + used[-1]
        sees = mine.any(1)
        seen.append(sees)
        lengths = [bounds[n + 1] - bounds[n] for n in range(first, last + 1)]
        # A position that sees nothing may read everything: its result is dropped.
        if bool((mine.all(1) | ~sees).all()):
            mask = Mask.full()
        else:
            repeats = torch.tensor(lengths, device=mine.device)
            mask = Mask.pairs(mine.repeat_interleave(repeats, dim=1)[None])
        readings.append(Reading((row,), bounds[first], bounds[last + 1], mask))
    return _planned(readings, torch.stack(seen) if seen else None)


def _decoding(spans: Spans, bounds: Sequence[int], order: Sequence[int]) -> Plan:
    """The same for one new token per row, by numbers on the host: a step must not wait for small kernels."""
    positions = spans.positions[:, 0].tolist()
    parts = list(zip(spans.rows.tolist(), spans.starts.tolist(), spans.ends.tolist(), strict=True))
    found: dict[int, list[int]] = {}
    for number, picture in enumerate(order):
        row, start, end = parts[picture]
        if start <= positions[row] < end:
            found.setdefault(row, []).append(number)
    readings = []
    for row, numbers in sorted(found.items()):
        start, stop, mask = bounds[numbers[0]], bounds[numbers[-1] + 1], Mask.full()
        if numbers[-1] - numbers[0] + 1 > len(numbers):  # another picture stands between those that it sees
            visible = torch.zeros(1, 1, stop - start, dtype=torch.bool)
            for number in numbers:
                visible[:, :, bounds[number] - start : bounds[number + 1] - start] = True
            mask = Mask.pairs(visible.to(spans.positions.device))
        readings.append(Reading((row,), start, stop, mask))
    return _planned(readings, None)


def _planned(readings: list[Reading], seen: Tensor | None) -> Plan:
    rows = tuple(row for reading in readings for row in reading.rows)
    sees = None if seen is None or bool(seen.all()) else seen
    return Plan(tuple(_joined(readings)), rows, sees)


def _joined(readings: list[Reading]) -> list[Reading]:
    """One reading for all rows where they are alike."""
    first = readings[0] if readings else None
    if first is None or len(readings) == 1:
        return readings
    length = first.stop - first.start
    alike = all(
        r.mask.kind == "full" and r.start == first.start + i * length and r.stop - r.start == length
        for i, r in enumerate(readings)
    )
    if not alike:
        return readings
    return [Reading(tuple(r.rows[0] for r in readings), first.start, readings[-1].stop, Mask.full())]
