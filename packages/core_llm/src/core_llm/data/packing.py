"""Packing of conversations into fixed windows with document masks.

Axes: B windows, T positions in a window.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MISSES = 8  # documents in a row without room: the windows count as full


@dataclass(frozen=True)
class Document:
    """Token ids of one document and the weight of each as a prediction target."""

    ids: list[int]
    weights: list[float]


@dataclass(frozen=True, eq=False)
class Packed:
    """Windows of documents: tokens, documents and weights, each [B, T]; padding has weight 0."""

    tokens: Tensor
    documents: Tensor
    weights: Tensor


def pack(documents: Iterable[Document], width: int, windows: int, pad_id: int) -> Packed:
    """Fill `windows` windows of `width` positions with whole documents, first fit; what is longer is cut.

    The stream may be endless: packing ends when many documents in a row have found no room.
    """
    bins: list[list[Document]] = [[] for _ in range(windows)]
    room = [width] * windows
    misses = 0
    for document in documents:
        size = min(len(document.ids), width)
        for i in range(windows):
            if room[i] >= size:
                bins[i].append(document)
                room[i] -= size
                misses = 0
                break
        else:
            misses += 1
            if misses == _MISSES:
                break
    return _stack(bins, width, pad_id)


def _stack(bins: Sequence[Sequence[Document]], width: int, pad_id: int) -> Packed:
    tokens = torch.full((len(bins), width), pad_id)
    numbers = torch.zeros((len(bins), width), dtype=torch.long)
    weights = torch.zeros((len(bins), width))
    for row, group in enumerate(bins):
        at = 0
        for number, document in enumerate(group, start=1):
            n = min(len(document.ids), width)
            tokens[row, at : at + n] = torch.tensor(document.ids[:n])
            weights[row, at : at + n] = torch.tensor(document.weights[:n])
            weights[row, at] = 0.0  # nothing precedes the first token
            numbers[row, at : at + n] = number
            at += n
    return Packed(tokens, numbers, weights)
