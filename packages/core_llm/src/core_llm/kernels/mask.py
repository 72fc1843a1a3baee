"""Which query may see which key.

Axes: B batch, T query positions, S key positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Mask:
    """A rule of visibility; build it by the named constructors.

    Kept symbolic so that a backend can pick its fast path: only `dense` spells the rule out.
    """

    kind: str
    offsets: Tensor | None = None  # [B]: position of the first query of each row
    documents: Tensor | None = None  # [B, T]: document number of each position
    shared_prefix: bool = False  # document 0 is seen by every later one
    visible: Tensor | None = None  # [B, S] or [B, T, S], bool

    @classmethod
    def full(cls) -> "Mask":
        """Every query sees every key."""
        return cls("full")

    @classmethod
    def causal(cls) -> "Mask":
        """Query t sees keys 0..t."""
        return cls("causal")

    @classmethod
    def cached(cls, offsets: Tensor) -> "Mask":
        """Query t of row b stands at position offsets[b] + t and sees the keys up to itself."""
        return cls("cached", offsets=offsets)

    @classmethod
    def packed(cls, documents: Tensor, shared_prefix: bool = False) -> "Mask":
        """Causal within a document; with `shared_prefix`, document 0 is visible to all."""
        return cls("packed", documents=documents, shared_prefix=shared_prefix)

    @classmethod
    def keys(cls, visible: Tensor) -> "Mask":
        """Row b sees the keys where visible[b] is true; visible is bool [B, S]."""
        return cls("keys", visible=visible)

    @classmethod
    def pairs(cls, visible: Tensor) -> "Mask":
        """Query t of row b sees the keys where visible[b, t] is true; visible is bool [B, T, S]."""
        return cls("pairs", visible=visible)

    def dense(self, n_queries: int, n_keys: int, device: torch.device) -> Tensor | None:
        """The rule as bool [B or 1, T or 1, S], or None where everything is visible."""
        if self.kind == "full":
            return None
        if self.visible is not None:
            return self.visible[:, None, :] if self.visible.dim() == 2 else self.visible
        key = torch.arange(n_keys, device=device)
        query = torch.arange(n_queries, device=device)
        if self.offsets is not None:
            return key <= (self.offsets[:, None] + query)[:, :, None]
        causal = (key <= query[:, None])[None]
        if self.documents is None:
            return causal
        own, other = self.documents[:, :, None], self.documents[:, None, :]
        same = (own == other) | (other == 0) if self.shared_prefix else own == other
        return causal & same
