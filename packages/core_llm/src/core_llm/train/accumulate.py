"""One step from several micro-batches, their gradients summed in fp32, for `core_llm.train.fit`.

The gradients of the stages come from many places (arXiv 2407.21783, sections 3.3 and 7.4: encoder outputs
are read by every cross-attention layer, and steps are made of micro-batches); summed in bf16 they would lose
what is small against the sum.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class _Given(torch.autograd.Function):
    """A number whose gradients are known already."""

    @staticmethod
    def forward(context: Any, value: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        context.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(context: Any, *outer: Tensor) -> Any:
        return None, None, *(None if g is None else g * outer[0] for g in context.gradients)


def accumulated(losses: Iterable[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """The sum of `losses`, whose backward pass gives the sum of their gradients.

    losses: scalars, best made one by one (a generator): the graph of each is freed before the next is
    computed, so that memory is that of one micro-batch. Sums are fp32 whatever the parameters are in.
    """
    total = torch.zeros((), device=parameters[0].device)
    if not torch.is_grad_enabled():
        return total + sum(loss.detach().float() for loss in losses)
    trained = [p for p in parameters if p.requires_grad]
    sums: list[Tensor | None] = [None] * len(trained)
    for loss in losses:
        total = total + loss.detach().float()
        found = torch.autograd.grad(loss, trained, allow_unused=True)
        for i, gradient in enumerate(found):
            if gradient is not None:
                known = sums[i]
                sums[i] = gradient.float() if known is None else known.add_(gradient.float())
        torch.clear_autocast_cache()  # its casts of the weights belong to the graph that is gone
    return _Given.apply(total, sums, *trained)


def split(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Micro-batches of `size`, the last one smaller; 0: all in one."""
    size = size or len(items)
    return [items[start : start + size] for start in range(0, len(items), size)]
