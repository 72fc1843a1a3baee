"""Shape of the vision adapter; what depends on the core is taken from the core's own config."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from core_llm.errors import CheckpointError


@dataclass(frozen=True)
class VisionConfig:
    """Everything that fixes the shape of encoder and cross-attention, apart from the core's own sizes.

    Raises `CheckpointError` where heads or stem do not divide evenly.
    """

    image_size: int = 64  # pixels; one square tile
    stem_channels: tuple[int, int] = (24, 48)  # of the first two stem convolutions; the third has encoder_dim
    encoder_dim: int = 128
    encoder_layers: int = 3
    encoder_heads: int = 4
    encoder_ffn_dim: int = 384
    token_rows: int = 12  # learnable rows that stand in the token stream in place of one <|image|>
    cross_layers: tuple[int, ...] = ()  # a cross-attention block runs before each of these core blocks
    cross_ffn_dim: int = 256

    def __post_init__(self) -> None:
        if self.encoder_dim % self.encoder_heads:
            raise CheckpointError(
                f"encoder_dim {self.encoder_dim} is not divisible by encoder_heads {self.encoder_heads}"
            )
        if self.image_size % 8:
            raise CheckpointError(f"image_size {self.image_size} is not a multiple of the stem's stride 8")
        if self.token_rows < 1:
            raise CheckpointError("an image needs at least one token row")

    @property
    def n_patches(self) -> int:
        """Memory positions per image."""
        return (self.image_size // 8) ** 2

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "VisionConfig":
        """The inverse of `to_dict`; an unknown key raises `CheckpointError` that names it."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise CheckpointError(f"unknown vision configuration keys: {', '.join(unknown)}")
        lists: Mapping[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**lists)


def cross_attention_schedule(n_layers: int) -> tuple[int, ...]:
    """Core blocks that get a cross-attention block before them.

    Every fourth of a deep core, 3, 7, ..., as in Llama 3.2-Vision (arXiv 2407.21783, section 7.3); every
    second of a core of fewer than 16 blocks and every one of fewer than 8, so that a small one is reached
    more than once.
    """
    stride = 4 if n_layers >= 16 else 2 if n_layers >= 8 else 1
    return tuple(range(min(stride, n_layers) - 1, n_layers, stride))
