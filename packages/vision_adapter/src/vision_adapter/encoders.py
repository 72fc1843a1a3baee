"""What an image encoder has to offer, whatever it is inside; nano's and Llama 3.2-Vision's offered so.

Axes: P pictures, S memory positions of all pictures, E encoder width, R rows and K columns of patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vision_adapter.config import VisionConfig
from vision_adapter.encoder import Encoder
from vision_adapter.images import Picture, fit_size, tiles
from vision_adapter.mllama_config import MllamaConfig
from vision_adapter.mllama_encoder import MllamaEncoder, Tiles, check_tiles
from vision_adapter.tiles import choose_grid, fitted_size, tiles_of


@dataclass(frozen=True, eq=False)
class Features:
    """What an encoder sees in P pictures: values [S, E], one picture after the other; their lengths."""

    values: Tensor
    counts: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class View:
    """Where the memory positions of one picture lie over it.

    index [R, K]: which of the picture's positions each patch is; positions of no place, such as a class
    token, are left out. box: left, top, right and bottom of all patches together, in pixels of the upright
    picture; it ends beyond the picture where there is padding, and inside it where the picture was cropped.
    """

    index: Tensor
    box: tuple[float, float, float, float]


@runtime_checkable
class ImageEncoder(Protocol):
    """Pictures in, features out; also an `nn.Module`, so that it can be trained, moved and stored.

    width: E.
    """

    width: int

    def preprocess(self, pictures: Sequence[Picture]) -> Any:
        """Decode and prepare on the CPU. Raises `MediaError` that names the picture it cannot read."""
        ...

    def encode(self, inputs: Any) -> Features:
        """Features of all pictures; a batch equals its pictures one by one."""
        ...

    def view(self, width: int, height: int) -> View:
        """Where the positions lie over a picture of `width` x `height` pixels."""
        ...


class NanoEncoder(nn.Module):
    """The bundled adapter's encoder: one square tile per picture, read by a convolution stem."""

    def __init__(self, config: VisionConfig, tower: Encoder | None = None) -> None:
        super().__init__()
        self.config = config
        self.width = config.encoder_dim
        self.tower = tower or Encoder(config)

    def preprocess(self, pictures: Sequence[Picture]) -> Tensor:
        """Pictures → fp32 [P, 3, size, size]."""
        return tiles(list(pictures), self.config.image_size)

    def encode(self, inputs: Tensor) -> Features:
        """[P, 3, size, size] → equally many positions for every picture."""
        weight = self.tower.positions
        values = self.tower(inputs.to(weight.device, weight.dtype))
        return Features(values.flatten(0, 1), (values.shape[1],) * len(values))

    def view(self, width: int, height: int) -> View:
        """The picture stands in the top left of its tile."""
        return nano_view(self.config, width, height)


def nano_view(config: VisionConfig, width: int, height: int) -> View:
    """Where the patches of nano's one tile lie over a picture of `width` x `height` pixels."""
    edge = config.image_size // 8
    fitted = fit_size(width, height, config.image_size)
    index = torch.arange(config.n_patches).view(edge, edge)
    return View(
        index, (0.0, 0.0, config.image_size * width / fitted[0], config.image_size * height / fitted[1])
    )


class MllamaTiles(nn.Module):
    """Llama 3.2-Vision's encoder: a picture is one to `max_tiles` tiles, so pictures differ in length."""

    def __init__(self, config: MllamaConfig, tower: MllamaEncoder | None = None) -> None:
        super().__init__()
        self.config = config
        self.width = config.output_dim
        self.tower = tower or MllamaEncoder(config)

    def preprocess(self, pictures: Sequence[Picture]) -> Tiles:
        """Pictures → their tiles."""
        return tiles_of(pictures, self.config.image_size, self.config.max_tiles)

    def encode(self, inputs: Tiles) -> Features:
        """Tiles → features of all of them, tile by tile, each tile's class token first."""
        check_tiles(inputs, self.config)
        weight = self.tower.class_embedding
        values = self.tower(replace(inputs, pixels=inputs.pixels.to(weight.device, weight.dtype)))
        counts = tuple(count * self.config.n_positions for count in inputs.counts)
        return Features(values.flatten(0, 1), counts)

    def view(self, width: int, height: int) -> View:
        """Tiles side by side, the picture in the top left."""
        return mllama_view(self.config, width, height)


def mllama_view(config: MllamaConfig, width: int, height: int) -> View:
    """Where the patches of all tiles lie over a picture of `width` x `height` pixels; class tokens do not."""
    grid = choose_grid(width, height, config.image_size, config.max_tiles)
    edge = config.image_size // config.patch_size
    fitted = fitted_size(width, height, config.image_size, grid)
    positions = torch.arange(grid[0] * grid[1] * config.n_positions).view(*grid, config.n_positions)
    patches = positions[..., 1:].unflatten(-1, (edge, edge))  # rows and columns of tiles, then of patches
    index = patches.transpose(1, 2).reshape(grid[0] * edge, grid[1] * edge)
    right = grid[1] * config.image_size * width / fitted[0]
    return View(index, (0.0, 0.0, right, grid[0] * config.image_size * height / fitted[1]))


def encoder_of(adapter: nn.Module) -> ImageEncoder:
    """An image adapter's encoder behind the protocol; its parameters are the adapter's own."""
    encoder: Any = adapter.encoder
    config: Any = getattr(adapter, "config", None)
    if isinstance(encoder, Encoder):
        return NanoEncoder(config, encoder)
    if isinstance(encoder, MllamaEncoder):
        return MllamaTiles(config, encoder)
    assert isinstance(encoder, ImageEncoder)
    return encoder


def keep_statistics(encoder: Any) -> None:
    """Batch norms in evaluation mode: else pictures would depend on their batch."""
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
