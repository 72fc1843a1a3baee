"""BEST-RQ (arXiv 2202.01855) as in arXiv 2407.21783, section 8.2: the encoder learns to guess masked sound.

A random projection and random codebooks, which never change, say what the masked frames were; the encoder
names the nearest vector of each codebook. No text is needed.
Axes: P clips, F feature frames (10 ms), M bands, S encoder frames (40 ms), N masked frames, G codebooks,
K vectors per codebook, D code width, E encoder width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core_llm.chat import Audio
from speech_adapter.adapter import SpeechAdapter, padded_length
from speech_adapter.audio import SAMPLE_RATE
from speech_adapter.examples import Example
from speech_adapter.features import HOP, n_frames
from speech_adapter.stages.clips import Clip, ClipTask
from speech_adapter.stages.presets import StageConfig

_NOISE = 0.1  # standard deviation of what stands in masked frames, of normalised features


class RandomQuantizer(nn.Module):
    """Frozen projection and codebooks, and the trained layer that guesses what they say."""

    projection: Tensor
    codebooks: Tensor

    def __init__(self, inputs: int, width: int, config: StageConfig, seed: int) -> None:
        """`inputs`: numbers in a stacked frame; `width` E: the encoder's."""
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        bound = (6 / (inputs + config.code_dim)) ** 0.5  # Xavier, as in the paper of BEST-RQ
        projection = (2 * torch.rand(inputs, config.code_dim, generator=generator) - 1) * bound
        codebooks = torch.randn(config.codebooks, config.codes, config.code_dim, generator=generator)
        self.register_buffer("projection", projection)
        self.register_buffer("codebooks", F.normalize(codebooks, dim=-1))
        self.out = nn.Linear(width, config.codebooks * config.codes)

    @torch.no_grad()
    def codes(self, stacked: Tensor) -> Tensor:
        """The nearest vector by cosine in each codebook: normalised frames [N, stack · M] → [N, G]."""
        with torch.autocast(stacked.device.type, enabled=False):
            projected = F.normalize(stacked.float() @ self.projection, dim=-1)
            return torch.stack([(projected @ book.T).argmax(dim=-1) for book in self.codebooks], dim=-1)

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, E] → logits fp32 [N, G, K]."""
        return self.out(hidden).float().unflatten(-1, self.codebooks.shape[:2])


def span_mask(n: int, start: float, span: int, rng: np.random.Generator) -> np.ndarray:
    """Which of n frames are masked, bool [n]: `span` frames from each one that begins one, cut at the end."""
    begins = rng.random(n) < start
    reach = np.convolve(begins, np.ones(span, dtype=np.int64))[:n]
    return reach > 0


def normalised(log_mel: Tensor, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each band of each clip with mean 0 and variance 1 over its real frames, and those means and deviations.

    [P, F, M], [P] → [P, F, M], [P, 1, M], [P, 1, M]. Without it the codes of a quiet band would never vary.
    """
    real = (torch.arange(log_mel.shape[1], device=log_mel.device) < frames[:, None])[..., None]
    n = frames.view(-1, 1, 1)
    mean = (log_mel * real).sum(1, keepdim=True) / n
    deviation = (((log_mel - mean) * real).square().sum(1, keepdim=True) / n).sqrt().clamp(min=1e-3)
    return (log_mel - mean) / deviation * real, mean, deviation


class BestRQTask(ClipTask[Example]):
    """Trains the encoder of an adapter; the rest of the adapter and the core take no part."""

    name = "best-rq"
    whole = False

    def __init__(
        self,
        adapter: SpeechAdapter,
        items: Sequence[Example],
        held_out: Sequence[Example],
        config: StageConfig,
        seed: int = 0,
    ) -> None:
        super().__init__(adapter, items, held_out, config, seed)
        adapter.requires_grad_(False)
        adapter.encoder.requires_grad_(True)
        self.stack = adapter.config.stack
        torch.manual_seed(seed)  # fixes the layer that guesses
        self.quantizer = RandomQuantizer(
            adapter.config.n_mels * self.stack, adapter.encoder.width, config, seed
        ).to(self.device)

    def modules(self) -> Mapping[str, nn.Module]:
        """Adapter and quantizer."""
        return {"adapter": self.adapter, "quantizer": self.quantizer}

    def weight(self, batch: Sequence[Clip[Example]]) -> float:
        """Masked frames of the encoder."""
        return float(sum(self._mask(clip).sum() for clip in batch))

    def part_loss(
        self, clips: Sequence[Clip[Example]], total: float, share: float
    ) -> tuple[Tensor, dict[str, float]]:
        """Mean cross-entropy over masked frames and codebooks, and how often the guess is right."""
        logits, codes = self.guesses(clips)
        if not len(codes):
            return sum((p.sum() for p in self.quantizer.parameters()), logits.sum()) * 0.0, {}
        losses = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="sum")
        right = (logits.argmax(-1) == codes).float().mean(-1).sum().item()
        return losses / codes.shape[1] / total, {"masked_accuracy": right / total}

    def guesses(self, clips: Sequence[Clip[Example]]) -> tuple[Tensor, Tensor]:
        """Logits [N, G, K] and codes [N, G] of the masked frames of some clips."""
        inputs = self.adapter.preprocess([Audio(self._cropped(clip), SAMPLE_RATE) for clip in clips])
        log_mel, frames = inputs.log_mel.to(self.device), inputs.frames.to(self.device)
        width = -(-log_mel.shape[1] // self.stack) * self.stack
        log_mel = F.pad(log_mel, (0, 0, 0, width - log_mel.shape[1]))
        clean, mean, deviation = normalised(log_mel, frames)
        masks = [self._feature_mask(clip, n) for clip, n in zip(clips, frames.tolist(), strict=True)]
        mask = torch.zeros(log_mel.shape[:2], dtype=torch.bool)
        for row, known in zip(mask, masks, strict=True):
            row[: len(known)] = torch.from_numpy(known)
        noise = self._noise(clips, log_mel) * deviation + mean
        hidden_from = torch.where(mask.to(self.device)[..., None], noise, log_mel)
        hidden = self.adapter.encoder.encode(hidden_from, frames).hidden
        guessed = self._stacked_mask(mask).to(self.device)
        stacked = clean.unflatten(1, (-1, self.stack)).flatten(2)
        # An encoder may give frames of padding beyond the longest clip.
        return self.quantizer(hidden[:, : guessed.shape[1]][guessed]), self.quantizer.codes(stacked[guessed])

    def _cropped(self, clip: Clip[Example]) -> np.ndarray:
        """At most `crop` frames with the edges that the adapter adds, at a random place."""
        edges = 2 * self.adapter.config.edge_ms * SAMPLE_RATE // 1000
        limit = min(self.config.crop * HOP, int(self.adapter.config.max_seconds * SAMPLE_RATE)) - edges
        limit = max(limit, HOP)
        surplus = len(clip.samples) - limit
        start = clip.number(2) % (surplus + 1) if surplus > 0 else 0
        return clip.samples[start : start + limit]

    def _feature_mask(self, clip: Clip[Example], n: int) -> np.ndarray:
        rng = np.random.default_rng(clip.number(3))
        return span_mask(n, self.config.mask_start, self.config.mask_span, rng)

    def _stacked_mask(self, mask: Tensor) -> Tensor:
        """Encoder frames all of whose features are masked: [P, F] → [P, S]."""
        return mask.unflatten(-1, (-1, self.stack)).all(-1)

    def _mask(self, clip: Clip[Example]) -> Tensor:
        n = n_frames(padded_length(len(self._cropped(clip)), self.adapter.config))
        mask = torch.from_numpy(self._feature_mask(clip, n))
        return self._stacked_mask(F.pad(mask, (0, -n % self.stack)))

    def _noise(self, clips: Sequence[Clip[Example]], log_mel: Tensor) -> Tensor:
        rows = []
        for clip in clips:
            generator = torch.Generator().manual_seed(clip.number(4))
            rows.append(torch.randn(log_mel.shape[1:], generator=generator))
        return _NOISE * torch.stack(rows).to(log_mel)

    def evaluate(self) -> dict[str, float]:
        """On held-out clips: loss, accuracy, and that of always saying each codebook's most frequent code.

        The control knows the codes of these very frames, which makes it the best guess without listening.
        `codes_used`: the perplexity of the codes as a part of all there are; near 0 the codebooks collapsed.
        """
        found = super().evaluate()
        if not found or not self.weight(self.held_out):
            return {}
        codes = torch.cat([self.guesses([clip])[1] for clip in self.held_out])
        counts = torch.stack([codes.bincount(minlength=self.config.codes) for codes in codes.T]).double()
        shares = counts / counts.sum(-1, keepdim=True)
        entropy = -(shares * shares.clamp(min=1e-12).log()).sum(-1)
        return {
            **found,
            "held_out_most_frequent": shares.amax(-1).mean().item(),
            "codes_used": entropy.exp().mean().item() / self.config.codes,
        }
