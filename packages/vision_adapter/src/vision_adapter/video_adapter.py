"""Motion for a core that can see: frames through a frozen image encoder, merged in time, read by own layers.

Axes: V videos, F frames, k frames that become one, S patches of a frame, L latents, E encoder width,
R resampler width, C core width, B batch, T text positions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core_llm.adapters import Spans
from core_llm.chat import Video
from core_llm.checkpoint import core_hash, load_adapter, load_strict, save_adapter
from core_llm.config import LlamaConfig
from core_llm.errors import CheckpointError, MediaError
from core_llm.kernels import Mask, attend
from core_llm.model import Llama
from vision_adapter.adapter import ImageMemory, VisionAdapter, bound
from vision_adapter.cross_attention import CrossAttentionBlock
from vision_adapter.images import tile
from vision_adapter.video import frames

KIND = "video"


@dataclass(frozen=True)
class VideoConfig:
    """Shape of the video layers; the paper merges 16 frames into one at pre-training, 64 into two at SFT.

    Raises `CheckpointError` where the frames do not divide evenly.
    """

    frames: int = 4  # per video
    merged: int = 4  # consecutive frames that become one: k
    latents: int = 8  # memory positions of a merged frame: L
    dim: int = 128
    heads: int = 4
    depth: int = 2
    token_rows: int = 4  # learnable rows that stand in the token stream for a video
    cross_layers: tuple[int, ...] = ()  # core blocks with a video layer; by default `video_schedule`
    cross_ffn_dim: int = 256
    vision_hash: str = ""  # of the image adapter that it was trained with

    def __post_init__(self) -> None:
        if self.frames < 1 or self.merged < 1 or self.frames % self.merged:
            raise CheckpointError(f"{self.frames} frames cannot be merged {self.merged} by {self.merged}")
        if self.heads < 1 or self.dim % self.heads:
            raise CheckpointError(f"dim {self.dim} is not divisible by heads {self.heads}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "VideoConfig":
        """The inverse of `asdict`; an unknown key raises `CheckpointError` that names it."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise CheckpointError(f"unknown video configuration keys: {', '.join(unknown)}")
        lists: Mapping[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**lists)


def video_schedule(cross_layers: Sequence[int]) -> tuple[int, ...]:
    """Core blocks with a video layer: those of every fourth image layer (arXiv 2407.21783, section 7.3).

    With fewer than four image layers, those of them all.
    """
    return tuple(cross_layers[3::4]) or tuple(cross_layers)


class ResamplerBlock(nn.Module):
    """Latents read features and one another, then a feed-forward; pre-norm."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.latent_norm = nn.LayerNorm(dim)
        self.feature_norm = nn.LayerNorm(dim)
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.kv_proj = nn.Linear(dim, 2 * dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        """[N, L, R] and [N, k·S, R] → [N, L, R]."""
        own = self.latent_norm(latents)
        read = torch.cat([self.feature_norm(features), own], dim=1)
        keys, values = self.kv_proj(read).chunk(2, dim=-1)
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.q_proj(own), keys, values)
        )
        latents = latents + self.o_proj(attend(q, k, v, Mask.full()).transpose(1, 2).flatten(2))
        return latents + self.ffn(self.ffn_norm(latents))


class TemporalResampler(nn.Module):
    """k frames → one of L positions: a perceiver resampler (arXiv 2204.14198) over time and space.

    A frame's features are scaled and shifted by learned vectors of its place in time, a merged frame's are
    shifted: without them the order of frames would be lost. The scale makes what changes between frames a
    linear function of what the latents read; with a shift alone they would have to single out every frame
    by attention first, which training does not find in a few hundred steps.
    """

    def __init__(self, config: VideoConfig, encoder_dim: int, core_dim: int) -> None:
        super().__init__()
        self.merged = config.merged
        self.project = nn.Linear(encoder_dim, config.dim)
        self.time_scale = nn.Parameter(torch.randn(config.merged, config.dim))
        self.time_shift = nn.Parameter(torch.randn(config.merged, config.dim))
        self.latents = nn.Parameter(torch.randn(config.latents, config.dim))
        self.blocks = nn.ModuleList(ResamplerBlock(config.dim, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim)
        self.out = nn.Linear(config.dim, core_dim)
        self.merged_time = nn.Parameter(torch.randn(config.frames // config.merged, core_dim) * 0.02)

    def forward(self, features: Tensor) -> Tensor:
        """Frame features [V, F, S, E] → memory [V, F/k·L, C]."""
        videos = len(features)
        x = self.project(features).unflatten(1, (-1, self.merged))  # [V, F/k, k, S, R]
        x = (x * self.time_scale[:, None] + self.time_shift[:, None]).flatten(0, 1).flatten(1, 2)
        latents = self.latents.expand(len(x), -1, -1)
        for block in self.blocks:
            latents = block(latents, x)
        memory = self.out(self.norm(latents)).unflatten(0, (videos, -1))
        return (memory + self.merged_time[:, None]).flatten(1, 2)


class VideoAdapter(nn.Module):
    """The Adapter for `Video` parts, on top of an image adapter whose encoder it uses and never changes.

    In an `Assistant` it comes before the image adapter: where both have a layer before a block, the video's
    runs first. Its parameters are the resampler, token rows and video layers; nothing of the image adapter.
    """

    part: type = Video

    def __init__(self, config: VideoConfig, core: LlamaConfig, vision: VisionAdapter) -> None:
        super().__init__()
        if not config.cross_layers:
            config = replace(config, cross_layers=video_schedule(vision.config.cross_layers))
        self.config = config
        self._vision = (vision.requires_grad_(False),)  # a plain container: its weights are not ours
        self.resampler = TemporalResampler(config, vision.config.encoder_dim, core.dim)
        self.token_rows = nn.Parameter(torch.randn(config.token_rows, core.dim) * core.dim**-0.5)
        self.cross_attention = nn.ModuleDict(
            {str(layer): CrossAttentionBlock(core, config.cross_ffn_dim) for layer in config.cross_layers}
        )

    @property
    def vision(self) -> VisionAdapter:
        """The image adapter, frozen."""
        return self._vision[0]

    def preprocess(self, parts: Sequence[Video]) -> Tensor:
        """Videos → fp32 tiles [V, F, 3, size, size]. Raises `MediaError` that names the unreadable one."""
        size = self.vision.config.image_size
        clips = [frames(part.data, self.config.frames) for part in parts]
        return torch.stack([torch.stack([tile(frame, size) for frame in clip]) for clip in clips])

    @torch.no_grad()
    def features(self, inputs: Tensor) -> Tensor:
        """Tiles [V, F, 3, size, size] → features of every frame [V, F, S, E], one video at a time."""
        weight = self.token_rows
        training = self.vision.training
        self.vision.eval()
        found = torch.stack([self.vision.encoder(video.to(weight.device, weight.dtype)) for video in inputs])
        self.vision.train(training)
        return found

    def remember(self, features: Tensor) -> ImageMemory:
        """Frame features [V, F, S, E] → keys and values of every video layer."""
        memory = self.resampler(features).to(self.token_rows.dtype)
        pairs = {int(layer): block.keys_values(memory) for layer, block in self._blocks()}  # type: ignore[operator]
        return ImageMemory(
            {layer: keys for layer, (keys, _) in pairs.items()},
            {layer: values for layer, (_, values) in pairs.items()},
            len(features),
        )

    def encode(self, inputs: Tensor) -> ImageMemory:
        """Tiles [V, F, 3, size, size] → keys and values of every video layer, once per request."""
        return self.remember(self.features(inputs))

    def place(self, memory: ImageMemory) -> list[Tensor]:
        """Per video, the learnable rows [token_rows, C] that stand in the text in its place."""
        return [self.token_rows] * memory.count

    def interleave(self, memory: ImageMemory, spans: Spans) -> Mapping[int, Callable[[Tensor], Tensor]]:
        """The video layers, bound to the videos that each text position sees.

        Raises `MediaError` where the text has not one placeholder for each video.
        """
        if len(spans.rows) != memory.count:
            raise MediaError(f"the text has {len(spans.rows)} video placeholders, {memory.count} were given")
        positions = self.config.frames // self.config.merged * self.config.latents
        return bound(dict(self._blocks()), memory, spans, positions)

    def _blocks(self) -> list[tuple[str, nn.Module]]:
        return list(self.cross_attention.items())

    def save(self, directory: Path, core: Llama, card: str | None = None) -> None:
        """Write the video layers, with the hashes of the core and image adapter that they belong to."""
        config = replace(self.config, vision_hash=core_hash(self.vision))
        save_adapter(directory, KIND, asdict(config), dict(self.state_dict()), core, card)


def load_video(where: str | Path, core: Llama, vision: VisionAdapter) -> VideoAdapter:
    """The video adapter in a folder, frozen, in the core's dtype and on its device.

    Raises `CheckpointError` where files are missing, or it belongs to another core or image adapter.
    """
    directory = Path(where)
    values, tensors = load_adapter(directory, KIND, core)
    config = VideoConfig.from_dict(values)
    if config.vision_hash != core_hash(vision):
        raise CheckpointError(f"{directory}: was trained with another image adapter; give that one")
    adapter = VideoAdapter(config, core.config, vision)
    load_strict(adapter, tensors, directory)
    weight = core.embed_tokens.weight
    return adapter.to(weight.device, weight.dtype).eval().requires_grad_(False)
