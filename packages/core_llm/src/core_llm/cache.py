"""Key/value cache: preallocated, each row with a length of its own, behind a prefix that all rows share.

Axes: B batch, G key/value heads, T new positions, P positions of the shared prefix, S capacity, D head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core_llm.config import LlamaConfig
from core_llm.errors import UserError


@dataclass(frozen=True, eq=False)
class Prefix:
    """Text that many prompts begin with, and its keys and values [1, G, P, D] of every layer.

    Built by `generate.compute_prefix`. A cache reads it in place: no row gets a copy.
    """

    tokens: tuple[int, ...]
    keys: Sequence[Tensor]
    values: Sequence[Tensor]

    def __len__(self) -> int:
        return len(self.tokens)


class KVCache:
    """Keys and values of every layer for a batch of rows.

    `lengths` [B] says how many positions of each row are filled, the shared prefix not counted; it
    moves once per forward pass, after all layers have written theirs.
    Raises `UserError` where prefix and capacity together exceed the model's context.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        prefix: Prefix | None = None,
    ) -> None:
        self.prefix = prefix
        self.start = len(prefix) if prefix else 0  # position of the first own token
        if self.start + capacity > config.max_positions:
            raise UserError(
                f"prompt and answer need {self.start + capacity} positions, the model has "
                f"{config.max_positions}; shorten the prompt or ask for fewer new tokens"
            )
        self.capacity = capacity
        shape = (batch, config.n_kv_heads, capacity, config.head_dim)
        # One tensor per layer: a compiler can then write in place, where slices of one big tensor get copied.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        # Kept on the host, because reading a tensor would wait for the device:
        self.longest = 0  # the greatest of `lengths` among the rows that still count
        self.level = True  # all rows are equally long
        self.static = False  # see `fix_shapes`

    def positions(self, n_new: int) -> Tensor:
        """Positions [B, T] at which the next `n_new` tokens of each row stand."""
        return self._slots(n_new) + self.start

    def _slots(self, n_new: int) -> Tensor:
        return self.lengths[:, None] + torch.arange(n_new, device=self.lengths.device)

    def check_room(self, n_new: int) -> None:
        """Raise `UserError` where `n_new` more positions do not fit; with fixed shapes the caller counts."""
        if not self.static and self.longest + n_new > self.capacity:
            raise UserError(
                f"the text is {self.start + self.longest + n_new} tokens long, the cache holds "
                f"{self.start + self.capacity}; shorten the prompt"
            )

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new k, v [B, G, T, D] behind each row's filled part; return all own keys and values so far.

        What lies beyond a row's own length is never visible to its queries. With fixed shapes, all S
        positions are returned.
        """
        n_new, keys, values = k.shape[2], self.keys[layer], self.values[layer]
        end = self.longest + n_new
        if self.level and not self.static:  # a plain copy is cheaper than a scatter
            keys[:, :, self.longest : end] = k
            values[:, :, self.longest : end] = v
        else:
            row = torch.arange(k.shape[0], device=k.device)[:, None]
            # A finished row may run past its room; nobody reads what it writes there.
            slot = self._slots(n_new).clamp(max=self.capacity - 1)
            keys[row, :, slot] = k.transpose(1, 2)
            values[row, :, slot] = v.transpose(1, 2)
        if self.static:
            return keys, values
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, n_new: int, lengths: Tensor | None = None) -> None:
        """Count the positions written: `lengths` [B] of them per row, or `n_new` in every row."""
        self.lengths += n_new if lengths is None else lengths
        if self.static:
            return
        self.longest += n_new  # with `lengths` an upper bound, and exact where one row is full
        self.level = self.level and lengths is None

    def forget_finished(self, longest: int) -> None:
        """Rows longer than `longest` own positions are finished: passes no longer read that far."""
        if longest < self.longest and not self.static:
            self.longest, self.level = longest, False

    def fix_shapes(self) -> None:
        """From now on every pass sees all S positions, so that no shape and no host value changes.

        What a compiled or captured step needs: it writes by an index on the device and waits for
        nothing. The caller sees to it that no unfinished row outgrows the capacity.
        """
        self.static = True
