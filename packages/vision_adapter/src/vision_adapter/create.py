"""A new image adapter from a line of text: which encoder, with which settings."""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from core_llm.config import LlamaConfig
from core_llm.errors import UserError
from vision_adapter.config import VisionConfig
from vision_adapter.mllama_config import MllamaConfig

if TYPE_CHECKING:
    from vision_adapter.adapter import ImageAdapter

ENCODERS = ("nano", "mllama", "open_clip:MODEL[:TAG]", "llama-3.2-vision")


def create(
    encoder: str,
    core: LlamaConfig,
    settings: str = "",
    cross_layers: tuple[int, ...] = (),
    cross_ffn_dim: int = 0,
    seed: int = 0,
) -> "ImageAdapter":
    """An adapter that has learnt nothing but what its encoder's published weights know.

    encoder: "nano" or "mllama" of random weights, "open_clip:MODEL" or "open_clip:MODEL:TAG" (the tag's
    weights) for a `FusionAdapter`; "llama-3.2-vision" for the released architecture whole, a `MllamaAdapter`.
    settings: of the encoder, a JSON object of `VisionConfig`'s or `MllamaConfig`'s; none for open_clip.
    Raises `UserError` for an unknown encoder, `CheckpointError` for a setting that does not fit.
    """
    from vision_adapter.fusion import FusionAdapter, FusionConfig
    from vision_adapter.mllama_adapter import MllamaAdapter

    kind, _, rest = encoder.partition(":")
    model, _, tag = rest.partition(":")
    values = _settings(settings, VisionConfig if kind == "nano" else MllamaConfig)
    torch.manual_seed(seed)
    if kind == "open_clip":
        if not model or values:
            raise UserError("write open_clip:MODEL or open_clip:MODEL:TAG; it takes no --settings")
        values = {"model": model} | ({"pretrained": tag} if tag else {})
    elif rest or kind not in ("nano", "mllama", "llama-3.2-vision"):
        raise UserError(f"unknown encoder '{encoder}'; known: {', '.join(ENCODERS)}")
    beyond = [layer for layer in cross_layers if not 0 <= layer < core.n_layers]
    if beyond or list(cross_layers) != sorted(set(cross_layers)):
        raise UserError(f"--cross-layers must ascend and lie below the core's {core.n_layers} blocks")
    if kind == "llama-3.2-vision":
        if cross_ffn_dim:
            raise UserError("llama-3.2-vision has the core's feed-forward width: leave --cross-ffn-dim out")
        return MllamaAdapter(MllamaConfig.from_dict({**values, "cross_layers": cross_layers}), core)
    try:
        return FusionAdapter(FusionConfig(kind, values, cross_layers, cross_ffn_dim), core)  # type: ignore[arg-type]
    except ValueError as error:  # of the layers: channels that do not fall into groups, for one
        raise UserError(f"--settings {settings} do not fit together: {error}") from None


def _settings(text: str, config: type[VisionConfig] | type[MllamaConfig]) -> Mapping[str, Any]:
    if not text:
        return {}
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"--settings is not JSON ({error}); write it like '{{\"dim\": 64}}'") from None
    if not isinstance(values, dict):
        raise UserError("--settings is not a JSON object; write it like '{\"dim\": 64}'")
    for field in fields(config):
        default, value = field.default, values.get(field.name, field.default)
        numbers = value if isinstance(value, list | tuple) and isinstance(default, tuple) else [value]
        if isinstance(default, tuple) and numbers is not value:
            raise UserError(f"--settings: {field.name} is {json.dumps(value)}, not a list")
        least = 0 if "layers" in field.name else 1
        if isinstance(default, int | tuple) and not all(type(n) is int and n >= least for n in numbers):
            raise UserError(
                f"--settings: {field.name} is {json.dumps(value)}; whole numbers from {least} on fit"
            )
    return values
