"""Learning to answer about pictures through a frozen core: pre-training, annealing and SFT.

The three differ in data, resolution and learning rate, not in what is computed.
Axes: B conversations, N answer tokens, S patches, E encoder width.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from core_llm.adapters import Assistant
from core_llm.config import LlamaConfig
from core_llm.data.rows import spread
from core_llm.errors import UserError
from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer
from core_llm.train.accumulate import accumulated, split
from core_llm.train.answers import answer_log_probabilities, n_answer_tokens, picked
from vision_adapter.adapter import VisionAdapter
from vision_adapter.examples import Example
from vision_adapter.images import Picture
from vision_adapter.stages.presets import StageConfig
from vision_adapter.stages.trainable import trained_updates

if TYPE_CHECKING:
    from vision_adapter.adapter import ImageAdapter


def adapter_groups(adapter: nn.Module, config: StageConfig) -> list[dict[str, Any]]:
    """Parameters of the parts that a stage trains, gates and encoder at own rates; all else is frozen."""
    adapter.requires_grad_(False)
    groups: dict[str, list[nn.Parameter]] = {"gates": [], "encoder": [], "rest": []}
    for name, parameter in adapter.named_parameters():
        if name.split(".")[0] not in config.trained:
            continue
        parameter.requires_grad_(True)
        kind = "gates" if name.endswith("_gate") else "encoder" if name.startswith("encoder.") else "rest"
        groups[kind].append(parameter)
    return [
        {"params": groups["rest"]},
        {"params": groups["encoder"], "lr_scale": config.encoder_lr_scale},
        {"params": groups["gates"], "lr_scale": config.gate_lr_scale},
    ]


class AnswerTask:
    """Cross-entropy on what is said about a picture; the core never changes."""

    def __init__(
        self,
        name: str,
        core: Llama,
        tokenizer: Tokenizer,
        adapter: "ImageAdapter",
        examples: Sequence[Example],
        held_out: Sequence[Example],
        config: StageConfig,
        seed: int = 0,
    ) -> None:
        self.name, self.adapter, self.config, self.seed = name, adapter, config, seed
        self.assistant = Assistant(core.requires_grad_(False), tokenizer, [adapter])
        self.examples, self.held_out = examples, spread(held_out, 256)
        self.groups = adapter_groups(adapter, config)
        self.lora = trained_updates(name, adapter, core, config, seed)
        if self.lora is not None:
            self.groups.append({"params": list(self.lora.parameters())})

    def modules(self) -> Mapping[str, nn.Module]:
        """The adapter, and the core's low-rank updates where they learn."""
        return {"adapter": self.adapter} | ({} if self.lora is None else {"lora": self.lora})

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The parts that this stage trains."""
        return self.groups

    def parameters(self) -> list[nn.Parameter]:
        """All that receives gradients."""
        return [p for group in self.groups for p in group["params"]]

    def batch(self, step: int) -> list[Example]:
        """Examples of the step."""
        return picked(self.examples, step, self.config.batch, f"{self.seed} {self.name}")

    def loss(self, batch: Sequence[Example]) -> tuple[Tensor, dict[str, float]]:
        """Mean cross-entropy, nats per answer token of the whole batch, and the gates.

        Micro-batches are weighted by their tokens: the mean of their means would favour short answers.
        """
        micro_batches = [[e.conversation() for e in part] for part in split(batch, self.config.micro_batch)]
        total = sum(n_answer_tokens(self.assistant, part) for part in micro_batches)
        losses = (-answer_log_probabilities(self.assistant, part)[0].sum() / total for part in micro_batches)
        return accumulated(losses, self.parameters()), self.adapter.gates()

    def weight(self, batch: Sequence[Example]) -> float:
        """What the mean of the loss is over: the answers' tokens."""
        return float(n_answer_tokens(self.assistant, [example.conversation() for example in batch]))

    def evaluate(self) -> dict[str, float]:
        """Loss on held-out examples, and with each text beside the next other picture."""
        if len(self.held_out) < 2:
            return {}
        moved = [_with_next_pictures(self.held_out, i) for i in range(len(self.held_out))]
        return {
            "held_out_loss": self.loss(self.held_out)[0].item(),
            "held_out_loss_shuffled": self.loss(moved)[0].item(),
        }


def _with_next_pictures(examples: Sequence[Example], i: int) -> Example:
    """Example i with the pictures of the next one that shows another: texts of one lie side by side."""
    own = examples[i]
    for step in range(1, len(examples)):
        other = examples[(i + step) % len(examples)]
        if not _same(own.image, other.image):
            break
    pictures = tuple(itertools.islice(itertools.cycle(other.pictures), len(own.pictures)))
    return replace(own, image=pictures[0], others=pictures[1:])


def _same(one: Picture, other: Picture) -> bool:
    if isinstance(one, str | Path | bytes) and isinstance(other, str | Path | bytes):
        return one == other
    return one is other


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """Position embedding [S, E] of a square of patches → [side², E], bicubic and anti-aliased.

    The order of patches is row by row. Where the side stays, the same numbers come back.
    """
    old = round(positions.shape[0] ** 0.5)
    if old * old != positions.shape[0]:
        raise ValueError(f"{positions.shape[0]} positions are not a square")
    if old == side:
        return positions.clone()
    grid = positions.float().T.unflatten(1, (old, old))[None]
    resized = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False, antialias=True)
    return resized[0].flatten(1).T.to(positions.dtype).contiguous()


def at_resolution(adapter: "ImageAdapter", core: LlamaConfig, image_size: int) -> "ImageAdapter":
    """The same adapter for pictures of another size in pixels: all weights kept, positions resized.

    Raises `CheckpointError` for a size that the encoder's stride does not divide, `UserError` for an encoder
    whose positions are not a square of its own.
    """
    if not image_size:
        return adapter
    if not isinstance(adapter, VisionAdapter):
        raise UserError("this encoder works at its own resolution alone: leave --image-size out")
    if image_size == adapter.config.image_size:
        return adapter
    config = replace(adapter.config, image_size=image_size)
    resized = VisionAdapter(config, core)
    state = dict(adapter.state_dict())
    if "encoder.positions" not in state:
        raise UserError("this encoder works at its own resolution alone: leave --image-size out")
    side = round(config.n_patches**0.5)
    state["encoder.positions"] = resize_positions(state["encoder.positions"], side)
    resized.load_state_dict(state)
    resized.hold(adapter.lora)
    weight = adapter.projector.weight
    return resized.to(weight.device, weight.dtype)
