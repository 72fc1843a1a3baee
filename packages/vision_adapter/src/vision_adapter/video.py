"""Videos in, frames out: decode a file and pick frames evenly, or say in one line why not."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image as Pillow

from core_llm.errors import MediaError, UserError
from vision_adapter.images import MAX_PIXELS, Picture, decode

Clip: TypeAlias = str | Path | bytes | Sequence[Picture]


def frames(video: Clip, n: int) -> list[Pillow.Image]:
    """n RGB frames, spread evenly from the first to the last of the video; a shorter one repeats some.

    video: a path, the bytes of a file, or frames in order. Only frames that are kept are converted; a file is
    read twice at most, where its header does not say how many frames it has.
    Raises `MediaError` that names the file where it is missing, damaged, empty or holds no picture track,
    `UserError` where PyAV is not installed.
    """
    if n < 1:
        raise ValueError(f"a video needs at least one frame, not {n}")
    if not isinstance(video, str | Path | bytes):
        if not len(video):
            raise MediaError("video (given as frames) has no frames")
        return [decode(video[i]) for i in spread(len(video), n)]
    name = f"video '{video}'" if isinstance(video, str | Path) else f"video (given as {len(video)} bytes)"
    _check_file(video, name)
    total = _count(video, name)
    if total == 0:
        raise MediaError(f"{name} has no frames")
    wanted = spread(total, n)
    last = max(wanted)
    kept: dict[int, Pillow.Image] = {}
    for index, frame in enumerate(_decoded(video, name)):
        if index in wanted:
            kept[index] = frame.to_image()
        if index == last:
            break
    return [kept[index] for index in wanted]


def spread(total: int, n: int) -> list[int]:
    """Indices of n of `total` frames, evenly from the first to the last; of one, the middle."""
    if n == 1:
        return [(total - 1) // 2]
    return [round(i * (total - 1) / (n - 1)) for i in range(n)]


def _check_file(video: str | Path | bytes, name: str) -> None:
    if isinstance(video, bytes):
        if not video:
            raise MediaError(f"{name} is empty")
        return
    path = Path(video)
    if not path.exists():
        raise MediaError(f"{name} does not exist")
    if not path.is_file():
        raise MediaError(f"{name} is not an ordinary file")
    if path.stat().st_size == 0:
        raise MediaError(f"{name} is empty")


def _count(video: str | Path | bytes, name: str) -> int:
    """Frames that can be decoded. The header's number is not trusted: a cut-off file keeps it."""
    return sum(1 for _ in _decoded(video, name))


def _decoded(video: str | Path | bytes, name: str) -> Iterator[Any]:
    try:
        import av
    except ImportError as error:
        raise UserError(
            "reading videos needs PyAV: install it (`uv pip install av`), or give frames"
        ) from error
    source = io.BytesIO(video) if isinstance(video, bytes) else str(video)
    try:
        with av.open(source, "r") as container:
            if not container.streams.video:
                raise MediaError(f"{name} has no picture track")
            stream = container.streams.video[0]
            if stream.width * stream.height > MAX_PIXELS:
                raise MediaError(
                    f"{name} has frames of {stream.width} x {stream.height} pixels; scale it down first"
                )
            yield from container.decode(stream)
    except (av.FFmpegError, EOFError, ValueError, IndexError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise MediaError(
            f"{name} is damaged or not a video that can be read: {' '.join(reason.split())}"
        ) from error
