"""A moving average of what is trained: the weights that are judged and saved."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage(nn.Module):
    """Exponential average of some parameters.

    decay: how much of the average stays at each step; 0 keeps the parameters themselves, and no copy.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        super().__init__()
        self._followed = list(parameters) if decay else []
        self.decay = decay
        self.kept = nn.ParameterList(
            nn.Parameter(p.detach().clone(), requires_grad=False) for p in self._followed
        )

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the parameters as they are before `step`."""
        # Early on the average follows closely, or the untrained start would linger in it.
        decay = min(self.decay, (1 + step) / (10 + step))
        for kept, new in zip(self.kept, self._followed, strict=True):
            kept.lerp_(new, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """For as long as it is entered, the parameters are the averages."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    def exchange(self) -> None:
        """Let parameters and averages change places."""
        pairs: list[tuple[Tensor, Tensor]] = list(zip(self.kept, self._followed, strict=True))
        for kept, new in pairs:
            kept.data, new.data = new.data, kept.data
