"""Pictures in, tensors out: decode whatever a user hands over to an RGB tile, or say in one line why not.

Axes: N pictures, 3 channels, H and W pixels.
"""

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image as Pillow
from PIL import ImageOps, UnidentifiedImageError
from torch import Tensor

from core_llm.errors import MediaError

Picture: TypeAlias = str | Path | bytes | Pillow.Image | np.ndarray

MAX_PIXELS = 50_000_000  # a larger header is refused before a pixel of it is decoded
MEAN, DEVIATION = 0.5, 0.5  # per channel, after scaling pixels to 0..1
_BACKGROUND = (255, 255, 255)  # what a transparent pixel shows
# What Pillow's decoders raise on damaged files, each of them seen or in their code.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    zlib.error,
)


def decode(picture: Picture) -> Pillow.Image:
    """Any picture as an upright RGB image of its own size; of an animation, the first frame.

    picture: a path, the bytes of a file, a Pillow image, or uint8 numpy [H, W], [H, W, 3] or [H, W, 4].
    Raises `MediaError` that names the file where it is missing, truncated, empty, too large or no picture.
    """
    name = describe_source(picture)
    if isinstance(picture, np.ndarray):
        return to_rgb(_from_array(picture, name))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of doubtful metadata: the pixels decide
            warnings.simplefilter("error", Pillow.DecompressionBombWarning)
            image = _open(picture, name)
            _check_header(image, name)
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except (Pillow.DecompressionBombError, Pillow.DecompressionBombWarning) as error:
        raise MediaError(_too_large(name)) from error
    except UnidentifiedImageError as error:
        raise MediaError(
            f"{name} is not a picture in a format that can be read (PNG, JPEG, WebP, GIF, ...)"
        ) from error
    except FileNotFoundError as error:
        raise MediaError(f"{name} does not exist") from error
    except MemoryError as error:
        raise MediaError(f"{name} does not fit into memory") from error
    except _DECODER_ERRORS as error:
        system = getattr(error, "strerror", None)  # the system's own reason: no right to read, for one
        reason = " ".join((system or str(error) or type(error).__name__).split())
        verb = "cannot be read" if system else "is damaged or incomplete"
        raise MediaError(f"{name} {verb}: {reason}") from error


def describe_source(picture: Picture) -> str:
    """How an error message names the picture."""
    if isinstance(picture, str | Path):
        return f"image '{picture}'"
    if isinstance(picture, bytes):
        return f"image (given as {len(picture)} bytes)"
    if isinstance(picture, np.ndarray):
        return f"image (given as an array of shape {list(picture.shape)})"
    if isinstance(picture, Pillow.Image):
        filename = getattr(picture, "filename", "")
        return f"image '{filename}'" if filename else "image (given as a Pillow image)"
    raise MediaError(
        f"an image is a path, bytes, a Pillow image or a numpy array, not {type(picture).__name__}"
    )


def _open(picture: str | Path | bytes | Pillow.Image, name: str) -> Pillow.Image:
    if isinstance(picture, Pillow.Image):
        return picture
    if isinstance(picture, bytes):
        if not picture:
            raise MediaError(f"{name} is empty")
        return Pillow.open(io.BytesIO(picture))
    path = Path(picture)
    if path.is_dir():
        raise MediaError(f"{name} is a folder, not a picture")
    if path.exists() and not path.is_file():
        raise MediaError(f"{name} is not an ordinary file")
    if path.is_file() and path.stat().st_size == 0:
        raise MediaError(f"{name} is empty")
    return Pillow.open(path)


def _check_header(image: Pillow.Image, name: str) -> None:
    if image.format == "EPS":  # a program: Pillow would have Ghostscript run it
        raise MediaError(f"{name} is PostScript, which is not run here; convert it to PNG first")
    if image.width == 0 or image.height == 0:
        raise MediaError(f"{name} has no pixels ({image.width} x {image.height})")
    if image.width * image.height > MAX_PIXELS:
        raise MediaError(_too_large(name))


def _too_large(name: str) -> str:
    return f"{name} has more than {MAX_PIXELS // 1_000_000} million pixels; scale it down first"


def _from_array(pixels: np.ndarray, name: str) -> Pillow.Image:
    shaped = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4))
    if pixels.dtype != np.uint8 or not shaped:
        raise MediaError(f"{name} of type {pixels.dtype} is not a picture; give uint8 [height, width, 3]")
    if pixels.size == 0:
        raise MediaError(f"{name} has no pixels")
    if pixels.shape[0] * pixels.shape[1] > MAX_PIXELS:
        raise MediaError(_too_large(name))
    return Pillow.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels))


def to_rgb(image: Pillow.Image) -> Pillow.Image:
    """Any mode → RGB: 16-bit greys are scaled, not clipped; transparency shows white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = _scaled_grey(image)
    if image.mode == "La":  # Pillow converts it to nothing but this
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Pillow.new("RGBA", image.size, (*_BACKGROUND, 255))
        return Pillow.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def _scaled_grey(image: Pillow.Image) -> Pillow.Image:
    """Greys of 16 or 32 bits, or floats in 0..1 or 0..255, as 8 bits; with alpha where one is transparent."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    if image.mode == "F":
        scale = 255.0 if values.max(initial=0.0) <= 1.0 else 1.0
    else:
        scale = 1 / 257 if image.mode.startswith("I;16") or values.max(initial=0.0) > 255 else 1.0
    grey = Pillow.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:
        alpha = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
        grey.putalpha(Pillow.fromarray(alpha))
    return grey


def fit_size(width: int, height: int, size: int) -> tuple[int, int]:
    """Width and height in pixels of a picture fitted into a square of `size`, its proportions kept."""
    scale = size / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def tile(image: Pillow.Image, size: int) -> Tensor:
    """An RGB image → normalised fp32 [3, size, size], exactly zero where it does not reach right and bottom.

    Bilinear without distortion, as the released vision models prepare their tiles.
    """
    width, height = fit_size(image.width, image.height, size)
    if (width, height) != image.size:
        image = image.resize((width, height), Pillow.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255
    out = torch.zeros(3, size, size)
    out[:, :height, :width] = (pixels - MEAN) / DEVIATION
    return out


def tiles(pictures: list[Picture], size: int) -> Tensor:
    """Pictures → fp32 [N, 3, size, size]. Raises `MediaError` that names the first unreadable one."""
    if not pictures:
        return torch.zeros(0, 3, size, size)
    return torch.stack([tile(decode(picture), size) for picture in pictures])
