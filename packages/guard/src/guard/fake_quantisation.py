"""Training with the weights that a quantised guard will have: rounded forward, as if unrounded backward.

Quantisation-aware training with straight-through gradients (arXiv 1308.3432; 1712.05877). The rounding is
that of `core_llm.quantize` itself, so the trained weights meet the very grid that they are saved on.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from core_llm.model import Llama
from core_llm.quantize import EMBEDDINGS, SCHEMES
from core_llm.quantized_linear import QuantizedLinear
from guard.head import VerdictHead


class Rounded(nn.Module):
    """A weight [N, K] as a quantised layer of a kind would hold it."""

    def __init__(self, kind: type[QuantizedLinear]) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, weight: Tensor) -> Tensor:
        """Rounded values; the gradient goes through as it is."""
        with torch.no_grad():
            change = self.kind.from_weight(weight).dequantized().to(weight.dtype) - weight
        return weight + change


@contextmanager
def rounded_weights(core: Llama, scheme: str | None) -> Iterator[None]:
    """For as long as it is entered, the core computes with rounded weights; None: as it is.

    The embedding's table is rounded too where its head is cut, and with it shares no weight.
    """
    kinds: dict[nn.Module, type[QuantizedLinear]] = {}
    if scheme is not None:
        for name, module in core.named_modules():
            kind = SCHEMES[scheme](name, core.config.n_layers) if isinstance(module, nn.Linear) else None
            if kind is not None and name != "lm_head":
                kinds[module] = kind
        if isinstance(core.lm_head, VerdictHead):
            kinds[core.embed_tokens] = EMBEDDINGS[scheme]
    for module, kind in kinds.items():
        parametrize.register_parametrization(module, "weight", Rounded(kind))
    try:
        yield
    finally:
        for module in kinds:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
