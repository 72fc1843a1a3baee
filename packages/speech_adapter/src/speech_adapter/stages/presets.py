"""The stages' settings: the paper's numbers, and small ones that run on a laptop.

What the paper gives (arXiv 2407.21783, section 8.2): for self-supervision, masks of 32 frames with a start
probability of 2.5 %, a projection of 4 stacked frames to 16 dimensions, 16 codebooks of 8,192 vectors, cosine
distance, 500 K steps of 2,048 utterances, cut to 6 K frames; for the supervised stage of the 8B core, 650 K
steps of 512 utterances, learning rate 1e-4. Where it gives nothing, a comment says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from core_llm.errors import UserError
from core_llm.train.stages import StageSettings, settings_of
from speech_adapter.augment import Perturbation, perturbation

Stage = Literal["best-rq", "ctc", "sft"]
STAGES: tuple[str, ...] = get_args(Stage)
UNITS = ("characters", "tokens")


@dataclass(frozen=True)
class StageConfig(StageSettings):
    """How one stage trains."""

    size: str = "nano"  # of a new adapter, one of config.PRESETS
    perturbation: Perturbation = Perturbation()
    # best-rq
    codebooks: int = 16
    codes: int = 8192  # vectors per codebook
    code_dim: int = 16
    mask_start: float = 0.025  # probability that a span begins at a frame of 10 ms
    mask_span: int = 32  # frames of 10 ms
    crop: int = 6000  # frames of 10 ms
    # ctc
    units: str = "characters"  # of the encoder alone; or the core's "tokens", which the adapter learns too
    # sft
    kl_weight: float = 0.0  # part of the loss that is the distance from the core's reading of the text
    temperature: float = 2.0  # of that distance (Ultravox)
    ctc_weight: float = 0.0  # of CTC against the core's tokens, beside the answers

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.codebooks, self.codes, self.code_dim, self.mask_span, self.crop) < 1:
            raise UserError("codebooks, codes, code_dim, mask_span and crop must be positive")
        if self.units not in UNITS:
            raise UserError(f"unknown units '{self.units}'; known: {', '.join(UNITS)}")
        if not 0 <= self.kl_weight <= 1 or self.temperature <= 0 or self.ctc_weight < 0:
            raise UserError(
                "kl_weight must be between 0 and 1, temperature positive, ctc_weight not negative"
            )


PRESETS: dict[str, dict[str, StageConfig]] = {
    "paper": {
        # Learning rate and warm-up are not given.
        "best-rq": StageConfig(
            steps=500_000, batch=2048, micro_batch=32, lr=4e-4, warmup=25_000, size="llama-3"
        ),
        # The paper has no such stage.
        "ctc": StageConfig(
            steps=50_000, batch=512, micro_batch=16, lr=4e-4, warmup=5000, size="llama-3",
            perturbation=perturbation(("spec", "speed")),
        ),
        # Warm-up and augmentation are not given. 70B: 600 K steps, batch 768, learning rate 4e-5.
        "sft": StageConfig(
            steps=650_000, batch=512, micro_batch=8, lr=1e-4, warmup=2000, size="llama-3",
            perturbation=perturbation(("spec",)),
        ),
    },
    "nano": {
        "best-rq": StageConfig(
            steps=300, batch=16, micro_batch=0, lr=1e-3, warmup=20, codebooks=4, codes=64
        ),
        "ctc": StageConfig(steps=300, batch=24, micro_batch=0, lr=2e-3, warmup=20),
        # The nano adapter merges vectors by what CTC says of them: without CTC it would merge by chance.
        "sft": StageConfig(steps=300, batch=24, micro_batch=0, lr=1e-3, warmup=20, ctc_weight=0.5),
    },
}  # fmt: skip


def preset(name: str, stage: str) -> StageConfig:
    """Settings of a stage; raises `UserError` that lists what there is."""
    return settings_of(PRESETS, name, stage)
