"""What the stages do alike: draw clips, disturb them, and sum the losses of micro-batches.

Axes: P clips, F feature frames (10 ms), M bands.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from core_llm.chat import Audio
from core_llm.data.rows import spread
from core_llm.errors import DataError, MediaError
from core_llm.train.accumulate import accumulated, split
from core_llm.train.answers import picked
from speech_adapter.adapter import SpeechAdapter, SpeechInputs
from speech_adapter.audio import SAMPLE_RATE, decode
from speech_adapter.augment import Perturbation
from speech_adapter.examples import Asked, Example

Item = TypeVar("Item", Example, Asked)
# Of the recordings of a run, so many (and one in any case) may be unreadable before it stops.
_BAD_SHARE = 0.01

log = logging.getLogger(__name__)


class Clip(Generic[Item]):
    """One example of one step, decoded and disturbed when it is first looked at: a function of its seed."""

    def __init__(
        self,
        item: Item,
        seed: Sequence[int],
        perturbation: Perturbation,
        max_seconds: float | None = None,
    ) -> None:
        """`max_seconds`: what the adapter takes; None where a longer clip is cropped."""
        self.item: Item = item
        self.seed, self.perturbation, self.max_seconds = tuple(seed), perturbation, max_seconds

    @property
    def example(self) -> Example:
        """The recording."""
        return self.item.example if isinstance(self.item, Asked) else self.item

    @cached_property
    def samples(self) -> np.ndarray:
        """float32 mono at 16 kHz [N]; raises `MediaError` that names a bad or too long file."""
        rng = np.random.default_rng((*self.seed, 0))
        samples = decode(self.example.audio, self.example.rate, self.max_seconds)
        return self.perturbation.waveform(samples, rng, self.max_seconds)

    @property
    def audio(self) -> Audio:
        """The samples as a part of a message."""
        return Audio(self.samples, SAMPLE_RATE)

    def number(self, purpose: int) -> int:
        """A seed of 63 bits for something else that is random about this clip."""
        return int(np.random.default_rng((*self.seed, purpose)).integers(2**63))


def id_of(item: Example | Asked) -> str:
    """Of the recording."""
    return (item.example if isinstance(item, Asked) else item).id


class ClipTask(ABC, Generic[Item]):
    """A stage, a `core_llm.train.fit.Task`; sub-classes say what is trained and what the loss is."""

    name: str
    whole = True  # a clip longer than the adapter's limit is an error: its text says all of it

    def __init__(
        self,
        adapter: SpeechAdapter,
        items: Sequence[Item],
        held_out: Sequence[Item],
        config: Any,
        seed: int = 0,
    ) -> None:
        self.adapter, self.config, self.seed = adapter, config, seed
        self.items: Sequence[Item] = items
        self.max_seconds = adapter.config.max_seconds if self.whole else None
        self.held_out: list[Clip[Item]] = [
            Clip(item, (0, 0, i), Perturbation(), self.max_seconds)
            for i, item in enumerate(spread(held_out, 256))
        ]
        self._unreadable: set[str] = set()

    def modules(self) -> Mapping[str, nn.Module]:
        """What a resume restores."""
        return {"adapter": self.adapter}

    def parameters(self) -> list[nn.Parameter]:
        """All that receives gradients."""
        modules = self.modules().values()
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All at one rate."""
        return [{"params": self.parameters()}]

    def batch(self, step: int) -> list[Clip[Item]]:
        """Clips of the step; every epoch has each example once."""
        items = picked(self.items, step, self.config.batch, f"{self.seed} {self.name}")
        kind = self.config.perturbation
        return [Clip(item, (self.seed, step, i), kind, self.max_seconds) for i, item in enumerate(items)]

    def features(self, clips: Sequence[Clip[Item]]) -> SpeechInputs:
        """Features of clips under SpecAugment, where the stage has it."""
        return self.masked(self.adapter.preprocess([clip.audio for clip in clips]), clips)

    def masked(self, inputs: SpeechInputs, clips: Sequence[Clip[Item]]) -> SpeechInputs:
        """SpecAugment of features that are computed already; held-out clips have none."""
        seeds = [clip.number(1) for clip in clips]
        log_mel = clips[0].perturbation.features(inputs.log_mel, inputs.frames, seeds)
        return SpeechInputs(log_mel, inputs.frames)

    def weight(self, batch: Sequence[Clip[Item]]) -> float:
        """What the mean of the loss is over: clips, unless a stage says otherwise."""
        return float(len(batch))

    @abstractmethod
    def part_loss(
        self, clips: Sequence[Clip[Item]], total: float, share: float
    ) -> tuple[Tensor, dict[str, float]]:
        """What a micro-batch adds to the loss of a batch whose `weight` is `total`, and to its figures.

        share: its part of the clips of the batch.
        """

    def loss(self, batch: Sequence[Clip[Item]]) -> tuple[Tensor, dict[str, float]]:
        """The loss of the whole batch, whatever the micro-batches; the shortest clips come first.

        Clips that cannot be read are left out; raises `DataError` where there are too many of them.
        """
        batch = [clip for clip in batch if self._readable(clip)]
        if not batch:
            raise DataError("no recording of this batch can be read; see the warnings above")
        total = max(self.weight(batch), 1.0)
        figures: Counter[str] = Counter()
        ordered = sorted(batch, key=lambda clip: len(clip.samples))

        def losses() -> Iterator[Tensor]:
            for part in split(ordered, self.config.micro_batch or self.config.batch):
                value, found = self.part_loss(part, total, len(part) / len(ordered))
                figures.update(found)
                yield value

        return accumulated(losses(), self.parameters()), dict(figures)

    def _readable(self, clip: Clip[Item]) -> bool:
        """Whether a clip has samples; each bad recording is told once, with how many there are by now."""
        try:
            return len(clip.samples) > 0
        except MediaError as error:
            known, total = self._unreadable, len({id_of(item) for item in self.items})
            if clip.example.id not in known:
                known.add(clip.example.id)
                log.warning("left out (%d of %d recordings): %s", len(known), total, error)
            if len(known) > max(1, int(_BAD_SHARE * total)):
                raise DataError(
                    f"{len(known)} of {total} recordings cannot be read, {error} the last of them; "
                    "repair them or take them out of the data, then run the same command again"
                ) from error
            return False

    def evaluate(self) -> dict[str, float]:
        """Held-out figures; {} where nothing is held out. What cannot be read is left out of all of them."""
        self.held_out = [clip for clip in self.held_out if self._readable(clip)]
        if not self.held_out:
            return {}
        loss, figures = self.loss(self.held_out)
        return {"held_out_loss": loss.item(), **{f"held_out_{key}": v for key, v in figures.items()}}

    @property
    def device(self) -> torch.device:
        """Where the adapter is."""
        return self.adapter.projector.out.weight.device
