"""Where a question about a drawn scene points: which patches its words and its answer are about.

A training aid. That a word such as "red circle" belongs to one place of the picture shows in an answer's loss
only after several layers have each learned their part; here the first part is asked for itself, as the share
of attention that falls on the right patches. Axes: B rows, T text positions, S patches, H heads, D head dim.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from core_llm.data.scenes import COLORS, SHAPES, Bar, Item
from vision_adapter.scenes import Box, Layout, patches_under

MENTION, ANSWER = 1, 2  # kinds of pointer
_NOUN = re.compile(rf"(?:({'|'.join(COLORS)}) )?\b({'|'.join(SHAPES)}|shape|bar)s?\b")
_PLACE = re.compile(r"at the ((?:top|bottom)(?: left| right)?|left|right|center)\?")


@dataclass(frozen=True, eq=False)
class Pointer:
    """patches [S] bool, never empty. end: number of characters of the question up to where the words end that
    name them; None: the place from which the answer is given."""

    patches: Tensor
    end: int | None = None


def pointers(question: str, answer: str, plan: Layout, patches: int) -> list[Pointer]:
    """What a question and its answer point at in a picture of patches × patches."""
    found = [(end, boxes) for end, boxes in _mentions(question, plan) if boxes]
    result = [Pointer(_under(boxes, patches), end) for end, boxes in found]
    chosen = _of_answer(question, answer, plan) or (found[0][1] if len(found) == 1 else [])
    return [*result, Pointer(_under(chosen, patches))] if chosen else result


def _mentions(question: str, plan: Layout) -> Iterator[tuple[int, list[Box]]]:
    for match in _NOUN.finditer(question):
        color, noun = match.groups()
        yield match.end(), _boxes(plan, lambda what, c=color, n=noun: _fits(what, c, n))  # type: ignore[misc]
    if place := _PLACE.search(question):
        yield place.end(1), _boxes(plan, lambda what: isinstance(what, Item) and what.place == place[1])


def _of_answer(question: str, answer: str, plan: Layout) -> list[Box]:
    """What the answer names, where it names something."""
    if plan.letters:
        return list(plan.letters)
    named = _boxes(plan, lambda what: isinstance(what, Item) and what.name == answer)
    return named or _boxes(plan, lambda what: isinstance(what, Bar) and what.color == answer)


def _fits(what: Item | Bar | str, color: str | None, noun: str) -> bool:
    if isinstance(what, str) or (color is not None and what.color != color):
        return False
    return noun in ("shape", what.shape) if isinstance(what, Item) else noun == "bar"


def _boxes(plan: Layout, chosen: Callable[[Item | Bar | str], bool]) -> list[Box]:
    return [box for box in plan.boxes if chosen(box.item)]


def _under(boxes: list[Box], patches: int) -> Tensor:
    return torch.stack([patches_under(box, patches) for box in boxes]).any(dim=0).flatten()


def pointing_loss(
    queries: Mapping[int, Tensor], keys: Mapping[int, Tensor], regions: Tensor, kinds: Tensor
) -> tuple[Tensor, float]:
    """Minus the log of the attention that falls on the right patches, mean over pointers, heads and layers.

    queries [B, H, T, D] and keys [B, G, S, D] by layer, normed; regions [B, T, S] bool; kinds [B, T]: 0,
    `MENTION` or `ANSWER`. One half of the heads is asked, the other stays free; answers are asked of the
    later half of the layers, because the earlier ones cannot know the question yet.
    Returns the loss and the mean share of attention in the last layer.
    """
    losses, share = [], 1.0
    for number, (layer, q) in enumerate(sorted(queries.items())):
        late = 2 * number >= len(queries)
        row, position = ((kinds == MENTION) | ((kinds == ANSWER) & late)).nonzero(as_tuple=True)
        if not len(row):
            continue
        heads = max(1, q.shape[1] // 2)
        chosen = q[row, :heads, position].float()  # [N, H / 2, D]
        k = keys[layer]
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)[:, :heads].float()[row]
        scores = torch.einsum("nhd,nhsd->nhs", chosen, k) * q.shape[-1] ** -0.5
        right = regions[row, position][:, None]
        mass = scores.log_softmax(-1).masked_fill(~right, -torch.inf).logsumexp(-1)
        losses.append(-mass.mean())
        share = mass.exp().mean().item()
    if not losses:
        return torch.zeros((), device=regions.device), share
    return torch.stack(losses).mean(), share


def cells(regions: Tensor) -> Tensor:
    """Patches [N, S] bool of a square picture → long [N]: the cell of their centre in a 3 × 3 grid."""
    side = math.isqrt(regions.shape[-1])
    weights = regions.float() / regions.sum(-1, keepdim=True)
    index = torch.arange(regions.shape[-1], device=regions.device)
    row, column = (
        ((weights @ place.float() + 0.5) * 3 / side).long().clamp(0, 2)
        for place in (index // side, index % side)
    )
    return 3 * row + column
