"""Encoding while the sound still comes: what is fed piece by piece gives what `SpeechAdapter.encode` gives
with the same `Chunking`, however the samples are cut into pieces. Time and memory per chunk do not grow.

Axes: M bands, S encoder frames (40 ms), E encoder width, T adapter frames (80 ms), C core width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from speech_adapter.adapter import SpeechAdapter, padded_length
from speech_adapter.audio import SAMPLE_RATE
from speech_adapter.chunks import Cache, Chunking
from speech_adapter.features import HOP, N_FFT, below, framed_log_mel


@dataclass(frozen=True, eq=False)
class Heard:
    """One more chunk: hidden [S, E] of the encoder, vectors [T, C] as they stand in the core's token stream.

    start: seconds from the clip's begin to the chunk's; negative within the silence added there.
    """

    hidden: Tensor
    vectors: Tensor
    start: float


class FrameStream:
    """`features.log_mel` of samples that come in pieces."""

    def __init__(self, n_mels: int) -> None:
        self.n_mels = n_mels
        self._held = torch.zeros(0)
        self._begun = False

    def feed(self, samples: Tensor) -> Tensor:
        """Samples [N] at 16 kHz → the frames that they complete, [F, M] log10."""
        self._held = torch.cat((self._held, samples))
        half = N_FFT // 2
        if not self._begun:
            if len(self._held) <= half:
                return torch.zeros(0, self.n_mels)
            self._held = torch.cat((self._held[1 : half + 1].flip(0), self._held))
            self._begun = True
        n = (len(self._held) - N_FFT) // HOP + 1
        if n < 1:
            return torch.zeros(0, self.n_mels)
        frames = framed_log_mel(self._held[: (n - 1) * HOP + N_FFT], self.n_mels)
        self._held = self._held[n * HOP :].clone()
        return frames

    def finish(self) -> Tensor:
        """The frames that the end completes: one too many, as of every clip."""
        half = N_FFT // 2
        return self.feed(self._held[-half - 1 : -1].flip(0))


class StreamingEncoder:
    """An adapter's encoder and projector over one clip of any length, chunk by chunk.

    A chunk is out as soon as its look-ahead is in: the delay is at most chunk plus look-ahead, in sound. The
    features' level is that of the loudest band so far, from `level` on (log10 of the power; None: from the
    begin). Raises UserError for impossible times, and for an encoder that cannot run in chunks.
    """

    def __init__(
        self,
        adapter: SpeechAdapter,
        chunk_ms: int = 640,
        look_ahead_ms: int = 640,
        look_back_ms: int = 5_120,
        level: float | None = None,
    ) -> None:
        self.adapter = adapter
        self.chunking = Chunking.of_ms(chunk_ms, look_ahead_ms, look_back_ms)
        self.level = float("-inf") if level is None else level
        self.n_samples = 0  # fed so far
        self._frames = FrameStream(adapter.chunked_encoder().config.n_mels)
        self._features = torch.zeros(0, adapter.config.n_mels)  # from the next chunk's begin on
        self._cache = Cache(self.chunking, adapter.projector.out.weight.device)
        self._edge = SAMPLE_RATE * adapter.config.edge_ms // 1000
        self._finished = False
        self._seen = 0  # feature frames so far

    @torch.inference_mode()
    def feed(self, samples: np.ndarray) -> list[Heard]:
        """More samples [N], 16 kHz mono float32 → the chunks that are complete now, mostly none or one."""
        if self._finished:
            raise RuntimeError("this clip is finished: begin a new StreamingEncoder for the next one")
        if samples.ndim != 1:
            raise ValueError(f"expected mono samples of shape [N], got {list(samples.shape)}")
        if not len(samples):
            return []
        if self.n_samples == 0:
            self._take(torch.zeros(self._edge))
        self.n_samples += len(samples)
        self._take(torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32)))
        return self._chunks(last=False)

    @torch.inference_mode()
    def finish(self) -> list[Heard]:
        """The clip has ended: its remaining chunks."""
        if self._finished or self.n_samples == 0:
            self._finished = True
            return []
        self._finished = True
        whole = padded_length(self.n_samples, self.adapter.config)
        self._take(torch.zeros(whole - self.n_samples - self._edge))
        self._keep(self._frames.finish()[: whole // HOP - self._seen])
        return self._chunks(last=True)

    def _take(self, samples: Tensor) -> None:
        self._keep(self._frames.feed(samples))

    def _keep(self, features: Tensor) -> None:
        self._seen += len(features)
        self._features = torch.cat((self._features, features))

    def _chunks(self, last: bool) -> list[Heard]:
        heard = []
        step, width = (n * self.adapter.config.stack for n in (self.chunking.chunk, self.chunking.width))
        while len(self._features) >= width or (last and len(self._features)):
            heard.append(self._encode(self._features[:width], last))
            self._features = self._features[step:].clone()
            self._cache.start += self.chunking.chunk
        return heard

    def _encode(self, features: Tensor, last: bool) -> Heard:
        """One block, which is shorter at the end of the clip."""
        config, chunking = self.adapter.config, self.chunking
        weight = self.adapter.projector.out.weight
        self.level = max(self.level, float(features.max()))
        n_real = -(-len(features) // config.stack)
        block = features.new_full((1, chunking.width * config.stack, config.n_mels), float("-inf"))
        block[0, : len(features)] = features
        scaled = below(block, torch.tensor([self.level]), config.range_decades)
        real = torch.arange(chunking.width, device=weight.device)[None] < n_real
        hidden, vectors = self.adapter.encode_blocks(
            scaled.to(weight.device, weight.dtype), real, self._cache
        )
        n = min(chunking.chunk, n_real)
        start = self._cache.start * config.stack * HOP - self._edge
        return Heard(hidden[0, :n], vectors[0, : (n + 1) // 2], start / SAMPLE_RATE)
