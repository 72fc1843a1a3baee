"""Encoding in chunks: every chunk sees a bounded part of what came before it and a bounded part after it.

A clip is cut into blocks of `chunk` frames and the `look_ahead` frames behind them. In every layer a block's
frames see each other, and the last `look_back` frames of the chunks before. The frames ahead are encoded with
the block and again as the next chunk, so that the delay is one chunk and one look-ahead however many layers
there are (hard-copied right context: arXiv 2010.10759). All blocks at once (`Blocks`) and one block after the
other (`Cache`) run the same layers and give the same.

Axes: P clips, J blocks of a clip, N = P · J blocks, W = chunk + look_ahead frames of a block, L before.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from core_llm.errors import UserError

FRAME_MS = 40  # of an encoder frame
_STEP_MS = 2 * FRAME_MS  # of a vector in the core's token stream


@dataclass(frozen=True)
class Chunking:
    """How much a chunk is and sees, in frames; after `halved` in vectors of two frames."""

    chunk: int
    look_ahead: int
    look_back: int

    @classmethod
    def of_ms(cls, chunk_ms: int, look_ahead_ms: int, look_back_ms: int) -> Chunking:
        """From milliseconds. Raises UserError unless they are multiples of 80 and the chunk is not empty."""
        values = (chunk_ms, look_ahead_ms, look_back_ms)
        if chunk_ms < _STEP_MS or min(values) < 0 or any(value % _STEP_MS for value in values):
            raise UserError(
                f"chunk, look-ahead and look-back must be multiples of {_STEP_MS} ms, the chunk at least "
                f"one; got {chunk_ms}, {look_ahead_ms} and {look_back_ms} ms"
            )
        return cls(*(value // FRAME_MS for value in values))

    @property
    def width(self) -> int:
        """W, frames of a block."""
        return self.chunk + self.look_ahead

    def halved(self) -> Chunking:
        """The same at half the frame rate."""
        return Chunking(self.chunk // 2, self.look_ahead // 2, self.look_back // 2)

    def cut(self, frames: Tensor, fill: float) -> Tensor:
        """[P, S, ...] → blocks [P, J, W, ...] with J = ceil(S / chunk), filled up behind the end."""
        n = -(-frames.shape[1] // self.chunk)
        missing = n * self.chunk + self.look_ahead - frames.shape[1]
        tail = frames.new_full((frames.shape[0], missing, *frames.shape[2:]), fill)
        blocks = torch.cat((frames, tail), dim=1).unfold(1, self.width, self.chunk)
        return blocks.movedim(-1, 2)

    def join(self, blocks: Tensor, n_clips: int, length: int) -> Tensor:
        """The chunks of blocks [N, W, ...] as clips [P, length, ...]: `cut`, undone."""
        chunks = blocks[:, : self.chunk]
        return chunks.reshape(n_clips, -1, *chunks.shape[2:])[:, :length]


class Past(Protocol):
    """What a layer's blocks can see of the chunks before them."""

    window: Chunking

    def before(self, owner: Hashable, frames: Tensor, length: int) -> Tensor:
        """The `length` frames before each block, [N, length, C], zeros before the clip's begin.

        `owner` asks once per pass, with its frames [N, W, C] of these blocks.
        """
        ...

    def exists(self, length: int) -> Tensor:
        """Which of these frames are not before the clip's begin: bool [N, length]."""
        ...

    def halved(self) -> Past:
        """The same for a layer at half the frame rate."""
        ...


class Blocks:
    """All blocks of P clips in one pass, [P · J, W]: what is before a block stands in its neighbours."""

    def __init__(self, window: Chunking, n_clips: int, n_blocks: int, device: torch.device) -> None:
        self.window, self.n_clips, self.n_blocks, self.device = window, n_clips, n_blocks, device

    def before(self, owner: Hashable, frames: Tensor, length: int) -> Tensor:
        """See `Past`."""
        if length == 0:
            return frames[:, :0]
        chunk = self.window.chunk
        centres = frames[:, :chunk].reshape(self.n_clips, self.n_blocks * chunk, -1)
        windows = F.pad(centres, (0, 0, length, 0)).unfold(1, length, chunk)[:, : self.n_blocks]
        return windows.transpose(2, 3).flatten(0, 1)

    def exists(self, length: int) -> Tensor:
        """See `Past`."""
        starts = torch.arange(self.n_blocks, device=self.device) * self.window.chunk
        index = starts[:, None] - length + torch.arange(length, device=self.device)
        return (index >= 0).repeat(self.n_clips, 1)

    def halved(self) -> Blocks:
        """See `Past`."""
        return Blocks(self.window.halved(), self.n_clips, self.n_blocks, self.device)


class Cache:
    """One block after the other of one clip: what is before it was kept when it passed."""

    def __init__(self, window: Chunking, device: torch.device) -> None:
        self.window, self.device = window, device
        self.start = 0  # frames before the current block
        self.kept: dict[Hashable, Tensor] = {}

    def before(self, owner: Hashable, frames: Tensor, length: int) -> Tensor:
        """See `Past`."""
        if length == 0:
            return frames[:, :0]
        past = self.kept.get(owner)
        if past is None:
            past = frames.new_zeros(1, length, frames.shape[2])
        # A copy: a view would keep everything that ever passed.
        self.kept[owner] = torch.cat((past, frames[:, : self.window.chunk]), dim=1)[:, -length:].clone()
        return past

    def exists(self, length: int) -> Tensor:
        """See `Past`."""
        return (self.start - length + torch.arange(length, device=self.device) >= 0)[None]

    def halved(self) -> Cache:
        """See `Past`; what is kept is kept in one place."""
        half = Cache(self.window.halved(), self.device)
        half.start, half.kept = self.start // 2, self.kept
        return half
