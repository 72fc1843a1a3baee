"""Key/value cache: preallocated, each row with a length of its own.

Axes: B batch, G key/value heads, T new positions, S capacity, D head dim.
"""

import torch
from torch import Tensor

from core_llm.config import LlamaConfig
from core_llm.errors import UserError


class KVCache:
    """Keys and values of every layer for a batch of rows.

    `lengths` [B] says how many positions of each row are filled; it moves once per forward
    pass, after all layers have written theirs.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if capacity > config.max_positions:
            raise UserError(
                f"prompt and answer need {capacity} positions, the model has {config.max_positions}; "
                "shorten the prompt or ask for fewer new tokens"
            )
        shape = (config.n_layers, batch, config.n_kv_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.longest = 0  # the greatest of `lengths`, kept on the host: reading a tensor would wait for it

    def positions(self, n_new: int) -> Tensor:
        """Positions [B, T] at which the next `n_new` tokens of each row stand."""
        return self.lengths[:, None] + torch.arange(n_new, device=self.lengths.device)

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new k, v [B, G, T, D] behind each row's filled part; return all keys and values so far.

        What lies beyond a row's own length is never visible to its queries.
        """
        n_new = k.shape[2]
        if self.longest == 0:  # prefill: all rows start together, a plain copy
            self.keys[layer, :, :, :n_new] = k
            self.values[layer, :, :, :n_new] = v
        else:
            row = torch.arange(k.shape[0], device=k.device)[:, None]
            where = self.positions(n_new)
            self.keys[layer][row, :, where] = k.transpose(1, 2)
            self.values[layer][row, :, where] = v.transpose(1, 2)
        end = self.longest + n_new
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, n_new: int, lengths: Tensor | None = None) -> None:
        """Count the positions written: `lengths` [B] of them per row, or `n_new` in every row."""
        if lengths is None:
            self.lengths += n_new
            self.longest += n_new
        else:
            self.lengths += lengths
            self.longest = int(self.lengths.max())
