"""The speech adapter: sound becomes vectors that stand in the core's token stream.

Axes: P clips, F feature frames (10 ms), M bands, S encoder frames (40 ms), E encoder width, T adapter frames
(80 ms), C core width; in chunks N blocks of W frames (see `chunks`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core_llm.adapters import Spans
from core_llm.chat import Audio
from core_llm.checkpoint import load_adapter, load_strict, save_adapter
from core_llm.errors import UserError
from core_llm.layers import FeedForward, RMSNorm
from core_llm.model import Llama
from speech_adapter.audio import SAMPLE_RATE, decode
from speech_adapter.chunks import Blocks, Chunking, Past
from speech_adapter.config import SpeechConfig
from speech_adapter.conformer import RotaryAttention
from speech_adapter.ctc import EmbeddingCTC
from speech_adapter.encoders import ConformerEncoder, build_encoder, rotation
from speech_adapter.features import HOP, N_FFT, below, log_mel, n_frames, running_level
from speech_adapter.whisper_weights import PREFIX, load_whisper

KIND = "speech"
N_BOUNDARIES = 2  # learnable vectors before and after a clip


@dataclass(frozen=True, eq=False)
class SpeechInputs:
    """Features of P clips: log_mel [P, F, M] padded to the longest, frames [P] real ones of each.

    raw: log10 of the power, not yet scaled to the level of the clip.
    """

    log_mel: Tensor
    frames: Tensor
    raw: bool = False


@dataclass(frozen=True, eq=False)
class SpeechMemory:
    """Encoded clips: vectors [P, T, C] padded to the longest, lengths [P] real ones of each.

    hidden [P, S, E] and stacked [P]: the encoder's own frames, for training losses.
    """

    vectors: Tensor
    lengths: Tensor
    hidden: Tensor
    stacked: Tensor


def n_tokens(n_samples: int, config: SpeechConfig) -> int:
    """Number of vectors that a clip of `n_samples` at 16 kHz puts into the token stream.

    With edges of 160 ms: ceil(ceil(floor(100 · (seconds + 0.32)) / 4) / 2) + 2, so 19 for one second and
    12.5 more for each further one; the same with either encoder. With `config.merge` this is the most that it
    can be: vectors that say the same word are merged and those that say nothing dropped, which leaves about
    one per word.
    """
    frames = n_frames(padded_length(n_samples, config))
    stacked = -(-frames // config.stack)
    return -(-stacked // 2) + N_BOUNDARIES


def padded_length(n_samples: int, config: SpeechConfig) -> int:
    """Samples of a clip with its edges, and with what a too short one lacks for a single frame."""
    return max(n_samples + 2 * (SAMPLE_RATE * config.edge_ms // 1000), N_FFT, HOP)


class Projector(nn.Module):
    """Halves the frame rate and maps the encoder's width to the core's: 40 ms frames → 80 ms vectors."""

    def __init__(self, config: SpeechConfig, width: int) -> None:
        """`width` E: the encoder's."""
        super().__init__()
        dim = config.adapter_dim
        self.subsample = nn.Conv1d(width, dim, kernel_size=3, stride=2, padding=1)
        self.attention = RotaryAttention(dim, config.adapter_heads, config.dropout)
        self.feed_forward_norm = RMSNorm(dim)
        self.feed_forward = FeedForward(dim, config.adapter_ffn_dim)
        self.norm = RMSNorm(dim)
        self.out = nn.Linear(dim, config.core_dim)
        self.scale = config.output_scale
        self.begin = nn.Parameter(torch.randn(config.core_dim) * self.scale)
        self.end = nn.Parameter(torch.randn(config.core_dim) * self.scale)

    def forward(
        self,
        x: Tensor,
        turns: tuple[Tensor, Tensor],
        real: Tensor,
        real_out: Tensor,
        past: Past | None = None,
    ) -> Tensor:
        """x [P, S, E], real [P, S], real_out [P, T] bool → [P, T, C]; blocks with their `past` likewise."""
        x = x.masked_fill(~real[..., None], 0.0)
        if past is None:
            x = self.subsample(x.transpose(1, 2)).transpose(1, 2)
        else:
            x = torch.cat((past.before(self, x, 1), x), dim=1).transpose(1, 2)
            x = F.conv1d(x, self.subsample.weight, self.subsample.bias, stride=2).transpose(1, 2)
            past = past.halved()
        x = F.gelu(x)
        x = self.attention.add_to(x, turns, real_out, past)
        x = x + self.feed_forward(self.feed_forward_norm(x))
        return self.out(self.norm(x)) * self.scale


class SpeechAdapter(nn.Module):
    """Implements `core_llm.adapters.Adapter` for Audio parts; see `n_tokens` for what a clip costs."""

    part: type = Audio

    def __init__(self, config: SpeechConfig, embeddings: Tensor) -> None:
        """`embeddings` [V, C]: the core's token embeddings, only read."""
        super().__init__()
        self.config = config
        self.reader = EmbeddingCTC(embeddings, config.codes)
        self.encoder = build_encoder(config)
        self.projector = Projector(config, self.encoder.width)

    def preprocess(self, parts: Sequence[Audio], raw: bool = False) -> SpeechInputs:
        """Decode clips and compute their features; raises MediaError that names a bad or too long file.

        `raw`: leave the level to `encode`, which in chunks follows it (see `Chunking`).
        """
        limit = self.config.max_seconds
        features = [self._features(decode(part.data, part.rate, limit), raw) for part in parts]
        frames = torch.tensor([len(f) for f in features])
        width = -(-int(frames.max()) // self.config.stack) * self.config.stack
        padded = [F.pad(f, (0, 0, 0, width - len(f)), value=-1.0) for f in features]
        return SpeechInputs(torch.stack(padded), frames, raw)

    def _features(self, samples: np.ndarray, raw: bool) -> Tensor:
        edge = SAMPLE_RATE * self.config.edge_ms // 1000
        missing = padded_length(len(samples), self.config) - len(samples) - 2 * edge
        padded = torch.from_numpy(np.pad(samples, (edge, edge + missing)))
        if raw:
            return log_mel(padded, self.chunked_encoder().config.n_mels)
        return self.encoder.features(padded)

    def chunked_encoder(self) -> ConformerEncoder:
        """The encoder where it can run in chunks; raises UserError where it cannot."""
        if not isinstance(self.encoder, ConformerEncoder):
            raise UserError(
                "a Whisper encoder reads windows of 30 s and cannot run in chunks; "
                "use an adapter with the Conformer encoder"
            )
        return self.encoder

    def encode(self, inputs: SpeechInputs, chunking: Chunking | None = None) -> SpeechMemory:
        """Run encoder and projector over all clips at once; padding changes nothing.

        With `chunking`, as `streaming.StreamingEncoder` would: no vector depends on what comes later than
        its chunk and the look-ahead. That is exact with raw inputs; others were scaled by the whole clip.
        """
        if chunking is not None:
            return self._encode_chunks(inputs, chunking)
        features = inputs.log_mel
        if inputs.raw:
            pairs = zip(features, inputs.frames.tolist(), strict=True)
            levels = torch.stack([clip[:n].max() for clip, n in pairs])
            features = below(features, levels, self.config.range_decades)
        encoded = self.encoder.encode(features, inputs.frames)
        n = encoded.hidden.shape[1]
        lengths = (encoded.lengths + 1) // 2
        position = torch.arange(n, device=lengths.device)
        real = position < encoded.lengths[:, None]
        real_out = position[: (n + 1) // 2] < lengths[:, None]
        vectors = self.projector(encoded.hidden, self.turns(real_out.shape[1]), real, real_out)
        return SpeechMemory(vectors, lengths, encoded.hidden, encoded.lengths)

    def turns(self, length: int, start: int = 0) -> tuple[Tensor, Tensor]:
        """Rotations of the projector's attention."""
        head_dim = self.config.adapter_dim // self.config.adapter_heads
        return rotation(length, head_dim, self.config.rope_theta, self.projector.out.weight, start)

    def _encode_chunks(self, inputs: SpeechInputs, chunking: Chunking) -> SpeechMemory:
        weight, stack = self.projector.out.weight, self.config.stack
        frames = inputs.frames.to(weight.device)
        features = inputs.log_mel.to(weight.device, weight.dtype)
        width = -(-features.shape[1] // stack) * stack
        features = F.pad(features, (0, 0, 0, width - features.shape[1]))
        missing = torch.arange(width, device=weight.device) >= frames[:, None]
        features = features.masked_fill(missing[..., None], float("-inf"))
        blocks = chunking.cut(features.unflatten(1, (-1, stack)), float("-inf")).flatten(2, 3)
        if inputs.raw:
            blocks = below(blocks, running_level(blocks), self.config.range_decades)
        n_clips, n_blocks = blocks.shape[:2]
        stacked = (frames + stack - 1) // stack
        position = torch.arange(width // stack, device=weight.device).expand(n_clips, -1)
        real = chunking.cut(position < stacked[:, None], False).flatten(0, 1)
        past = Blocks(chunking, n_clips, n_blocks, weight.device)
        hidden, vectors = self.encode_blocks(blocks.clamp(min=-1.0).flatten(0, 1), real, past)
        lengths = (stacked + 1) // 2
        return SpeechMemory(
            chunking.halved().join(vectors, n_clips, (width // stack + 1) // 2),
            lengths,
            chunking.join(hidden, n_clips, width // stack),
            stacked,
        )

    def encode_blocks(self, features: Tensor, real: Tensor, past: Past) -> tuple[Tensor, Tensor]:
        """Features [N, W · stack, M], real [N, W] bool → hidden [N, W, E], vectors [N, W/2, C]"""
        encoder, back = self.chunked_encoder(), past.window.look_back
        head_dim = self.config.dim // self.config.n_heads
        weight = encoder.project.weight
        turns = rotation(back + real.shape[1], head_dim, self.config.rope_theta, weight, -back)
        hidden = encoder(features, turns, real, past)
        turns_out = self.turns((back + real.shape[1]) // 2, -back // 2)
        return hidden, self.projector(hidden, turns_out, real, real[:, ::2], past)

    def place(self, memory: SpeechMemory) -> list[Tensor]:
        """One [n, C] tensor per clip, its vectors between the two boundary vectors.

        With `config.merge`, outside training, each vector becomes the embedding that it stands for and the
        boundaries are left out: what the core then reads is text, and it follows that better than sound.
        With `config.codes` that is so in training too: a core knows nothing of codes.
        """
        begin, end = self.projector.begin[None], self.projector.end[None]
        if self.config.merge:
            rows = self.reader.merge(memory.vectors, memory.lengths)
            if not self.training or self.config.codes is not None:
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


def create(encoder: str, core: Llama, **values: Any) -> SpeechAdapter:
    """A new adapter for a core, to be trained: random but for the weights of a Whisper encoder.

    encoder: "conformer", or "whisper:NAME" for openai-whisper's encoder of that name (or .pt file) with its
    weights; values: keys of `SpeechConfig`. Raises UserError for an unknown encoder or value, and
    CheckpointError where Whisper's weights cannot be had.
    """
    embeddings = core.embed_tokens.weight
    coded = values.get("codes") is not None
    values = {"output_scale": 1.0 if coded else float(embeddings.std()), **values}
    weights = None
    if encoder.startswith(PREFIX):
        whisper = load_whisper(encoder.removeprefix(PREFIX))
        sizes, weights = whisper.dims, whisper.encoder.state_dict()
        values |= {"encoder": "whisper", "n_mels": sizes.n_mels, "dim": sizes.n_audio_state}
        values |= {"n_layers": sizes.n_audio_layer, "n_heads": sizes.n_audio_head}
    elif encoder != "conformer":
        raise UserError(f"unknown encoder '{encoder}'; known: conformer, whisper:NAME, whisper:PATH.pt")
    try:
        config = SpeechConfig(core.config.dim, **values)
    except (TypeError, ValueError) as error:
        raise UserError(f"no such speech adapter: {error}") from None
    adapter = SpeechAdapter(config, embeddings)
    if weights is not None:
        load_strict(adapter.encoder.get_submodule("tower"), weights, encoder)
    return adapter


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
