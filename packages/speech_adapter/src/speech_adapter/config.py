"""Sizes of the speech encoder and its adapter."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from core_llm.errors import CheckpointError

ENCODERS = ("conformer", "whisper")
# Keys that adapters of the first version lack; every other key has to be in config.json.
_LATER = frozenset({"encoder", "n_mels", "codes"})


@dataclass(frozen=True)
class SpeechConfig:
    """Everything that decides the parameter shapes and the number of tokens per second.

    Defaults are the nano family's; PRESETS holds the paper's sizes (arXiv 2407.21783, section 8).
    """

    core_dim: int
    dim: int = 144  # width of the encoder's layers
    n_layers: int = 4
    n_heads: int = 3
    ffn_dim: int = 384  # each of the two Macaron feed-forwards
    kernel: int = 7  # depthwise convolution, in stacked frames
    stack: int = 4  # feature frames per encoder frame: 40 ms
    adapter_dim: int = 192
    adapter_heads: int = 6
    adapter_ffn_dim: int = 384
    output_scale: float = 1.0  # standard deviation of what the outputs stand among: embeddings or codes
    codes: int | None = None  # seed of one random vector per token, heard in place of its embedding
    rope_theta: float = 10_000.0
    dropout: float = 0.0  # while training only
    merge: bool = True  # vectors that say the same token, and drop those that say none (see `n_tokens`)
    range_decades: float = 5.0  # dynamic range of the features below the clip's loudest band
    edge_ms: int = 160  # silence added at both ends, so that the shortest word has room for its tokens
    max_seconds: float = 60.0  # longer clips are refused
    encoder: str = "conformer"  # or "whisper": openai-whisper's, of dim, n_layers, n_heads and n_mels
    n_mels: int = 80  # bands of the features; Whisper's large-v3 has 128

    def __post_init__(self) -> None:
        if self.encoder not in ENCODERS:
            raise ValueError(f"unknown encoder '{self.encoder}'; known: {', '.join(ENCODERS)}")
        if self.dim % self.n_heads or self.adapter_dim % self.adapter_heads:
            raise ValueError("dim must be a multiple of n_heads, adapter_dim of adapter_heads")
        if self.kernel % 2 == 0:
            raise ValueError("kernel must be odd, or the convolution shifts its input")
        if self.codes is not None and not self.merge:
            raise ValueError("codes need merge: a core reads embeddings, not codes")
        if self.encoder == "whisper" and (self.stack % 2 or 3000 % self.stack):
            raise ValueError("a Whisper encoder needs an even stack that divides its window of 3000 frames")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "config.json") -> SpeechConfig:
        """Inverse of `to_dict`; CheckpointError names a missing, unknown or impossible value.

        Keys that came later may be absent: their default is what older adapters were trained with.
        """
        known = {field.name for field in fields(cls)}
        unknown, missing = sorted(set(values) - known), sorted(known - _LATER - set(values))
        if unknown or missing:
            raise CheckpointError(f"{where}: unknown keys {unknown}, missing keys {missing}")
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{where}: {error}") from None


PRESETS: dict[str, dict[str, Any]] = {
    "nano": {},
    "llama-3": {
        "dim": 1536, "n_layers": 24, "n_heads": 24, "ffn_dim": 4096,
        "adapter_dim": 3072, "adapter_heads": 24, "adapter_ffn_dim": 4096, "merge": False,
    },
}  # fmt: skip
