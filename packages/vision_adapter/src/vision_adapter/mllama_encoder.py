"""Llama 3.2-Vision's image encoder: a Vision Transformer over up to four tiles of a picture at once.

Axes: P pictures, N tiles of all pictures, K tiles per picture, S positions of a tile, T = K·S positions of a
picture inside the encoder, R real ones among them, E width, H heads, D head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core_llm.kernels import Mask, attend
from core_llm.kernels.steps import linear, multiplies_bf16
from core_llm.layers import Linear
from vision_adapter.mllama_config import MllamaConfig, tile_grids


@dataclass(frozen=True, eq=False)
class Tiles:
    """Normalised pixels [N, 3, size, size], how many tiles each picture has, and its aspect-ratio id."""

    pixels: Tensor
    counts: tuple[int, ...]
    ratios: tuple[int, ...]


def check_tiles(tiles: Tiles, config: MllamaConfig) -> None:
    """Raise ValueError where tiles, counts and aspect ratios do not fit together."""
    grids = tile_grids(config.max_tiles)
    for count, ratio in zip(tiles.counts, tiles.ratios, strict=True):
        if not 1 <= ratio <= len(grids) or grids[ratio - 1][0] * grids[ratio - 1][1] != count:
            raise ValueError(f"aspect-ratio id {ratio} does not have {count} tiles")
    shape = (sum(tiles.counts), 3, config.image_size, config.image_size)
    if tuple(tiles.pixels.shape) != shape:
        raise ValueError(f"pixels have shape {tuple(tiles.pixels.shape)}, expected {shape}")


def _order(n_tiles: int, max_tiles: int, n_positions: int, n_padded: int) -> Tensor:
    """The T positions of a picture with its real ones in front."""
    place = torch.arange(max_tiles * n_padded).view(max_tiles, n_padded)
    real = place[:n_tiles, :n_positions].flatten()
    padding = torch.ones(max_tiles * n_padded, dtype=torch.bool)
    padding[real] = False
    return torch.cat([real, padding.nonzero()[:, 0]])


class VisionAttention(nn.Module):
    """Self-attention without biases, in which padding is seen by all but padding."""

    def __init__(self, config: MllamaConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.q_proj = Linear(config.dim, config.dim)
        self.k_proj = Linear(config.dim, config.dim)
        self.v_proj = Linear(config.dim, config.dim)
        self.o_proj = Linear(config.dim, config.dim)

    def forward(self, x: Tensor, n_real: int, last: bool = False) -> Tensor:
        """[P, T, E], the first `n_real` positions real → [P, T, E], or with `last` [P, n_real, E].

        Real positions see every position and padding sees the real ones: the mask of the released weights,
        as two products without a mask.
        """
        asking = x[:, :n_real] if last else x
        q, k, v = (
            proj(rows).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for proj, rows in ((self.q_proj, asking), (self.k_proj, x), (self.v_proj, x))
        )
        mixed = attend(q[:, :, :n_real], k, v, Mask.full())
        if n_real < asking.shape[1]:
            padding = attend(q[:, :, n_real:], k[:, :, :n_real], v[:, :, :n_real], Mask.full())
            mixed = torch.cat([mixed, padding], dim=2)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Affine(nn.Linear):
    """A product with a bias, in bf16 on a CPU by the core's kernels where the processor only emulates it."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        if x.dtype == torch.bfloat16 and not multiplies_bf16(x.device.type):
            return linear(x, self.weight) + self.bias
        return super().forward(x)


class VisionMLP(nn.Module):
    """Two layers with GELU between them."""

    def __init__(self, config: MllamaConfig) -> None:
        super().__init__()
        self.fc1 = Affine(config.dim, config.ffn_dim)
        self.fc2 = Affine(config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] → [..., E]."""
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class VisionBlock(nn.Module):
    """Pre-norm attention and feed-forward; those of a global layer each behind a tanh gate."""

    def __init__(self, config: MllamaConfig, gated: bool) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.dim, config.norm_eps)
        self.self_attn = VisionAttention(config)
        self.post_attention_layernorm = nn.LayerNorm(config.dim, config.norm_eps)
        self.mlp = VisionMLP(config)
        self.gate_attn = _gate() if gated else None
        self.gate_ffn = _gate() if gated else None

    def forward(self, x: Tensor, n_real: int, last: bool = False) -> Tensor:
        """[P, T, E] → [P, T, E]; with `last` only the real positions [P, n_real, E], for which padding is
        still read but nothing else of it computed."""
        attended = self.self_attn(self.input_layernorm(x), n_real, last)
        x = (x[:, :n_real] if last else x) + (
            attended if self.gate_attn is None else self.gate_attn.tanh() * attended
        )
        fed = self.mlp(self.post_attention_layernorm(x))
        return x + (fed if self.gate_ffn is None else self.gate_ffn.tanh() * fed)


class TileEmbedding(nn.Module):
    """A vector for every tile of every grid, behind a tanh gate; one table row per aspect-ratio id."""

    def __init__(self, config: MllamaConfig) -> None:
        super().__init__()
        self.max_tiles = config.max_tiles
        self.gate = _gate()
        self.embedding = _table(config, config.dim)

    def forward(self, ratios: Tensor) -> Tensor:
        """Aspect-ratio ids [P] → [P, K, E]."""
        return self.gate.tanh() * self.embedding(ratios).unflatten(-1, (self.max_tiles, -1))


class PositionEmbedding(nn.Module):
    """(1 - tanh g) · local + tanh g · global, the global one by grid, tile and position."""

    def __init__(self, config: MllamaConfig) -> None:
        super().__init__()
        self.max_tiles = config.max_tiles
        self.gate = _gate()
        self.embedding = nn.Parameter(torch.empty(config.n_positions, config.dim))
        nn.init.normal_(self.embedding, std=config.dim**-0.5)
        self.tile_embedding = _table(config, config.n_positions * config.dim)

    def forward(self, ratios: Tensor) -> Tensor:
        """Aspect-ratio ids [P] → [P, K, S, E]."""
        share = self.gate.tanh()
        placed = self.tile_embedding(ratios).unflatten(-1, (self.max_tiles, *self.embedding.shape))
        return (1 - share) * self.embedding + share * placed


def _gate() -> nn.Parameter:
    """A scalar, zero at first. Not torch.zeros: see `core_llm.stored.without_memory`."""
    return nn.Parameter(nn.init.zeros_(torch.empty(())))


def _table(config: MllamaConfig, width: int) -> nn.Embedding:
    """A row of K vectors for each aspect-ratio id; id 0 stands for no picture and is never read."""
    table = nn.Embedding(len(tile_grids(config.max_tiles)) + 1, config.max_tiles * width)
    nn.init.normal_(table.weight, std=config.dim**-0.5)
    return table


class BlockStack(nn.Module):
    """Blocks, one after the other."""

    def __init__(self, config: MllamaConfig, n_layers: int, gated: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionBlock(config, gated) for _ in range(n_layers))


class MllamaEncoder(nn.Module):
    """Tiles → features. Source: the released Llama 3.2-Vision, arXiv 2407.21783, section 7.1.

    A picture always passes with its maximum of tiles, the missing ones exactly zero: in the released weights
    real positions attend to padding, so the result depends on how much of it there is.
    """

    def __init__(self, config: MllamaConfig) -> None:
        super().__init__()
        self.config = config
        patch = config.patch_size
        self.patch_embedding = nn.Conv2d(3, config.dim, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(config.dim))
        nn.init.normal_(self.class_embedding, std=config.dim**-0.5)
        self.pre_tile_positional_embedding = TileEmbedding(config)
        self.gated_positional_embedding = PositionEmbedding(config)
        self.layernorm_pre = nn.LayerNorm(config.dim)
        self.transformer = BlockStack(config, config.n_layers, gated=False)
        self.layernorm_post = nn.LayerNorm(config.dim)
        self.post_tile_positional_embedding = TileEmbedding(config)
        self.global_transformer = BlockStack(config, config.n_global_layers, gated=True)

    def forward(self, tiles: Tiles) -> Tensor:
        """Features of all tiles [N, S, E·(1 + intermediate layers)], those of missing tiles left out."""
        patches = self.patch_embedding(tiles.pixels).flatten(2).transpose(1, 2)
        starts = [sum(tiles.counts[:i]) for i in range(len(tiles.counts))]
        found: dict[int, Tensor] = {}
        for count in sorted(set(tiles.counts)):  # pictures of equally many tiles pass together
            pictures = [i for i, n in enumerate(tiles.counts) if n == count]
            own = torch.stack([patches[starts[i] : starts[i] + count] for i in pictures])
            ratios = torch.tensor([tiles.ratios[i] for i in pictures], device=patches.device)
            found |= dict(zip(pictures, self._encode(own, ratios), strict=True))
        return torch.cat([found[i] for i in range(len(starts))])

    def _encode(self, patches: Tensor, ratios: Tensor) -> Tensor:
        """Patches [P, n, S - 1, E] of pictures with n tiles each → features [P, n, S, E·(1 + ...)]."""
        config, count = self.config, patches.shape[1]
        n_real = count * config.n_positions
        order = _order(count, config.max_tiles, config.n_positions, config.n_padded).to(patches.device)
        x = self._embed(patches, ratios).index_select(1, order)
        captured: list[Tensor] = []
        for index, block in enumerate(self.transformer.layers):
            before, x = x, block(x, n_real)
            if index in config.intermediate_layers:
                captured.append((before if config.capture == "input" else x)[:, :n_real])
        tile = self.post_tile_positional_embedding(ratios).index_select(1, order // config.n_padded)
        x = self.layernorm_post(x) + tile
        n_global = len(self.global_transformer.layers)
        for index, block in enumerate(self.global_transformer.layers, start=1):
            x = block(x, n_real, last=index == n_global)  # what comes out for padding is cut off below
        features = [x[:, :n_real]]
        if captured:  # interleaved by channel: all captured layers' first channels, then their second, ...
            features.append(torch.stack(captured, dim=-1).flatten(-2))
        return torch.cat(features, dim=-1).unflatten(1, (count, -1))

    def _embed(self, patches: Tensor, ratios: Tensor) -> Tensor:
        """Patches of real tiles → the encoder's input [P, T, E], missing tiles and padding filled in."""
        config = self.config
        pictures, count = patches.shape[:2]
        missing = (0, 0, 0, 0, 0, config.max_tiles - count)  # no bias: a zero tile has zero patches
        x = nn.functional.pad(patches, missing) + self.pre_tile_positional_embedding(ratios)[:, :, None]
        first = self.class_embedding.expand(pictures, config.max_tiles, 1, -1)
        x = torch.cat([first, x], dim=2) + self.gated_positional_embedding(ratios)
        padding = (0, 0, 0, config.n_padded - config.n_positions)
        return nn.functional.pad(self.layernorm_pre(x), padding).flatten(1, 2)
