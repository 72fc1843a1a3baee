"""Every way a picture can be given, and every way it can be broken."""

import errno
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


def png(
    width: int,
    height: int,
    data: bytes,
    depth: int = 8,
    kind: int = 2,
    extra: tuple[bytes, bytes] | None = None,
) -> bytes:
    """A PNG written by hand: one row of `data`, whatever size is announced."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(*extra) if extra else b"")
        + chunk(b"IDAT", zlib.compress(b"\0" + data))
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


def test_picture_of_every_mode_that_a_program_may_hand_over_is_read() -> None:
    for mode in (
        "1",
        "L",
        "LA",
        "La",
        "P",
        "PA",
        "RGB",
        "RGBA",
        "RGBa",
        "RGBX",
        "CMYK",
        "YCbCr",
        "HSV",
        "LAB",
    ):
        assert images.decode(Image.new(mode, (3, 2))).mode == "RGB"
    clear, solid = Image.new("LA", (3, 2), (10, 0)), Image.new("LA", (3, 2), (10, 255))
    for image, shown in ((clear, 255), (clear.convert("La"), 255), (solid, 10), (solid.convert("La"), 10)):
        assert (np.asarray(images.decode(image)) == shown).all()


def test_transparent_colour_of_deep_and_of_plain_pngs_shows_white() -> None:
    def with_transparency(depth: int, kind: int, row: bytes, transparent: bytes) -> bytes:
        return png(2, 1, row, depth, kind, extra=(b"tRNS", transparent))

    grey = with_transparency(16, 0, struct.pack(">2H", 1000, 257 * 100), struct.pack(">H", 1000))
    assert np.asarray(images.decode(grey)).tolist() == [[[255] * 3, [100] * 3]]
    deep = with_transparency(
        16, 2, struct.pack(">6H", 65535, 0, 257, 0, 0, 65535), struct.pack(">3H", 65535, 0, 257)
    )
    assert np.asarray(images.decode(deep)).tolist() == [[[255] * 3, [0, 0, 255]]]
    plain = with_transparency(8, 2, bytes([1, 2, 3, 4, 5, 6]), struct.pack(">3H", 1, 2, 3))
    assert np.asarray(images.decode(plain)).tolist() == [[[255] * 3, [4, 5, 6]]]
    bilevel = with_transparency(1, 0, b"\x40", struct.pack(">H", 1))
    assert np.asarray(images.decode(bilevel)).tolist() == [[[0] * 3, [255] * 3]]


def test_half_transparent_palette_is_blended_with_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    shown = np.asarray(images.decode(encoded(palette, "PNG", transparency=bytes([0, 128]))))
    assert shown[0, 0].tolist() == [255, 255, 255] and shown[0, 1].tolist() == [127, 255, 127]


def test_colours_of_sixteen_bits_keep_their_upper_half() -> None:
    row = struct.pack(">8H", 65535, 0, 257 * 100, 65535, 0, 0, 0, 0)
    assert np.asarray(images.decode(png(2, 1, row, 16, 6))).tolist() == [[[255, 0, 100], [255] * 3]]


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


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_exif_orientation_is_undone(kind: str) -> None:
    turn = Image.Transpose
    stored = {  # how a camera that is held so stores an upright picture
        1: (),
        2: (turn.FLIP_LEFT_RIGHT,),
        3: (turn.ROTATE_180,),
        4: (turn.FLIP_TOP_BOTTOM,),
        5: (turn.TRANSPOSE,),
        6: (turn.ROTATE_90,),
        7: (turn.TRANSVERSE,),
        8: (turn.ROTATE_270,),
    }
    for orientation, steps in stored.items():
        image = quadrants()
        for step in steps:
            image = image.transpose(step)
        exif = Image.Exif()
        exif[0x0112] = orientation
        quality = {} if kind in ("PNG", "TIFF") else {"quality": 95}
        decoded = images.decode(encoded(image, kind, exif=exif, **quality))
        assert_close(decoded, quadrants(), 12)


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
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "AVIF", "ICO", "TGA", "PPM"):
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


def test_file_that_the_system_will_not_read_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = tmp_path / "loop.png"
    loop.symlink_to(loop)
    for path, reason in ((loop, "symbolic links"), (tmp_path / ("x" * 300), "too long")):
        with pytest.raises(MediaError, match=f"cannot be read: .*{reason}"):
            images.decode(path)
    forbidden = tmp_path / "forbidden.png"
    quadrants().save(forbidden)

    def refuse(*_: object, **__: object) -> None:  # the tests may run as root, whom nothing is forbidden
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(forbidden))

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(MediaError, match=r"forbidden\.png' cannot be read: Permission denied"):
        images.decode(forbidden)


def test_header_without_width_or_height_is_refused() -> None:
    bitmap = bytearray(encoded(quadrants(), "BMP"))
    bitmap[18:22] = bytes(4)
    gif = b"GIF89a" + struct.pack("<HHBBB", 0, 0, 0, 0, 0) + b";"
    for broken in (png(0, 5, b""), png(5, 0, b""), bytes(bitmap), gif):
        with pytest.raises(MediaError) as caught:
            images.decode(broken)
        assert "\n" not in str(caught.value)
    with pytest.raises(MediaError, match="no pixels"):
        images.decode(Image.new("RGB", (0, 5)))


def test_postscript_is_not_run() -> None:
    with pytest.raises(MediaError, match="PostScript"):
        images.decode(encoded(quadrants(), "EPS"))


def test_decompression_bomb_is_refused_before_decoding() -> None:
    for side in (9_000, 12_000, 60_000):
        with pytest.raises(MediaError, match="million pixels"):
            images.decode(png(side, side, bytes(64)))


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
