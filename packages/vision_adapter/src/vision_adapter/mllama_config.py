"""Shape of Llama 3.2-Vision's adapter, in our spelling, Hugging Face's and the original release's."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from core_llm.config import LlamaConfig
from core_llm.errors import CheckpointError
from core_llm.hf_layout import config_from_hf, config_to_hf
from core_llm.original_layout import config_from_params, params_from_config

Capture = Literal["input", "output"]

# What params.json says of the vision part; everything else about it is fixed in the released code.
_RELEASED_PARAMS = {
    "vision_chunk_size": "image_size",
    "vision_max_num_chunks": "max_tiles",
}
_CROSS_LAYERS = "vision_num_cross_attention_layers"
# Ours, for shapes that were never released; written only where a reader would guess wrong.
_OWN_PARAMS = {
    f"vision_{name}": name
    for name in (
        "patch_size",
        "dim",
        "n_layers",
        "n_global_layers",
        "n_heads",
        "ffn_dim",
        "intermediate_layers",
        "token_rows",
        "cross_layers",
    )
}
_HF_KEYS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "max_num_tiles": "max_tiles",
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_global_layers": "n_global_layers",
    "attention_heads": "n_heads",
    "intermediate_size": "ffn_dim",
}
_SHAPE_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


@dataclass(frozen=True)
class MllamaConfig:
    """Everything that fixes the adapter's shape, apart from the core's own sizes; the defaults are the 11B's.

    capture: whether the layers in `intermediate_layers` give away their "input", as in the released code, or
    their "output", as transformers has it since 4.56 for the same list (off by one; kept for comparisons).
    Raises `CheckpointError` where heads, patches or layers do not fit.
    """

    image_size: int = 560  # pixels; a square tile
    patch_size: int = 14
    max_tiles: int = 4
    dim: int = 1280
    n_layers: int = 32  # local: without gates
    n_global_layers: int = 8
    n_heads: int = 16
    ffn_dim: int = 5120
    intermediate_layers: tuple[int, ...] = (3, 7, 15, 23, 30)
    capture: Capture = "input"
    norm_eps: float = 1e-5
    token_rows: int = 8  # learnable rows beside the core's embedding; the first stands for <|image|>
    cross_layers: tuple[int, ...] = ()  # core blocks that a cross-attention block precedes

    def __post_init__(self) -> None:
        if self.dim % self.n_heads:
            raise CheckpointError(f"vision dim {self.dim} is not divisible by n_heads {self.n_heads}")
        if self.image_size % self.patch_size:
            raise CheckpointError(f"image_size {self.image_size} is not a multiple of {self.patch_size}")
        if self.capture not in ("input", "output"):
            raise CheckpointError(f"unknown capture '{self.capture}'; known: input, output")
        wrong = [i for i in self.intermediate_layers if not 0 <= i < self.n_layers]
        if wrong or list(self.intermediate_layers) != sorted(set(self.intermediate_layers)):
            raise CheckpointError(
                f"intermediate_layers {self.intermediate_layers} are not ascending and below {self.n_layers}"
            )
        if self.max_tiles < 1 or self.token_rows < 1:
            raise CheckpointError("max_tiles and token_rows must be at least 1")

    @property
    def n_positions(self) -> int:
        """Positions of one tile: its patches and the class token (1601 at 560 pixels)."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def n_padded(self) -> int:
        """Positions of one tile inside the encoder: a multiple of 8 (1608 at 560 pixels)."""
        return -(-self.n_positions // 8) * 8

    @property
    def output_dim(self) -> int:
        """Width of the encoder's features: the last layer's and the intermediate ones'."""
        return self.dim * (1 + len(self.intermediate_layers))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MllamaConfig":
        """The inverse of `to_dict`; an unknown key raises `CheckpointError` that names it."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise CheckpointError(f"unknown vision configuration keys: {', '.join(unknown)}")
        lists: Mapping[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**lists)


def tile_grids(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Grids (height, width) in tiles by aspect-ratio id - 1; of 4 tiles (1,1), (1,2), ... (4,1)."""
    sides = range(1, max_tiles + 1)
    return tuple((h, w) for h in sides for w in sides if h * w <= max_tiles)


def fusion_schedule(n_layers: int, n_cross: int) -> tuple[int, ...]:
    """Core blocks before which the `n_cross` cross-attention blocks run: evenly spread, the last one last."""
    if not 0 < n_cross <= n_layers:
        raise CheckpointError(f"{n_cross} cross-attention layers do not fit a core of {n_layers} layers")
    stride = -(-n_layers // n_cross)
    return tuple(range(n_layers))[::-1][::stride][:n_cross][::-1]


def fused_indices(n_layers: int, cross_layers: Sequence[int]) -> tuple[list[int], list[int]]:
    """Where core blocks and cross-attention blocks stand in Hugging Face's one list of layers."""
    core: list[int] = []
    cross: list[int] = []
    for layer in range(n_layers):
        if layer in cross_layers:
            cross.append(len(core) + len(cross))
        core.append(len(core) + len(cross))
    return core, cross


def preset(name: str) -> tuple[MllamaConfig, LlamaConfig]:
    """Adapter and core of "11b" or "90b"; raises `CheckpointError` for another name."""
    from core_llm.config import PRESETS

    cores = {"11b": "llama-3.1-8b", "90b": "llama-3.1-70b"}
    if name not in cores:
        raise CheckpointError(f"unknown preset '{name}'; known: {', '.join(cores)}")
    core = PRESETS[cores[name]]
    return MllamaConfig(cross_layers=fusion_schedule(core.n_layers, core.n_layers // 4)), core


def from_hf(values: Mapping[str, Any], path: Path) -> tuple[MllamaConfig, LlamaConfig]:
    """config.json of a fused checkpoint as adapter and core; raises `CheckpointError` naming file and key."""
    if values.get("model_type") != "mllama":
        raise CheckpointError(f"{path}: model_type is {values.get('model_type')!r}, expected 'mllama'")
    text, vision = (values.get(key) for key in ("text_config", "vision_config"))
    if not isinstance(text, dict) or not isinstance(vision, dict):
        raise CheckpointError(f"{path}: text_config or vision_config is missing")
    for key in _SHAPE_KEYS:
        if not isinstance(text.get(key), int):
            raise CheckpointError(f"{path}: text_config.{key} is {text.get(key)!r}, not a number")
    fused = _integers(text, "cross_attention_layers", path)
    if any(not 0 <= i < text["num_hidden_layers"] for i in fused):
        raise CheckpointError(f"{path}: cross_attention_layers {fused} go beyond num_hidden_layers")
    n_core = text["num_hidden_layers"] - len(fused)
    plain = {**text, "model_type": "llama", "num_hidden_layers": n_core}
    # The learnable rows make the embedding longer than the head: in this model they are never tied.
    core = replace(config_from_hf(plain, path), tied_embeddings=False)
    adapter = replace(_vision_from_hf(vision, path), cross_layers=tuple(j - i for i, j in enumerate(fused)))
    if fused_indices(n_core, adapter.cross_layers)[1] != list(fused):
        raise CheckpointError(f"{path}: cross_attention_layers {fused} must each be followed by a core layer")
    return adapter, core


def _vision_from_hf(values: Mapping[str, Any], path: Path) -> MllamaConfig:
    for key in _HF_KEYS:
        if not isinstance(values.get(key), int) or values[key] < 0:
            raise CheckpointError(f"{path}: vision_config.{key} is {values.get(key)!r}, not a number")
    captured = _integers(values, "intermediate_layers_indices", path)
    try:
        config = MllamaConfig(
            **{ours: values[key] for key, ours in _HF_KEYS.items()},
            intermediate_layers=captured,
            norm_eps=float(values.get("norm_eps", 1e-5)),
        )
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    expected = {
        "hidden_act": "gelu",
        "num_channels": 3,
        "vision_output_dim": config.output_dim,
        "supported_aspect_ratios": [list(grid) for grid in tile_grids(config.max_tiles)],
    }
    for key, value in expected.items():
        if values.get(key, value) != value:
            raise CheckpointError(f"{path}: vision_config.{key} is {values[key]!r}, not {value!r}")
    return config


def _integers(values: Mapping[str, Any], key: str, path: Path) -> tuple[int, ...]:
    found = values.get(key)
    whole = isinstance(found, list) and all(isinstance(i, int) for i in found)
    if not isinstance(found, list) or not whole or sorted(set(found)) != found:
        raise CheckpointError(f"{path}: {key} is {found!r}, not an ascending list of layers")
    return tuple(found)


def to_hf(config: MllamaConfig, core: LlamaConfig, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """The inverse of `from_hf`: what transformers' MllamaConfig reads."""
    text = config_to_hf(core, dtype=dtype)
    stored = text["dtype"]
    del text["architectures"]
    text |= {
        "model_type": "mllama_text_model",
        "num_hidden_layers": core.n_layers + len(config.cross_layers),
        "cross_attention_layers": fused_indices(core.n_layers, config.cross_layers)[1],
        "tie_word_embeddings": False,
        "eos_token_id": text["bos_token_id"] + 1,
        "pad_token_id": text["bos_token_id"] + 4,
    }
    vision = {key: getattr(config, ours) for key, ours in _HF_KEYS.items()} | {
        "model_type": "mllama_vision_model",
        "hidden_act": "gelu",
        "num_channels": 3,
        "norm_eps": config.norm_eps,
        "intermediate_layers_indices": list(config.intermediate_layers),
        "vision_output_dim": config.output_dim,
        "supported_aspect_ratios": [list(grid) for grid in tile_grids(config.max_tiles)],
        "dtype": stored,
    }
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": core.vocab_size,
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": False,
        "dtype": stored,
        "torch_dtype": stored,
    }


def from_params(
    values: Mapping[str, Any], path: Path, rope_factor: float | None = None
) -> tuple[MllamaConfig, LlamaConfig]:
    """params.json of a fused checkpoint as adapter and core; raises `CheckpointError` naming file and key."""
    own = {*_RELEASED_PARAMS, *_OWN_PARAMS, _CROSS_LAYERS}
    text = {key: value for key, value in values.items() if key not in own}
    core = config_from_params(text, path, tied=False, rope_factor=rope_factor)
    for key in (*_RELEASED_PARAMS, _CROSS_LAYERS):
        if not isinstance(values.get(key), int) or values[key] < 1:
            raise CheckpointError(f"{path}: {key} is {values.get(key)!r}, not a positive number")
    try:
        given = {ours: values[key] for key, ours in (_RELEASED_PARAMS | _OWN_PARAMS).items() if key in values}
        given.setdefault("cross_layers", fusion_schedule(core.n_layers, values[_CROSS_LAYERS]))
        return MllamaConfig.from_dict(given), core
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def to_params(config: MllamaConfig, core: LlamaConfig) -> dict[str, Any]:
    """The inverse of `from_params`; raises `CheckpointError` for what it cannot express."""
    if config.norm_eps != MllamaConfig.norm_eps:
        raise CheckpointError(f"the original layout cannot express a vision norm_eps of {config.norm_eps}")
    values = params_from_config(core) | {key: getattr(config, own) for key, own in _RELEASED_PARAMS.items()}
    values[_CROSS_LAYERS] = len(config.cross_layers)
    guessed = from_params(values, Path("params.json"))[0]
    for key, own in _OWN_PARAMS.items():
        value = getattr(config, own)
        if value != getattr(guessed, own):
            values[key] = list(value) if isinstance(value, tuple) else value
    return values
