"""Tiles against transformers' image processors, over sizes of every kind."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from core_llm.errors import MediaError
from vision_adapter.mllama_config import tile_grids
from vision_adapter.tiles import DEVIATION, MEAN, choose_grid, fitted_size, tile_image

TILE = 28
EDGES = [1, 2, 13, 27, 28, 29, 42, 55, 56, 57, 84, 85, 111, 112, 113, 200, 301]


def photograph(width: int, height: int) -> Image.Image:
    """Smooth and busy at once: waves of several lengths with some noise on top."""
    rng = np.random.default_rng(width * 1000 + height)
    y, x = np.mgrid[:height, :width]
    waves = [127 + 90 * np.sin(x / a + y / b) for a, b in ((9.0, 31.0), (40.0, 7.0), (5.0, 5.0))]
    pixels = np.stack(waves, axis=-1) + rng.normal(0, 15, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def reference(kind: str, tile_size: int, max_tiles: int) -> Any:
    """transformers' processor by Pillow or by torchvision, with mean, deviation and size set to ours."""
    from transformers.models.mllama import image_processing_mllama, image_processing_pil_mllama

    processors = {
        "pillow": image_processing_pil_mllama.MllamaImageProcessorPil,
        "torchvision": image_processing_mllama.MllamaImageProcessor,
    }
    return processors[kind](
        size={"height": tile_size, "width": tile_size},
        max_image_tiles=max_tiles,
        image_mean=list(MEAN),
        image_std=list(DEVIATION),
    )


def levels(pixels: torch.Tensor) -> torch.Tensor:
    """Normalised pixels as 0..255."""
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return (pixels * deviation + mean) * 255


def test_grid_and_size_equal_transformers_for_every_pair_of_edges() -> None:
    from transformers.models.mllama import image_processing_mllama as theirs

    rng = random.Random(0)
    pairs = [(a, b) for a in EDGES for b in EDGES]
    pairs += [(rng.randint(1, 3000), rng.randint(1, 3000)) for _ in range(300)] + [(1, 5000), (5000, 1)]
    seen = set()
    for tile_size, max_tiles in ((TILE, 4), (560, 4), (224, 1), (TILE, 6)):
        for width, height in pairs:
            grid = choose_grid(width, height, tile_size, max_tiles)
            canvas = theirs.get_optimal_tiled_canvas(height, width, max_tiles, tile_size)
            assert (grid[0] * tile_size, grid[1] * tile_size) == tuple(map(int, canvas)), (width, height)
            fitted = theirs.get_image_size_fit_to_canvas(height, width, *canvas, tile_size)
            assert fitted_size(width, height, tile_size, grid) == tuple(map(int, fitted[::-1]))
            seen.add((max_tiles, grid))
    assert {grid for max_tiles, grid in seen if max_tiles == 4} == set(tile_grids(4))


@pytest.mark.parametrize("kind", ["pillow", "torchvision"])
def test_tiles_equal_transformers_up_to_one_grey_level(kind: str) -> None:
    processor = reference(kind, TILE, 4)
    sizes = [
        (40, 24),
        (28, 28),
        (56, 56),
        (90, 20),
        (20, 90),
        (30, 200),
        (200, 30),
        (61, 43),
        (7, 5),
        (28, 56),
        (28, 84),
        (1, 300),
    ]
    sizes += [(301, 113), (112, 28), (28, 112), (84, 28), (55, 85), (300, 299)]
    ids = set()
    for size in sizes:
        image = photograph(*size)
        pixels, (rows, columns), ratio = tile_image(image, TILE, 4)
        theirs = processor(images=image, return_tensors="pt")
        assert theirs["aspect_ratio_ids"].tolist() == [[ratio]]
        assert pixels.shape == (rows * columns, 3, TILE, TILE) and pixels.dtype == torch.float32
        expected = theirs["pixel_values"][0, 0]
        assert (expected[len(pixels) :] == 0).all()
        difference = (levels(pixels) - levels(expected[: len(pixels)])).abs()
        # torchvision resizes with another fixed-point arithmetic: now and then a level apart.
        assert difference.max() < (1.01 if kind == "torchvision" else 1e-3), size
        assert difference.mean() < 0.02
        ids.add(ratio)
    assert ids == set(range(1, 9))


def test_a_tile_that_is_turned_or_shifted_would_be_noticed() -> None:
    pixels = tile_image(photograph(56, 56), TILE, 4)[0]
    assert (levels(pixels) - levels(pixels[[0, 2, 1, 3]])).abs().mean() > 10
    assert (levels(pixels)[..., 1:] - levels(pixels)[..., :-1]).abs().mean() > 1


def test_picture_is_neither_distorted_nor_enlarged_beyond_a_tile() -> None:
    for width, height in [(7, 5), (10, 3), (40, 24), (61, 43), (200, 30), (400, 399), (29, 28)]:
        grid = choose_grid(width, height, TILE, 4)
        wide, high = fitted_size(width, height, TILE, grid)
        assert wide <= grid[1] * TILE and high <= grid[0] * TILE
        scale = max(wide / width, high / height)
        assert abs(wide - width * scale) < 1 + 1e-6 and abs(high - height * scale) < 1 + 1e-6
        assert scale <= 1 or max(wide, high) <= TILE


def test_beyond_the_picture_stand_black_pixels_and_nothing_else() -> None:
    pixels, grid, ratio = tile_image(Image.new("RGB", (40, 20), "white"), TILE, 4)
    assert (grid, ratio) == ((1, 2), 2)
    wide, high = fitted_size(40, 20, TILE, grid)
    canvas = levels(torch.cat(list(pixels), dim=-1)).round()
    assert (wide, high) == (40, 20)
    assert (canvas[:, :high, :wide] == 255).all()
    assert (canvas[:, high:] == 0).all() and (canvas[:, :, wide:] == 0).all()
    black = -torch.tensor(MEAN) / torch.tensor(DEVIATION)
    assert torch.allclose(pixels[1, :, -1, -1], black, atol=1e-6)


def test_pictures_of_other_modes_are_read_as_rgb() -> None:
    red = tile_image(Image.new("RGB", (9, 9), (255, 0, 0)), TILE, 1)[0]
    assert torch.equal(tile_image(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), TILE, 1)[0], red)
    clear = tile_image(Image.new("RGBA", (9, 9), (255, 0, 0, 0)), TILE, 1)[0]
    assert torch.equal(clear, tile_image(Image.new("RGB", (9, 9), "white"), TILE, 1)[0])


def test_picture_without_pixels_and_impossible_tiles_are_refused() -> None:
    with pytest.raises(MediaError, match="no pixels"):
        tile_image(Image.new("RGB", (0, 5)), TILE, 4)
    for tile_size, max_tiles in ((0, 4), (TILE, 0)):
        with pytest.raises(ValueError, match="no grid"):
            choose_grid(4, 4, tile_size, max_tiles)


def test_normalisation_is_what_clip_was_trained_with() -> None:
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    assert MEAN == OPENAI_DATASET_MEAN and DEVIATION == OPENAI_DATASET_STD
    grey = tile_image(Image.new("RGB", (5, 5), (128, 128, 128)), 5, 1)[0]
    for channel in range(3):
        expected = (128 / 255 - MEAN[channel]) / DEVIATION[channel]
        assert math.isclose(grey[0, channel, 2, 2].item(), expected, rel_tol=1e-6)
