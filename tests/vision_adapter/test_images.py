"""Every way a picture can be given, and every way it can be broken."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core_llm.errors import MediaError
from vision_adapter import images


def quadrants(width: int = 40, height: int = 24) -> Image.Image:
    """Red top left, green top right, blue bottom left, black bottom right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2, 0] = 255
    pixels[: height // 2, width // 2 :, 1] = 255
    pixels[height // 2 :, : width // 2, 2] = 255
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def assert_close(actual: Image.Image, expected: Image.Image, tolerance: float) -> None:
    assert actual.mode == "RGB" and actual.size == expected.size
    difference = np.abs(np.asarray(actual, float) - np.asarray(expected.convert("RGB"), float))
    assert difference.mean() <= tolerance


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 64))
        + chunk(b"IEND", b"")
    )


def test_path_bytes_pillow_and_array_give_the_same_picture(tmp_path: Path) -> None:
    image = quadrants()
    path = tmp_path / "picture.png"
    image.save(path)
    for given in (path, str(path), path.read_bytes(), image, np.asarray(image)):
        assert_close(images.decode(given), image, 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_common_formats_are_read(kind: str) -> None:
    assert_close(images.decode(encoded(quadrants(), kind)), quadrants(), 12)


def test_cmyk_palette_grey_and_bilevel_keep_their_colours() -> None:
    image = quadrants()
    assert_close(images.decode(encoded(image.convert("CMYK"), "JPEG", quality=95)), image, 12)
    assert_close(images.decode(encoded(image.convert("P"), "PNG")), image, 2)
    assert_close(images.decode(encoded(image.convert("L"), "PNG")), image.convert("L"), 0)
    bilevel = image.convert("1", dither=Image.Dither.NONE)
    assert_close(images.decode(encoded(bilevel, "PNG")), bilevel, 0)


def test_transparent_pixels_show_white() -> None:
    image = quadrants().convert("RGBA")
    image.putalpha(Image.fromarray(np.where(np.arange(40) < 20, 0, 255)[None].repeat(24, 0).astype(np.uint8)))
    pixels = np.asarray(images.decode(encoded(image, "PNG")))
    assert (pixels[:, :20] == 255).all() and tuple(pixels[0, 30]) == (0, 255, 0)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert (np.asarray(images.decode(encoded(palette, "PNG", transparency=1))) == 255).all()


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    expected = (ramp / 257).round().astype(np.uint8)
    for kind in ("PNG", "TIFF"):
        pixels = np.asarray(images.decode(encoded(Image.fromarray(ramp), kind)))
        assert np.abs(pixels[..., 0].astype(int) - expected).max() <= 1
    thirty_two = np.asarray(images.decode(encoded(Image.fromarray(ramp.astype(np.int32)), "TIFF")))
    assert np.abs(thirty_two[..., 0].astype(int) - expected).max() <= 1
    floats = np.asarray(images.decode(encoded(Image.fromarray((ramp / 65535).astype(np.float32)), "TIFF")))
    assert np.abs(floats[..., 0].astype(int) - expected).max() <= 1


def test_exif_rotation_is_applied() -> None:
    turned = quadrants().transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # the viewer has to turn it 90 degrees clockwise
    assert_close(images.decode(encoded(turned, "JPEG", exif=exif, quality=95)), quadrants(), 12)


def test_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        pixels = np.asarray(images.decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:])))
        assert np.abs(pixels.astype(int) - [255, 0, 0]).max() <= 8


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_truncated_file_is_one_line_that_names_it(kind: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(noise), kind)
    path = tmp_path / f"half.{kind.lower()}"
    for share in (0.02, 0.3, 0.6):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(MediaError, match="half") as caught:
            images.decode(path)
        assert "\n" not in str(caught.value)


def test_damaged_bytes_never_escape_as_another_error() -> None:
    generator = np.random.default_rng(1)
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        whole = np.frombuffer(encoded(quadrants(), kind), np.uint8)
        for _ in range(60):
            broken = whole.copy()
            broken[generator.integers(0, len(broken), 4)] = generator.integers(0, 255, 4)
            try:
                assert images.decode(broken.tobytes()).mode == "RGB"
            except MediaError as error:
                assert "\n" not in str(error)


def test_missing_empty_folder_and_text_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "words.png").write_text("no picture at all")
    for name, reason in [
        ("absent.png", "does not exist"),
        ("empty.png", "empty"),
        ("words.png", "not a picture"),
    ]:
        with pytest.raises(MediaError, match=f"{name}.*{reason}"):
            images.decode(tmp_path / name)
    with pytest.raises(MediaError, match="folder"):
        images.decode(tmp_path)
    with pytest.raises(MediaError, match="null|embedded"):
        images.decode("a\0b.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(MediaError, match="ordinary file"):
        images.decode(tmp_path / "pipe.png")
    with pytest.raises(MediaError, match="empty"):
        images.decode(b"")


def test_decompression_bomb_is_refused_before_decoding() -> None:
    for side in (9_000, 12_000, 60_000):
        with pytest.raises(MediaError, match="million pixels"):
            images.decode(png_header(side, side))


def test_arrays_that_are_no_picture_are_refused() -> None:
    for bad in (
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 2), np.uint8),
    ):
        with pytest.raises(MediaError, match="shape"):
            images.decode(bad)
    assert images.decode(np.zeros((4, 4, 1), np.uint8)).mode == "RGB"
    with pytest.raises(MediaError, match="not list"):
        images.decode([1, 2])  # type: ignore[arg-type]


def test_tile_keeps_proportions_and_pads_with_exact_zero() -> None:
    tile = images.tile(Image.new("RGB", (100, 50), (255, 0, 0)), 64)
    assert tile.shape == (3, 64, 64)
    assert torch.equal(tile[:, :32], torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, 32, 64))
    assert (tile[:, 32:] == 0).all()
    assert images.tile(Image.new("RGB", (1, 5000)), 64)[:, :, 1:].eq(0).all()
    assert images.tiles([], 64).shape == (0, 3, 64, 64)
