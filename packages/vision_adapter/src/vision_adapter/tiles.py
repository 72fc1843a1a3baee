"""A picture of any shape as up to `max_tiles` square tiles, as the released vision models read it.

Axes: N tiles in reading order, 3 channels, S pixels along a tile's edge.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor

from core_llm.errors import MediaError
from vision_adapter.images import Picture, decode, describe_source, to_rgb
from vision_adapter.mllama_config import tile_grids
from vision_adapter.mllama_encoder import Tiles

# Per channel, of pixels in 0..1: those of CLIP (arXiv 2103.00020), which the released models share.
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


def choose_grid(width: int, height: int, tile_size: int, max_tiles: int) -> tuple[int, int]:
    """The grid (rows, columns) of tiles for a picture of `width` x `height` pixels.

    The grid that enlarges the picture least; where every grid shrinks it, the one that shrinks it least.
    Among equals the one with fewest tiles. Raises ValueError for sizes below 1.
    """
    if min(width, height, tile_size, max_tiles) < 1:
        raise ValueError(f"no grid of {max_tiles} tiles of {tile_size} pixels for {width} x {height} pixels")
    scales = {
        grid: min(grid[0] * tile_size / height, grid[1] * tile_size / width) for grid in tile_grids(max_tiles)
    }
    enlarging = [scale for scale in scales.values() if scale >= 1]
    best = min(enlarging) if enlarging else max(scales.values())
    return min((grid for grid, scale in scales.items() if scale == best), key=lambda grid: grid[0] * grid[1])


def fitted_size(width: int, height: int, tile_size: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Width and height in pixels at which a picture stands in the top left of its grid, undistorted.

    It fills the grid along one edge at most, and is never enlarged beyond one tile.
    """
    most_wide = min(max(width, tile_size), grid[1] * tile_size)
    most_high = min(max(height, tile_size), grid[0] * tile_size)
    if most_wide / width < most_high / height:
        return most_wide, min(math.floor(height * (most_wide / width)) or 1, most_high)
    return min(math.floor(width * (most_high / height)) or 1, most_wide), most_high


def tiles_of(pictures: Sequence[Picture], tile_size: int, max_tiles: int) -> Tiles:
    """Decode pictures and cut them into tiles. Raises `MediaError` that names the one it cannot read."""
    if not pictures:
        return Tiles(torch.zeros(0, 3, tile_size, tile_size), (), ())
    tiled = [tile_image(decode(picture), tile_size, max_tiles) for picture in pictures]
    pixels = torch.cat([pixels for pixels, _, _ in tiled])
    return Tiles(pixels, tuple(len(p) for p, _, _ in tiled), tuple(ratio for _, _, ratio in tiled))


def tile_image(image: Pillow.Image, tile_size: int, max_tiles: int) -> tuple[Tensor, tuple[int, int], int]:
    """A picture → normalised fp32 tiles [N, 3, S, S], their grid (rows, columns) and its aspect-ratio id.

    Bilinear. Right of and below the picture stand black pixels, normalised like the rest: so the released
    models were trained. Only whole tiles that a picture does not have are exactly zero, and those are not
    made here: N is rows · columns. Raises `MediaError` for a picture without pixels.
    """
    if image.width == 0 or image.height == 0:
        name = describe_source(image)
        raise MediaError(f"{name} has no pixels ({image.width} x {image.height}); give one that has some")
    grid = choose_grid(image.width, image.height, tile_size, max_tiles)
    size = fitted_size(image.width, image.height, tile_size, grid)
    image = to_rgb(image)
    if size != image.size:
        image = image.resize(size, Pillow.Resampling.BILINEAR)
    rows, columns = grid
    canvas = np.zeros((rows * tile_size, columns * tile_size, 3), np.uint8)
    canvas[: size[1], : size[0]] = np.asarray(image)
    parts = torch.from_numpy(canvas).view(rows, tile_size, columns, tile_size, 3).permute(0, 2, 4, 1, 3)
    pixels = parts.reshape(rows * columns, 3, tile_size, tile_size).float()
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return (pixels / 255 - mean) / deviation, grid, tile_grids(max_tiles).index(grid) + 1
