"""What the settings of every training stage share, whatever sense is trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from core_llm.errors import UserError
from core_llm.train.fit import FitConfig


@dataclass(frozen=True)
class StageSettings:
    """How one stage trains; the schedule is `fit`'s: linear warm-up, then cosine."""

    steps: int
    batch: int  # examples per step
    micro_batch: int  # examples per backward pass, 0: all; gradients are summed in fp32
    lr: float
    warmup: int
    weight_decay: float = 0.01
    final_lr_fraction: float = 0.0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch) < 1 or self.micro_batch < 0 or self.lr <= 0:
            raise UserError("steps, batch and lr must be positive, and micro_batch not negative")

    def fit_config(self, out: Path, seed: int) -> FitConfig:
        """For `fit`, with five saved states in a short run and one every 500 steps in a long one."""
        return FitConfig(
            out,
            self.steps,
            lr=self.lr,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            final_lr_fraction=self.final_lr_fraction,
            seed=seed,
            save_every=min(500, max(1, self.steps // 5)),
        )


Settings = TypeVar("Settings", bound=StageSettings)


def settings_of(presets: Mapping[str, Mapping[str, Settings]], name: str, stage: str) -> Settings:
    """Settings of a stage in a preset; raises `UserError` that lists what there is."""
    if name not in presets:
        raise UserError(f"unknown preset '{name}'; known: {', '.join(presets)}")
    if stage not in presets[name]:
        raise UserError(f"unknown stage '{stage}'; known: {', '.join(presets[name])}")
    return presets[name][stage]
