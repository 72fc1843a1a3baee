"""An embedding whose table is kept in few bits, and the head of a core that has none.

Axes: V vocabulary, C model width.
"""

import torch
from torch import Tensor, nn

from core_llm.errors import UserError
from core_llm.quantized_linear import QuantizedLinear

TABLE = "embed_tokens.table"  # name in a core of the layer that holds the rows


class QuantizedEmbedding(nn.Module):
    """Rows of a table [V, C] that is held as the weight of a quantised layer; looked up, then widened.

    Adapters that read the whole table cannot be attached to such a core.
    """

    like: Tensor

    def __init__(self, table: QuantizedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = table
        self.register_buffer("like", torch.empty(0), persistent=False)
        self.hold(dtype)

    def hold(self, dtype: torch.dtype) -> None:
        """Give rows of this dtype from now on, on the device of the table."""
        self.like = torch.empty(0, self.table.in_features, dtype=dtype, device=self.table.weight.device)

    @property
    def weight(self) -> Tensor:
        """No rows [0, C], but the dtype and the device that rows will have: what callers ask a weight for."""
        return self.like

    def forward(self, tokens: Tensor) -> Tensor:
        """Ids [...] → rows [..., C]."""
        rows = self.table.dequantized(tokens.flatten())
        return rows.to(self.like.dtype).unflatten(0, tokens.shape)


class NoHead(nn.Module):
    """Stands where a core was saved without its head: whoever loads it brings one."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Raises `UserError`."""
        raise UserError("this core was saved without its head; load it with the program that wrote it")
