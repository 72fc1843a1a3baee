"""The stages' settings: the paper's numbers, and small ones that run on a laptop.

What the paper gives (arXiv 2407.21783, sections 4.1.4 and 7.4): for adapter pre-training, batch 16,384, peak
LR 10e-4, weight decay 0.01, cosine schedule, tiles of 336 pixels, about 6 billion pairs; for annealing, LR
2e-5 after a new warm-up, higher resolution, about 500 million pairs; for DPO, LR 1e-5, beta 0.1, NLL weight
0.2; for the encoder, 224 pixels and 2.5 billion pairs five times. Where it gives nothing, a comment says so.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from core_llm.errors import UserError
from core_llm.train.stages import StageSettings, settings_of

Stage = Literal["contrastive", "pretrain", "anneal", "sft", "dpo"]
STAGES: tuple[str, ...] = get_args(Stage)
PARTS = ("encoder", "projector", "token_rows", "cross_attention")  # of the adapter
CORE_LORA = "core-lora"  # low-rank updates beside the core's weights, which themselves never change


@dataclass(frozen=True)
class StageConfig(StageSettings):
    """How one stage trains."""

    image_size: int = 0  # pixels; 0: the adapter's own
    trained: tuple[str, ...] = PARTS
    gate_lr_scale: float = 1.0
    encoder_lr_scale: float = 1.0
    lora_rank: int = 8  # of the core's updates, where they are trained
    # contrastive
    text_dim: int = 1024
    text_layers: int = 24
    text_heads: int = 16
    text_length: int = 77  # tokens; longer captions are cut
    embedding: int = 1024  # width of the space that pictures and texts share
    # sft
    average_top: int = 0  # the result is the mean of so many checkpoints, the best on held-out examples
    # dpo
    beta: float = 0.1
    nll_weight: float = 0.2
    reference_every: int = 0  # steps between moves of the reference towards the policy; 0: it stays
    reference_decay: float = 0.99

    def __post_init__(self) -> None:
        unknown = [part for part in self.trained if part not in (*PARTS, CORE_LORA)]
        if unknown or not self.trained:
            what = f"unknown part '{unknown[0]}'" if unknown else "no part is trained"
            raise UserError(f"{what}; known: {', '.join((*PARTS, CORE_LORA))}")
        super().__post_init__()
        if self.image_size < 0:
            raise UserError("--image-size must not be negative")
        if self.average_top < 0:
            raise UserError("--average-top must not be negative")


PRESETS: dict[str, dict[str, StageConfig]] = {
    "paper": {
        # LR, weight decay and batch of the encoder are not given: those of open_clip's ViT-H/14 stand in.
        "contrastive": StageConfig(
            steps=2_500_000_000 * 5 // 32_768, batch=32_768, micro_batch=256, lr=5e-4, warmup=2000,
            weight_decay=0.2, image_size=224,
        ),
        "pretrain": StageConfig(
            steps=6_000_000_000 // 16_384, batch=16_384, micro_batch=64, lr=10e-4, warmup=2000, image_size=336
        ),
        "anneal": StageConfig(
            steps=500_000_000 // 16_384, batch=16_384, micro_batch=32, lr=2e-5, warmup=500, image_size=560
        ),
        # Sizes and LR of SFT are found by a sweep that the paper does not report.
        "sft": StageConfig(steps=20_000, batch=512, micro_batch=8, lr=1e-5, warmup=200, image_size=560),
        "dpo": StageConfig(
            steps=2000, batch=256, micro_batch=4, lr=1e-5, warmup=100, image_size=560, reference_every=100
        ),
    },
    "small": {
        "contrastive": StageConfig(
            steps=300, batch=64, micro_batch=0, lr=1e-3, warmup=20, text_dim=64, text_layers=2, text_heads=2,
            text_length=48, embedding=64,
        ),
        "pretrain": StageConfig(
            steps=300, batch=32, micro_batch=0, lr=1e-3, warmup=20, image_size=48, gate_lr_scale=30.0,
            encoder_lr_scale=0.3,
        ),
        "anneal": StageConfig(
            steps=100, batch=32, micro_batch=0, lr=2e-4, warmup=20, image_size=64, gate_lr_scale=10.0,
            encoder_lr_scale=0.3,
        ),
        "sft": StageConfig(steps=200, batch=32, micro_batch=0, lr=3e-4, warmup=20, gate_lr_scale=10.0),
        "dpo": StageConfig(steps=60, batch=16, micro_batch=0, lr=1e-4, warmup=10),
    },
}  # fmt: skip


def preset(name: str, stage: str) -> StageConfig:
    """Settings of a stage; raises `UserError` that lists what there is."""
    return settings_of(PRESETS, name, stage)
