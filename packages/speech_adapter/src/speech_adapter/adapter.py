"""The speech adapter: sound becomes vectors that stand in the core's token stream.

Axes: P clips, F feature frames (10 ms), S encoder frames (40 ms), T adapter frames (80 ms), C core width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core_llm.adapters import Spans
from core_llm.chat import Audio
from core_llm.checkpoint import load_adapter, load_strict, save_adapter
from core_llm.errors import MediaError
from core_llm.layers import FeedForward, RMSNorm
from core_llm.model import Llama
from core_llm.rope import inverse_frequencies, rotations
from speech_adapter.audio import SAMPLE_RATE, decode
from speech_adapter.config import SpeechConfig
from speech_adapter.conformer import Conformer, RotaryAttention
from speech_adapter.ctc import EmbeddingCTC
from speech_adapter.features import HOP, N_FFT, N_MELS, level_scale, log_mel, n_frames

KIND = "speech"
N_BOUNDARIES = 2  # learnable vectors before and after a clip


@dataclass(frozen=True, eq=False)
class SpeechInputs:
    """Features of P clips: log_mel [P, F, 80] padded to the longest, frames [P] real ones of each."""

    log_mel: Tensor
    frames: Tensor


@dataclass(frozen=True, eq=False)
class SpeechMemory:
    """Encoded clips: vectors [P, T, C] padded to the longest, lengths [P] real ones of each.

    hidden [P, S, C'] and stacked [P]: the encoder's own frames, for training losses.
    """

    vectors: Tensor
    lengths: Tensor
    hidden: Tensor
    stacked: Tensor


def n_tokens(n_samples: int, config: SpeechConfig) -> int:
    """Number of vectors that a clip of `n_samples` at 16 kHz puts into the token stream.

    With edges of 160 ms: ceil(ceil(floor(100 · (seconds + 0.32)) / 4) / 2) + 2, so 19 for one second and
    12.5 more for each further one. With `config.merge` this is the most that it can be: vectors that say the
    same word are merged and those that say nothing dropped, which leaves about one per word.
    """
    frames = n_frames(_padded_length(n_samples, config))
    stacked = -(-frames // config.stack)
    return -(-stacked // 2) + N_BOUNDARIES


def _padded_length(n_samples: int, config: SpeechConfig) -> int:
    return max(n_samples + 2 * (SAMPLE_RATE * config.edge_ms // 1000), N_FFT, HOP)


class Projector(nn.Module):
    """Halves the frame rate and maps the encoder's width to the core's: 40 ms frames → 80 ms vectors."""

    def __init__(self, config: SpeechConfig) -> None:
        super().__init__()
        dim = config.adapter_dim
        self.subsample = nn.Conv1d(config.dim, dim, kernel_size=3, stride=2, padding=1)
        self.attention = RotaryAttention(dim, config.adapter_heads, config.dropout)
        self.feed_forward_norm = RMSNorm(dim)
        self.feed_forward = FeedForward(dim, config.adapter_ffn_dim)
        self.norm = RMSNorm(dim)
        self.out = nn.Linear(dim, config.core_dim)
        self.scale = config.output_scale
        self.begin = nn.Parameter(torch.randn(config.core_dim) * self.scale)
        self.end = nn.Parameter(torch.randn(config.core_dim) * self.scale)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], real: Tensor, real_out: Tensor) -> Tensor:
        """x [P, S, C'], real [P, S], real_out [P, T] bool → [P, T, C]."""
        x = x.masked_fill(~real[..., None], 0.0)
        x = F.gelu(self.subsample(x.transpose(1, 2)).transpose(1, 2))
        x = x + self.attention(x, rotation, real_out)
        x = x + self.feed_forward(self.feed_forward_norm(x))
        return self.out(self.norm(x)) * self.scale


class SpeechAdapter(nn.Module):
    """Implements `core_llm.adapters.Adapter` for Audio parts; see `n_tokens` for what a clip costs."""

    part: type = Audio

    def __init__(self, config: SpeechConfig, embeddings: Tensor) -> None:
        """`embeddings` [V, C]: the core's token embeddings, only read."""
        super().__init__()
        self.config = config
        self.reader = EmbeddingCTC(embeddings)
        self.encoder = Conformer(config, N_MELS)
        self.projector = Projector(config)

    def preprocess(self, parts: Sequence[Audio]) -> SpeechInputs:
        """Decode clips and compute their features; raises MediaError that names a bad or too long file."""
        features = [self._features(decode(part.data, part.rate), part) for part in parts]
        frames = torch.tensor([len(f) for f in features])
        # The encoder sees whole stacks: what is missing in a clip's last one is silence.
        width = -(-int(frames.max()) // self.config.stack) * self.config.stack
        padded = [F.pad(f, (0, 0, 0, width - len(f)), value=-1.0) for f in features]
        return SpeechInputs(torch.stack(padded), frames)

    def _features(self, samples: np.ndarray, part: Audio) -> Tensor:
        seconds = len(samples) / SAMPLE_RATE
        if seconds > self.config.max_seconds:
            name = part.data if isinstance(part.data, (str, Path)) else "the given audio"
            limit = self.config.max_seconds
            raise MediaError(f"{name}: {seconds:.0f} s long, the limit is {limit:.0f} s: cut it up")
        edge = SAMPLE_RATE * self.config.edge_ms // 1000
        missing = _padded_length(len(samples), self.config) - len(samples) - 2 * edge
        padded = torch.from_numpy(np.pad(samples, (edge, edge + missing)))
        return level_scale(log_mel(padded), self.config.range_decades)

    def encode(self, inputs: SpeechInputs) -> SpeechMemory:
        """Run encoder and projector over all clips at once; padding changes nothing."""
        weight = self.projector.out.weight
        stack = self.config.stack
        frames = inputs.frames.to(weight.device)
        features = inputs.log_mel.to(weight.device, weight.dtype)
        position = torch.arange(features.shape[1], device=weight.device)
        features = features.masked_fill((position >= frames[:, None])[..., None], -1.0)
        stacked = (frames + stack - 1) // stack
        lengths = (stacked + 1) // 2
        n_stacked = features.shape[1] // stack
        real = position[:n_stacked] < stacked[:, None]
        real_out = position[: (n_stacked + 1) // 2] < lengths[:, None]
        rotation = self._rotation(n_stacked, self.config.dim // self.config.n_heads)
        hidden = self.encoder(features, rotation, real)
        head_dim = self.config.adapter_dim // self.config.adapter_heads
        vectors = self.projector(hidden, self._rotation(real_out.shape[1], head_dim), real, real_out)
        return SpeechMemory(vectors, lengths, hidden, stacked)

    def _rotation(self, length: int, head_dim: int) -> tuple[Tensor, Tensor]:
        weight = self.projector.out.weight
        frequencies = inverse_frequencies(head_dim, self.config.rope_theta).to(weight.device)
        return rotations(torch.arange(length, device=weight.device)[None], frequencies, weight.dtype)

    def place(self, memory: SpeechMemory) -> list[Tensor]:
        """One [n, C] tensor per clip, its vectors between the two boundary vectors.

        With `config.merge`, outside training, each vector becomes the embedding that it stands for and the
        boundaries are left out: what the core then reads is text, and it follows that better than sound.
        """
        begin, end = self.projector.begin[None], self.projector.end[None]
        if self.config.merge:
            rows = self.reader.merge(memory.vectors, memory.lengths)
            if not self.training:
                return [self.reader.denoise(row) for row in rows]
        else:
            pairs = zip(memory.vectors, memory.lengths.tolist(), strict=True)
            rows = [row[:length] for row, length in pairs]
        return [torch.cat((begin, row.to(begin.dtype), end)) for row in rows]

    def interleave(self, memory: SpeechMemory, spans: Spans) -> Mapping[int, Callable[[Tensor], Tensor]]:
        """Speech needs the token stream only."""
        return {}

    def save(self, directory: Path, core: Llama, card: str | None = None) -> None:
        """Write config.json and bf16 weights with the hash of the core they were trained for."""
        save_adapter(directory, KIND, self.config.to_dict(), dict(self.state_dict()), core, card)


def load(where: str | Path, core: Llama) -> SpeechAdapter:
    """Load "nano" (bundled) or a folder written by `SpeechAdapter.save`, in eval mode and frozen.

    Raises CheckpointError when files are missing or damaged, or belong to another core.
    """
    directory = Path(__file__).parent / "nano" if str(where) == "nano" else Path(where)
    values, tensors = load_adapter(directory, KIND, core)
    config = SpeechConfig.from_dict(values, f"{directory}/config.json")
    adapter = SpeechAdapter(config, core.embed_tokens.weight)
    load_strict(adapter, tensors, directory)
    return adapter.eval().requires_grad_(False)
