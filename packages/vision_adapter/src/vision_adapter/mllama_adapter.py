"""Llama 3.2-Vision's eyes for a frozen core: tiled encoder, projector, token rows, gated cross-attention.

Axes: B batch, T text positions, P pictures, N tiles of all pictures, S memory positions of all pictures,
C core width, G key/value heads, D head dim, H query heads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from core_llm.adapters import Spans
from core_llm.chat import Image
from core_llm.config import LlamaConfig
from core_llm.model import Llama
from vision_adapter.config import cross_attention_schedule
from vision_adapter.cross_attention import CrossAttentionBlock, check_placeholders
from vision_adapter.mllama_config import MllamaConfig
from vision_adapter.mllama_encoder import Affine, MllamaEncoder, Tiles, check_tiles
from vision_adapter.mllama_memory import Plan, TileMemory, plan
from vision_adapter.tiles import tiles_of
from vision_adapter.updates import WithUpdates

KIND = "mllama"


class MllamaAdapter(WithUpdates):
    """The Adapter for `Image` parts with the released architecture; holds none of the core's parameters.

    Source: arXiv 2407.21783, section 7, and the released Llama 3.2-Vision.
    """

    part: type = Image

    def __init__(self, config: MllamaConfig, core: LlamaConfig) -> None:
        super().__init__()
        if not config.cross_layers:
            config = replace(config, cross_layers=cross_attention_schedule(core.n_layers))
        self.config = config
        self.encoder = MllamaEncoder(config)
        self.projector = Affine(config.output_dim, core.dim)
        self.token_rows = nn.Parameter(torch.empty(config.token_rows, core.dim))
        nn.init.normal_(self.token_rows, std=core.dim**-0.5)
        self.cross_attention = nn.ModuleDict(
            {str(layer): CrossAttentionBlock(core, core.ffn_dim) for layer in config.cross_layers}
        )

    def preprocess(self, parts: Sequence[Image]) -> Tiles:
        """Pictures → their tiles. Raises `MediaError` that names the one it cannot read."""
        return tiles_of([part.data for part in parts], self.config.image_size, self.config.max_tiles)

    def features(self, inputs: Tiles) -> Tensor:
        """Tiles [N, 3, size, size] → what cross-attention reads, in the core's width [S, C]."""
        check_tiles(inputs, self.config)
        weight = self.projector.weight
        pixels = inputs.pixels.to(weight.device, weight.dtype)
        # In fp32 where autocast made it bf16: the gradients from all blocks are summed in this dtype.
        return self.projector(self.encoder(replace(inputs, pixels=pixels))).flatten(0, 1).to(weight.dtype)

    def encode(self, inputs: Tiles) -> TileMemory:
        """Tiles → keys and values of every cross-attention block, once per request."""
        memory = self.features(inputs)[None]
        keys, values = {}, {}
        for layer, block in self._blocks():
            k, v = block.keys_values(memory)  # [1, G, S, D], here with the positions of a head side by side
            keys[layer], values[layer] = k[0].contiguous(), v[0].contiguous()
        bounds = [0]
        for count in inputs.counts:
            bounds.append(bounds[-1] + count * self.config.n_positions)
        return TileMemory(keys, values, tuple(bounds))

    def place(self, memory: TileMemory) -> list[Tensor]:
        """Per picture the row [1, C] that stands in the text for `<|image|>`: the first learnable one."""
        return [self.token_rows[:1]] * memory.count

    def interleave(self, memory: TileMemory, spans: Spans) -> Mapping[int, Callable[[Tensor], Tensor]]:
        """The cross-attention blocks, bound to the pictures that each text position sees.

        Raises `MediaError` where the text has not one placeholder for each picture.
        """
        check_placeholders(spans, memory.count)
        if memory.count == 0:
            return {}
        ordered, order = memory.in_order(spans.rows)
        planned = plan(spans, ordered.bounds, order)
        if not planned.rows:
            return {}
        return {
            layer: partial(
                _look, block=block, planned=planned, keys=ordered.keys[layer], values=ordered.values[layer]
            )
            for layer, block in self._blocks()
        }

    def _blocks(self) -> list[tuple[int, CrossAttentionBlock]]:
        return [(int(layer), block) for layer, block in self.cross_attention.items()]  # type: ignore[misc]

    def gates(self) -> dict[str, float]:
        """tanh of every cross-attention gate, by name."""
        return {
            f"{name}_{layer}": getattr(block, name).detach().tanh().item()
            for layer, block in self._blocks()
            for name in ("attention_gate", "ffn_gate")
        }

    def save(self, directory: Path, core: Llama, card: str | None = None) -> None:
        """Write the adapter in bf16, with the hash of the core that it belongs to."""
        self.store(Path(directory), KIND, self.config.to_dict(), core, card)


def _look(hidden: Tensor, block: CrossAttentionBlock, planned: Plan, keys: Tensor, values: Tensor) -> Tensor:
    """hidden [B, T, C] → [B, T, C]; a row or position without a picture comes back bit for bit."""
    whole = planned.rows == tuple(range(len(hidden)))
    index = None if whole else torch.tensor(planned.rows, device=hidden.device)
    own = hidden if index is None else hidden.index_select(0, index)

    def read(q: Tensor) -> Tensor:
        parts, at = [], 0
        for reading in planned.readings:
            parts.append(reading.read(q[at : at + len(reading.rows)], keys, values))
            at += len(reading.rows)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    out = block.blend(own, read)
    if planned.sees is not None:
        out = torch.where(planned.sees[..., None], out, own)
    return out if index is None else hidden.index_copy(0, index, out)
