"""Shapes of the Llama family. Source: arXiv 2407.21783, table 3, and the released params.json files."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from core_llm.errors import CheckpointError


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1 frequency scaling: long wavelengths are stretched by `factor`, short ones kept."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """Everything that fixes the shape of a Llama.

    Raises `CheckpointError` where heads do not divide evenly or have an odd width, which cannot rotate.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    vocab_size: int = 128_256
    max_positions: int = 131_072
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.dim % self.n_heads:
            raise CheckpointError(f"dim {self.dim} is not divisible by n_heads {self.n_heads}")
        if self.n_heads % self.n_kv_heads:
            raise CheckpointError(f"n_heads {self.n_heads} is not divisible by n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim {self.head_dim} is odd: rotary channels come in pairs")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.n_heads

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LlamaConfig":
        """The inverse of `to_dict`; an unknown key raises `CheckpointError` that names it."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise CheckpointError(f"unknown configuration keys: {', '.join(unknown)}")
        scaling = values.get("rope_scaling")
        if isinstance(scaling, Mapping):
            values = {**values, "rope_scaling": RopeScaling(**scaling)}
        return cls(**values)


_SCALED_8 = RopeScaling(factor=8.0)
_SCALED_32 = RopeScaling(factor=32.0)

PRESETS: dict[str, LlamaConfig] = {
    "nano": LlamaConfig(192, 6, 6, 2, 512, vocab_size=4096, max_positions=1024, tied_embeddings=True),
    "llama-3-8b": LlamaConfig(4096, 32, 32, 8, 14_336, max_positions=8192),
    "llama-3.1-8b": LlamaConfig(4096, 32, 32, 8, 14_336, rope_scaling=_SCALED_8),
    "llama-3.1-70b": LlamaConfig(8192, 80, 64, 8, 28_672, rope_scaling=_SCALED_8),
    "llama-3.1-405b": LlamaConfig(16_384, 126, 128, 8, 53_248, rope_scaling=_SCALED_8),
    "llama-3.2-1b": LlamaConfig(2048, 16, 32, 8, 8192, rope_scaling=_SCALED_32, tied_embeddings=True),
    "llama-3.2-3b": LlamaConfig(3072, 28, 24, 8, 8192, rope_scaling=_SCALED_32, tied_embeddings=True),
}


def preset(name: str) -> LlamaConfig:
    """The preset of that name; an unknown one raises `CheckpointError` that lists them all."""
    if name not in PRESETS:
        raise CheckpointError(f"unknown preset '{name}'; known: {', '.join(PRESETS)}")
    return PRESETS[name]
