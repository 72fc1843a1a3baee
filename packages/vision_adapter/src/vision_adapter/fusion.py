"""Eyes for a frozen core from any encoder: encoder, projector, one token row per picture, cross-attention.

Axes: P pictures, S memory positions of all pictures, E encoder width, C core width, G key/value heads,
D head dim.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from core_llm.chat import Image
from core_llm.checkpoint import load_adapter, load_strict
from core_llm.config import LlamaConfig
from core_llm.errors import CheckpointError
from core_llm.model import Llama
from vision_adapter.config import VisionConfig, cross_attention_schedule
from vision_adapter.cross_attention import CrossAttentionBlock
from vision_adapter.encoders import ImageEncoder, MllamaTiles, NanoEncoder, keep_statistics
from vision_adapter.mllama_adapter import MllamaAdapter
from vision_adapter.mllama_config import MllamaConfig
from vision_adapter.mllama_encoder import Affine
from vision_adapter.mllama_memory import TileMemory
from vision_adapter.updates import load_updates, without_updates

KIND = "fusion"
EncoderKind = Literal["nano", "mllama", "open_clip"]


@dataclass(frozen=True)
class FusionConfig:
    """Which encoder, and the shape of what joins it to a core.

    settings: of the encoder; a `VisionConfig` or `MllamaConfig` as a mapping, or "model" and "pretrained" of
    open_clip. cross_layers: core blocks that a cross-attention block precedes; () for the usual schedule.
    cross_ffn_dim: width of those blocks' feed-forward; 0 for the core's.
    Raises `CheckpointError` for an unknown encoder or setting.
    """

    encoder: EncoderKind = "nano"
    settings: Mapping[str, Any] = field(default_factory=dict)
    cross_layers: tuple[int, ...] = ()
    cross_ffn_dim: int = 0

    def __post_init__(self) -> None:
        if self.encoder not in get_args(EncoderKind):
            known = ", ".join(get_args(EncoderKind))
            raise CheckpointError(f"unknown image encoder '{self.encoder}'; known: {known}")
        if self.encoder == "open_clip" and (
            "model" not in self.settings or not set(self.settings) <= {"model", "pretrained"}
        ):
            raise CheckpointError("the settings of an open_clip encoder are model and, if wanted, pretrained")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "FusionConfig":
        """The inverse of `dataclasses.asdict`; an unknown key raises `CheckpointError` that names it."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise CheckpointError(f"unknown fusion configuration keys: {', '.join(unknown)}")
        lists: Mapping[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**lists)


def build_encoder(config: FusionConfig, with_weights: bool = True) -> nn.Module:
    """The encoder of a config. with_weights: load what open_clip's "pretrained" names."""
    if config.encoder == "nano":
        return NanoEncoder(VisionConfig.from_dict(config.settings))
    if config.encoder == "mllama":
        return MllamaTiles(MllamaConfig.from_dict(config.settings))
    from vision_adapter.open_clip_encoder import OpenClipEncoder

    pretrained = config.settings.get("pretrained") if with_weights else None
    return OpenClipEncoder(config.settings["model"], pretrained)


class FusionAdapter(MllamaAdapter):
    """The Adapter for `Image` parts from any `ImageEncoder`; the core reads it as it reads `MllamaAdapter`.

    Pictures may have different numbers of positions.
    """

    def __init__(self, config: FusionConfig, core: LlamaConfig, with_weights: bool = True) -> None:
        nn.Module.__init__(self)
        encoder = build_encoder(config, with_weights)
        assert isinstance(encoder, ImageEncoder)
        layers = config.cross_layers or cross_attention_schedule(core.n_layers)
        self.fusion_config = config
        self.encoder = encoder  # type: ignore[assignment]
        self.projector = Affine(encoder.width, core.dim)
        self.token_rows = nn.Parameter(torch.empty(1, core.dim))
        nn.init.normal_(self.token_rows, std=core.dim**-0.5)
        self.cross_attention = nn.ModuleDict(
            {str(layer): CrossAttentionBlock(core, config.cross_ffn_dim or core.ffn_dim) for layer in layers}
        )

    def train(self, mode: bool = True) -> "FusionAdapter":
        """As `nn.Module.train`; an encoder that does not learn stays in evaluation mode.

        So does any batch norm: its statistics are the tower's, else pictures would depend on their batch.
        """
        super().train(mode)
        encoder: nn.Module = self.encoder
        if not any(p.requires_grad for p in encoder.parameters()):
            encoder.eval()
        keep_statistics(encoder)
        return self

    def preprocess(self, parts: Sequence[Image]) -> Any:
        """What the encoder makes of the pictures. Raises `MediaError` that names an unreadable one."""
        return self._encoder.preprocess([part.data for part in parts])

    @property
    def _encoder(self) -> ImageEncoder:
        encoder: Any = self.encoder
        return encoder

    def encode(self, inputs: Any) -> TileMemory:
        """Prepared pictures → keys and values of every cross-attention block, once per request."""
        features = self._encoder.encode(inputs)
        # In fp32 where autocast made it bf16: the gradients from all blocks are summed in this dtype.
        memory = self.projector(features.values).to(self.projector.weight.dtype)[None]
        keys: dict[int, Tensor] = {}
        values: dict[int, Tensor] = {}
        for layer, block in self._blocks():
            k, v = block.keys_values(memory)  # [1, G, S, D]
            keys[layer], values[layer] = k[0].contiguous(), v[0].contiguous()
        bounds = [0]
        for count in features.counts:
            bounds.append(bounds[-1] + count)
        return TileMemory(keys, values, tuple(bounds))

    def save(self, directory: Path, core: Llama, card: str | None = None) -> None:
        """Write the adapter, encoder included, in bf16 with the hash of the core that it belongs to."""
        self.store(Path(directory), KIND, asdict(self.fusion_config), core, card)


def load_fusion(where: str | Path, core: Llama) -> FusionAdapter:
    """The adapter in a folder, frozen, in the core's dtype and on its device; nothing is fetched.

    Raises `CheckpointError` where files are missing or truncated, or it belongs to another core.
    """
    values, tensors = load_adapter(Path(where), KIND, core)
    config = FusionConfig.from_dict(without_updates(values))
    adapter = FusionAdapter(config, core.config, with_weights=False)
    load_strict(adapter, tensors, Path(where))
    adapter.hold(load_updates(Path(where), core))
    weight = core.embed_tokens.weight
    return adapter.to(weight.device, weight.dtype).eval().requires_grad_(False)
