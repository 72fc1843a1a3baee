"""Eyes for a frozen core: encoder, projector, learnable token rows and gated cross-attention.

Axes: B batch, T text positions, P pictures, N pictures of one row, S memory positions per picture,
C core width, G key/value heads, D head dim.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Union

import torch
from torch import Tensor, nn

from core_llm.adapters import Spans
from core_llm.chat import Image
from core_llm.checkpoint import load_adapter, load_strict, read_config, read_tensors
from core_llm.config import LlamaConfig
from core_llm.errors import CheckpointError
from core_llm.files import WEIGHTS
from core_llm.kernels import Mask
from core_llm.model import Llama
from vision_adapter.config import VisionConfig, cross_attention_schedule
from vision_adapter.cross_attention import CrossAttentionBlock, check_placeholders
from vision_adapter.encoder import Encoder
from vision_adapter.images import tiles
from vision_adapter.updates import WithUpdates, load_updates, without_updates

if TYPE_CHECKING:
    from vision_adapter.mllama_adapter import MllamaAdapter  # and FusionAdapter, which is one

    ImageAdapter = Union["VisionAdapter", MllamaAdapter]

KIND = "vision"
KINDS = (KIND, "mllama", "fusion")
NANO = Path(__file__).parent / "nano"


@dataclass(frozen=True, eq=False)
class ImageMemory:
    """What the core reads of P pictures: per cross-attention block, keys and values [P, G, S, D] each."""

    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]
    count: int
    _rowwise: dict[object, "RowMemory"] = field(default_factory=dict, repr=False)

    def select(self, pictures: Tensor) -> "ImageMemory":
        """The memory of `pictures` [P'], in that order; a picture may come several times."""
        keys = {layer: tensor[pictures] for layer, tensor in self.keys.items()}
        values = {layer: tensor[pictures] for layer, tensor in self.values.items()}
        return ImageMemory(keys, values, len(pictures))

    def by_row(self, rows: Tensor, batch: int) -> "RowMemory":
        """The pictures laid out by row; done once per layout: decoding must not copy at each token."""
        layout = (tuple(rows.tolist()), batch)
        if layout not in self._rowwise:
            self._rowwise[layout] = self._lay_out(rows, batch)
        return self._rowwise[layout]

    def _lay_out(self, rows: Tensor, batch: int) -> "RowMemory":
        if rows.tolist() == list(range(batch)):  # one picture in every row: no copy
            return RowMemory(self.keys, self.values, rows[:, None], rows.new_ones(batch, 1, dtype=torch.bool))
        own = [[p for p, row in enumerate(rows.tolist()) if row == b] for b in range(batch)]
        width = max(len(pictures) for pictures in own)
        filled = torch.tensor(
            [[n < len(pictures) for n in range(width)] for pictures in own], device=rows.device
        )
        index = torch.tensor(
            [pictures + [0] * (width - len(pictures)) for pictures in own], device=rows.device
        )

        def gather(tensor: Tensor) -> Tensor:  # [P, G, S, D] → [B, G, N·S, D]
            return tensor[index].transpose(1, 2).flatten(2, 3)

        keys = {layer: gather(tensor) for layer, tensor in self.keys.items()}
        values = {layer: gather(tensor) for layer, tensor in self.values.items()}
        return RowMemory(keys, values, index, filled)


@dataclass(frozen=True, eq=False)
class RowMemory:
    """Keys and values [B, G, N·S, D] of each row's pictures; number n of row b is `index[b, n]` if filled."""

    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]
    index: Tensor  # [B, N]
    filled: Tensor  # bool [B, N]


def bound(
    blocks: Mapping[str, nn.Module], memory: ImageMemory, spans: Spans, positions: int
) -> dict[int, Callable[[Tensor], Tensor]]:
    """Cross-attention blocks, by layer, bound to the parts of P that each text position sees.

    positions: S, of every part. Where a row has one part there is nothing to choose: a position reads it all
    or its result is dropped.
    """
    visible = spans.visible()  # [B, T, P]
    sees = visible.any(dim=-1)
    layout = memory.by_row(spans.rows, len(visible))
    mask = Mask.full()
    if layout.index.shape[1] > 1:
        index = layout.index[:, None].expand(-1, visible.shape[1], -1)
        own = visible.gather(2, index) & layout.filled[:, None]
        mask = Mask.pairs(own.repeat_interleave(positions, dim=2))
    everywhere = None if bool(sees.all()) else sees
    return {
        int(layer): partial(
            block,
            keys=layout.keys[int(layer)],
            values=layout.values[int(layer)],
            mask=mask,
            sees=everywhere,
        )
        for layer, block in blocks.items()
    }


class VisionAdapter(WithUpdates):
    """The Adapter for `Image` parts; holds none of the core's parameters."""

    part: type = Image

    def __init__(self, config: VisionConfig, core: LlamaConfig) -> None:
        super().__init__()
        if not config.cross_layers:
            config = replace(config, cross_layers=cross_attention_schedule(core.n_layers))
        self.config = config
        self.encoder = Encoder(config)
        self.projector = nn.Linear(config.encoder_dim, core.dim)
        self.token_rows = nn.Parameter(torch.randn(config.token_rows, core.dim) * core.dim**-0.5)
        self.cross_attention = nn.ModuleDict(
            {str(layer): CrossAttentionBlock(core, config.cross_ffn_dim) for layer in config.cross_layers}
        )

    def preprocess(self, parts: Sequence[Image]) -> Tensor:
        """Pictures → fp32 tiles [P, 3, size, size]. Raises `MediaError` that names the one it cannot read."""
        return tiles([part.data for part in parts], self.config.image_size)

    def encode(self, inputs: Tensor) -> ImageMemory:
        """Tiles [P, 3, size, size] → keys and values of every cross-attention block, once per request."""
        pixels = inputs.to(self.projector.weight.device, self.projector.weight.dtype)
        # In fp32 where autocast made it bf16: the gradients from all blocks are summed in this dtype.
        memory = self.projector(self.encoder(pixels)).to(self.projector.weight.dtype)
        pairs = {int(layer): block.keys_values(memory) for layer, block in self._blocks()}
        return ImageMemory(
            {layer: keys for layer, (keys, _) in pairs.items()},
            {layer: values for layer, (_, values) in pairs.items()},
            len(inputs),
        )

    def place(self, memory: ImageMemory) -> list[Tensor]:
        """Per picture, the learnable rows [token_rows, C] that stand in the text in place of `<|image|>`.

        They are the same for every picture: what they know of it they read by cross-attention.
        """
        return [self.token_rows] * memory.count

    def interleave(self, memory: ImageMemory, spans: Spans) -> Mapping[int, Callable[[Tensor], Tensor]]:
        """The cross-attention blocks, bound to the pictures that each text position sees.

        Raises `MediaError` where the text has not one placeholder for each picture.
        """
        check_placeholders(spans, memory.count)
        if memory.count == 0:
            return {}
        return bound(dict(self._blocks()), memory, spans, self.config.n_patches)

    def _blocks(self) -> list[tuple[str, CrossAttentionBlock]]:
        return [(layer, block) for layer, block in self.cross_attention.items()]  # type: ignore[misc]

    def gates(self) -> dict[str, float]:
        """tanh of every gate, by name: the share of the image path that each block lets through."""
        return {
            f"{name}_{layer}": getattr(block, name).detach().tanh().item()
            for layer, block in self._blocks()
            for name in ("attention_gate", "ffn_gate")
        }

    def save(self, directory: Path, core: Llama, card: str | None = None) -> None:
        """Write the adapter, with the hash of the core that it was trained on."""
        self.store(Path(directory), KIND, self.config.to_dict(), core, card)


def load(where: str | Path, core: Llama) -> "ImageAdapter":
    """The image adapter at `where` ("nano" for the bundled one), of any kind, frozen.

    It has the core's dtype and stands on its device; updates of the core that were trained with it are
    attached to the core, and kept as `lora`.
    Raises `CheckpointError` where files are missing or truncated, the kind is unknown, or the adapter belongs
    to another core.
    """
    directory = NANO if str(where) == "nano" else Path(where)
    kind = kind_of(directory)
    if kind == "mllama":
        from vision_adapter.mllama_checkpoint import load as load_mllama

        return load_mllama(directory, core)
    if kind == "fusion":
        from vision_adapter.fusion import load_fusion

        return load_fusion(directory, core)
    return load_own(directory, core)


def kind_of(directory: Path) -> str:
    """Which kind of image adapter a folder holds; raises `CheckpointError` that lists `KINDS` for others."""
    values = read_config(directory)
    kind = values.get("kind")
    if kind in KINDS:
        if not isinstance(values.get("adapter"), dict):
            raise CheckpointError(f"{directory}: its config.json says nothing of the adapter's shape")
        return str(kind)
    known = f"known kinds: {', '.join(KINDS)}"
    if kind is None and values.get("model_type") == "mllama":
        raise CheckpointError(
            f"{directory}: holds core and adapter in one; split it with `vision-adapter convert {directory} "
            "--out DIR --layout adapter`"
        )
    raise CheckpointError(f"{directory}: holds a {kind or 'core'}, not an image adapter; {known}")


def load_own(where: str | Path, core: Llama) -> VisionAdapter:
    """`load` for the kind "vision" alone; raises `CheckpointError` for the others."""
    directory = NANO if str(where) == "nano" else Path(where)
    values, tensors = load_adapter(directory, KIND, core)
    adapter = VisionAdapter(VisionConfig.from_dict(without_updates(values)), core.config)
    load_strict(adapter, tensors, directory)
    adapter.hold(load_updates(directory, core))
    weight = core.embed_tokens.weight
    return adapter.to(weight.device, weight.dtype).eval().requires_grad_(False)


def load_on_other_core(where: str | Path, core: Llama) -> "ImageAdapter":
    """An adapter of any kind on a core that it was not trained on, such as the instruct version of its own.

    Raises `CheckpointError` where the shapes do not fit, or low-rank updates of its own core belong to it.
    """
    directory = NANO if str(where) == "nano" else Path(where)
    kind, values = kind_of(directory), read_config(directory)["adapter"]
    if without_updates(values) != values:
        raise CheckpointError(
            f"{directory}: has low-rank updates of the core that it was trained on; it cannot move to another"
        )
    adapter: ImageAdapter
    if kind == "mllama":
        from vision_adapter.mllama_adapter import MllamaAdapter
        from vision_adapter.mllama_config import MllamaConfig

        adapter = MllamaAdapter(MllamaConfig.from_dict(values), core.config)
    elif kind == "fusion":
        from vision_adapter.fusion import FusionAdapter, FusionConfig

        adapter = FusionAdapter(FusionConfig.from_dict(values), core.config, with_weights=False)
    else:
        adapter = VisionAdapter(VisionConfig.from_dict(values), core.config)
    beyond = [layer for layer in adapter.cross_attention if int(layer) >= core.config.n_layers]
    if beyond:  # they would never be called
        raise CheckpointError(
            f"{directory}: has a layer before block {beyond[0]}, this core only {core.config.n_layers} blocks"
        )
    load_strict(adapter, read_tensors(directory / WEIGHTS), directory)
    return adapter
