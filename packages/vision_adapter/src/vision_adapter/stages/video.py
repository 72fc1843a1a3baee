"""Video training: which way does a shape move? Only the video layers learn.

Axes: V clips, F frames, S patches, E encoder width.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core_llm.adapters import Assistant, Spans
from core_llm.chat import Message, Text, Video
from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer
from core_llm.train.fit import FitConfig, fit
from vision_adapter.adapter import ImageMemory
from vision_adapter.images import tile
from vision_adapter.video_adapter import VideoAdapter
from vision_adapter.video_clips import DIRECTIONS, QUESTION, moving_shape


@dataclass(frozen=True)
class VideoRecipe:
    """What `vision-adapter train-video` does by default; tuned for the nano core on one CPU core."""

    warm_up_steps: int = 200  # of the resampler alone
    warm_up_lr: float = 2e-3
    steps: int = 150
    clips: int = 32  # per step of the resampler, and half as many of all
    pool: int = 768  # distinct training clips
    held_out: int = 128
    lr: float = 1e-3
    gate_lr_scale: float = 30.0  # at the base rate the gates, zero at first, hold everything back


class _Encoded:
    """The video adapter on frame features that are at hand: a frozen encoder need not run twice on a clip."""

    part: type = Video

    def __init__(self, adapter: VideoAdapter) -> None:
        self.adapter = adapter

    def preprocess(self, parts: Sequence[Video]) -> Tensor:
        return torch.stack([part.data for part in parts])  # type: ignore[misc]

    def encode(self, inputs: Tensor) -> ImageMemory:
        return self.adapter.remember(inputs)

    def place(self, memory: ImageMemory) -> list[Tensor]:
        return self.adapter.place(memory)

    def interleave(self, memory: ImageMemory, spans: Spans) -> Mapping[int, Callable[[Tensor], Tensor]]:
        return self.adapter.interleave(memory, spans)


class ResamplerTask:
    """Warm-up: name the direction from the merged frames alone, without the core, which is slow to run."""

    name = "resampler"

    def __init__(self, task: "VideoTask") -> None:
        self.task, self.resampler = task, task.adapter.resampler
        self.head = nn.Linear(task.core.config.dim, len(DIRECTIONS)).to(task.adapter.token_rows.device)

    def modules(self) -> Mapping[str, nn.Module]:
        """The resampler and the head that is thrown away afterwards."""
        return {"resampler": self.resampler, "head": self.head}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All at one rate."""
        return [{"params": [*self.resampler.parameters(), *self.head.parameters()]}]

    def batch(self, step: int) -> list[tuple[Tensor, str]]:
        """Clips of the step."""
        return self.task.sample(self.name, step, self.task.recipe.clips)

    def loss(self, batch: list[tuple[Tensor, str]]) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy in nats per clip, and accuracy."""
        memory = self.resampler(torch.stack([features for features, _ in batch]))
        logits = self.head(memory.mean(dim=1)).float()
        targets = torch.tensor([DIRECTIONS.index(way) for _, way in batch], device=logits.device)
        right = (logits.argmax(-1) == targets).float().mean().item()
        return F.cross_entropy(logits, targets), {"right": right}

    def evaluate(self) -> dict[str, float]:
        """Accuracy on held-out clips."""
        return {"right": self.loss(self.task.held_out)[1]["right"]}


class VideoTask:
    """Clips of `video_clips` with their one question, through a frozen core and a frozen image encoder."""

    name = "video"

    def __init__(
        self, core: Llama, tokenizer: Tokenizer, adapter: VideoAdapter, seed: int, recipe: VideoRecipe
    ) -> None:
        self.core, self.adapter = core.requires_grad_(False), adapter
        self.assistant = Assistant(core, tokenizer, [_Encoded(adapter)])
        self.seed, self.recipe = seed, recipe
        self.train_clips = self._clips("train", recipe.pool)
        self.held_out = self._clips("held out", recipe.held_out)

    def _clips(self, name: str, n: int) -> list[tuple[Tensor, str]]:
        """Features [F, S, E] and direction of n clips."""
        rng = random.Random(f"{self.seed} {name}")
        size, clips = self.adapter.vision.config.image_size, []
        for _ in range(n):
            clip = moving_shape(rng, self.adapter.config.frames, size)
            tiles = torch.stack([tile(frame, size) for frame in clip.frames])
            clips.append((self.adapter.features(tiles[None])[0], clip.direction))
        return clips

    def modules(self) -> Mapping[str, nn.Module]:
        """The video layers alone."""
        return {"video": self.adapter}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Gates much faster than the rest."""
        named = list(self.adapter.named_parameters())
        return [
            {"params": [p for name, p in named if not name.endswith("_gate")]},
            {
                "params": [p for name, p in named if name.endswith("_gate")],
                "lr_scale": self.recipe.gate_lr_scale,
            },
        ]

    def sample(self, name: str, step: int, n: int) -> list[tuple[Tensor, str]]:
        """n training clips, by the step alone."""
        rng = random.Random(f"{self.seed} {name} {step}")
        return [rng.choice(self.train_clips) for _ in range(n)]

    def batch(self, step: int) -> list[tuple[Tensor, str]]:
        """Clips of the step."""
        return self.sample(self.name, step, max(1, self.recipe.clips // 2))

    def loss(self, batch: list[tuple[Tensor, str]]) -> tuple[Tensor, dict[str, float]]:
        """Mean cross-entropy, nats per answer token."""
        asked = [[*self._asked(features), Message("assistant", way)] for features, way in batch]
        return self.assistant.loss(asked), {}

    def weight(self, batch: list[tuple[Tensor, str]]) -> float:
        """What the mean of the loss is over: the answers' tokens, each answer closed by one more."""
        return float(sum(len(self.assistant.tokenizer.encode(way)) + 1 for _, way in batch))

    @staticmethod
    def _asked(features: Tensor) -> list[Message]:
        return [Message("user", [Video(features), Text(QUESTION)])]  # type: ignore[arg-type]

    def accuracy(self, reorder: Callable[[int], list[int]]) -> float:
        """Share of held-out clips whose own direction is the likelier answer, frames in the given order."""
        right = 0
        for start in range(0, len(self.held_out), 32):
            part = self.held_out[start : start + 32]
            asked = [self._asked(x[reorder(start + i)]) for i, (x, _) in enumerate(part)]
            scores = torch.tensor(
                [self.assistant.loglikelihood(asked, [way] * len(part)) for way in DIRECTIONS]
            )
            chosen = scores.argmax(0).tolist()
            right += sum(DIRECTIONS[c] == way for c, (_, way) in zip(chosen, part, strict=True))
        return right / len(self.held_out)

    def evaluate(self) -> dict[str, float]:
        """Accuracy on held-out clips as they are, with shuffled frames, and played backwards.

        Backwards every clip moves the other way: what reads the order is then always wrong.
        """
        n = self.adapter.config.frames

        def shuffled(clip: int) -> list[int]:
            return random.Random(f"{self.seed} shuffled {clip}").sample(range(n), n)

        return {
            "direction": self.accuracy(lambda clip: list(range(n))),
            "direction_shuffled": self.accuracy(shuffled),
            "direction_backwards": self.accuracy(lambda clip: list(range(n))[::-1]),
        }


def train_video(
    core: Llama,
    tokenizer: Tokenizer,
    adapter: VideoAdapter,
    out: Path,
    seed: int = 0,
    recipe: VideoRecipe | None = None,
) -> dict[str, float]:
    """Train the video layers; returns the held-out figures. The same call continues an interrupted run."""
    recipe = recipe or VideoRecipe()
    adapter.requires_grad_(True)
    task = VideoTask(core, tokenizer, adapter, seed, recipe)
    if recipe.warm_up_steps:
        torch.manual_seed(seed)  # fixes the head
        warm_up = FitConfig(out, recipe.warm_up_steps, lr=recipe.warm_up_lr, warmup=20, seed=seed)
        fit(ResamplerTask(task), warm_up)
    return fit(task, FitConfig(out, recipe.steps, lr=recipe.lr, warmup=20, seed=seed, save_every=100))
