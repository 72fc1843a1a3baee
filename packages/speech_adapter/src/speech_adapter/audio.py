"""Audio from files, bytes or arrays to what the encoder hears: 16 kHz mono float32, block by block.

libsndfile (bundled with soundfile) reads the containers and soxr changes the rate, both in blocks of bounded
size: an hour at 96 kHz and six channels is never in memory at once.
"""

from __future__ import annotations

import io
import os
import stat
import struct
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from core_llm.errors import MediaError

if TYPE_CHECKING:
    import soundfile

SAMPLE_RATE = 16_000  # samples per second, of everything behind `decode`
RATES = (4_000, 768_000)  # Hz, accepted; outside there is no speech, or a damaged header
_BLOCK = 1 << 18  # values (samples times channels) that are decoded at once: 1 MB
_LOUDEST = 1e12  # full scale is 1; above this the power of a frame would overflow float32
_FORMATS = "WAV, FLAC, OGG, Opus or MP3"
_CONTAINERS = {"WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF"}
_STREAMED = (0, 0x7FFFFFFF, 0xFFFFFFFF)  # data sizes that a streaming writer leaves in a WAV header
_OGG_PAGE = 27 + 255 + 255 * 255  # bytes, the longest page
_LAST_PAGE = 4  # flag of the page that ends an Ogg stream

Source = str | Path | bytes | np.ndarray


def decode(data: Source, rate: int | None = None, max_seconds: float | None = None) -> np.ndarray:
    """Decode audio to 16 kHz mono float32 samples [N], N > 0.

    data: a path, an encoded file as bytes, or samples [N] or [N, channels] (float in -1 to 1, or integers)
    with their `rate` in Hz. Channels are averaged; silence is valid. Raises MediaError, naming the file,
    when the file is missing, empty, cut off, no audio, or longer than `max_seconds` (found out without
    decoding the rest).
    """
    parts: list[np.ndarray] = []
    total = 0
    with closing(blocks(data, rate)) as stream:
        for part in stream:
            parts.append(part)
            total += len(part)
            if max_seconds is not None and total > max_seconds * SAMPLE_RATE:
                raise MediaError(f"{name_of(data)}: longer than the limit of {max_seconds:.0f} s: cut it up")
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def blocks(data: Source, rate: int | None = None) -> Generator[np.ndarray, None, None]:
    """The same samples as those of `decode`, one non-empty float32 block [n] after the other.

    Memory is bounded whatever the file's length, rate and header say. Raises MediaError as `decode` does;
    a file that is damaged in the middle fails there, after its first blocks.
    """
    if isinstance(data, np.ndarray):
        yield from _from_array(data, rate)
    elif isinstance(data, (bytes, bytearray, memoryview)):
        yield from _from_file(io.BytesIO(data), name_of(data))
    elif isinstance(data, (str, Path)):
        with _open(Path(data)) as file:
            yield from _from_file(file, name_of(data))
    else:
        raise MediaError(f"audio must be a path, bytes or a numpy array, not {type(data).__name__}")


def name_of(data: object) -> str:
    """What an error message calls a source of audio."""
    if isinstance(data, (str, Path)):
        return str(data)
    return "the given audio array" if isinstance(data, np.ndarray) else "the given audio bytes"


def _open(path: Path) -> BinaryIO:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise MediaError(f"{path}: is a folder, not an audio file")
        if not stat.S_ISREG(mode):
            raise MediaError(f"{path}: is a device or pipe, not an audio file")
        # Opened by number: libsndfile would otherwise believe the extension of the name (.raw).
        return open(os.open(path, os.O_RDONLY), "rb")
    except FileNotFoundError:
        raise MediaError(f"{path}: no such audio file") from None
    except (OSError, ValueError) as error:
        raise MediaError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _from_file(file: BinaryIO, name: str) -> Iterator[np.ndarray]:
    import soundfile

    head = file.read(12)
    if not head:
        raise MediaError(f"{name}: empty, not an audio file")
    refuse = _TRUNCATION_CHECKS.get(head[:4])
    if refuse is not None:
        refuse(file, name)
    elif head[:3] == b"ID3" or (len(head) > 1 and head[0] == 0xFF and head[1] >= 0xE0):
        _refuse_truncated_mp3(file, name)
    file.seek(0)
    try:
        with soundfile.SoundFile(file) as sound:
            if sound.format not in _CONTAINERS:
                raise MediaError(f"{name}: not a readable audio file (expected {_FORMATS})")
            yield from _to_16_khz(_read(sound, name), sound.samplerate, name)
    except (soundfile.SoundFileError, RuntimeError, MemoryError, ValueError, TypeError, OSError):
        raise MediaError(f"{name}: not a readable audio file (expected {_FORMATS})") from None


def _read(sound: soundfile.SoundFile, name: str) -> Iterator[np.ndarray]:
    """Blocks [n, channels] of an open file."""
    n = max(1, _BLOCK // sound.channels)
    count = 0
    while len(block := sound.read(n, dtype="float32", always_2d=True)):
        count += len(block)
        yield block
    # Compressed formats only estimate their length; lossless ones know it.
    if count < sound.frames and sound.format == "FLAC":
        raise MediaError(f"{name}: cut off, {count} of {sound.frames} samples are there")


def _refuse_truncated_wav(file: BinaryIO, name: str) -> None:
    """libsndfile silently shortens a WAV whose data ends early; half a question is a wrong question."""
    size_of_file = file.seek(0, os.SEEK_END)
    position = 12
    while position + 8 <= size_of_file:
        file.seek(position)
        kind, size = struct.unpack("<4sI", file.read(8))
        position += 8
        if kind == b"data":
            present = size_of_file - position
            if size not in _STREAMED and present < size:
                raise MediaError(f"{name}: cut off, {present} of {size} bytes of audio are there")
            return
        position += size + size % 2
    raise MediaError(f"{name}: cut off before its audio begins")


def _refuse_truncated_ogg(file: BinaryIO, name: str) -> None:
    """The last page of an Ogg stream is complete and flagged as such (RFC 3533, section 6)."""
    size_of_file = file.seek(0, os.SEEK_END)
    file.seek(max(0, size_of_file - _OGG_PAGE))
    tail = file.read()
    page = tail[max(tail.rfind(b"OggS"), 0) :]
    lengths = page[27 : 27 + page[26]] if len(page) > 26 else b""
    complete = len(page) > 26 and len(page) >= 27 + page[26] + sum(lengths)
    if not (complete and page[5] & _LAST_PAGE):
        raise MediaError(f"{name}: cut off, the end of the Ogg stream is missing")


def _refuse_truncated_mp3(file: BinaryIO, name: str) -> None:
    """Encoders note the number of bytes in a first silent frame; without it an MP3 may end anywhere."""
    size_of_file = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(10)
    start = 0
    if head[:3] == b"ID3" and len(head) == 10:
        start = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
    file.seek(start)
    frame = file.read(64)
    position = max(frame.find(b"Xing"), frame.find(b"Info"))
    if position < 0 or len(frame) < position + 16:
        return
    (flags,) = struct.unpack_from(">I", frame, position + 4)
    if flags & 2:
        (size,) = struct.unpack_from(">I", frame, position + (12 if flags & 1 else 8))
        present = size_of_file - start
        if present < size:
            raise MediaError(f"{name}: cut off, {present} of {size} bytes of audio are there")


_TRUNCATION_CHECKS = {b"RIFF": _refuse_truncated_wav, b"OggS": _refuse_truncated_ogg}


def _from_array(samples: np.ndarray, rate: int | None) -> Iterator[np.ndarray]:
    name = name_of(samples)
    if rate is None:
        raise MediaError(f"{name}: give its sample rate in Hz as `rate`")
    if samples.ndim not in (1, 2):
        raise MediaError(f"{name}: expected shape [N] or [N, channels], got {list(samples.shape)}")
    if np.issubdtype(samples.dtype, np.signedinteger):
        scale = float(np.iinfo(samples.dtype).max) + 1.0
    elif np.issubdtype(samples.dtype, np.floating):
        scale = 1.0
    else:
        raise MediaError(f"{name}: expected float or signed integer samples, got {samples.dtype}")
    if samples.size == 0:
        raise MediaError(f"{name}: holds no audio samples")
    table = samples.reshape(len(samples), -1)
    n = max(1, _BLOCK // table.shape[1])
    parts = (table[i : i + n] / scale for i in range(0, len(table), n))
    yield from _to_16_khz(parts, rate, name)


def _to_16_khz(parts: Iterator[np.ndarray], rate: int, name: str) -> Iterator[np.ndarray]:
    """Blocks [n, channels] at `rate` → non-empty blocks [n'] at 16 kHz."""
    if not RATES[0] <= rate <= RATES[1]:
        raise MediaError(f"{name}: sample rate {rate} Hz is outside {RATES[0]} to {RATES[1]} Hz")
    resampler = Resampler(rate)
    total = produced = 0
    for part in parts:
        with np.errstate(over="ignore", invalid="ignore"):
            mono = part.mean(axis=1, dtype=np.float32)
        if not np.isfinite(mono).all():
            raise MediaError(f"{name}: holds samples that are not finite numbers")
        if np.abs(mono).max() > _LOUDEST:
            raise MediaError(f"{name}: holds samples above {_LOUDEST:.0e}, full scale is 1")
        total += len(mono)
        block = resampler.feed(mono)
        produced += len(block)
        if len(block):
            yield block
    if not total:
        raise MediaError(f"{name}: holds no audio samples")
    rest = resampler.finish()
    if len(rest):
        yield rest
    elif not produced:
        raise MediaError(f"{name}: too short to hold audio ({total} samples at {rate} Hz)")


class Resampler:
    """Float32 mono blocks at `rate` Hz → blocks at 16 kHz; what comes out is what one pass would give."""

    def __init__(self, rate: float) -> None:
        self._stream = None
        if rate != SAMPLE_RATE:
            import soxr

            self._stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")

    def feed(self, samples: np.ndarray) -> np.ndarray:
        """Samples [n] → those that are certain by now [n'], n' may be 0."""
        samples = np.ascontiguousarray(samples, dtype=np.float32)
        return samples if self._stream is None else self._stream.resample_chunk(samples)

    def finish(self) -> np.ndarray:
        """The samples that were still waiting for their successors [n']."""
        empty = np.zeros(0, dtype=np.float32)
        return empty if self._stream is None else self._stream.resample_chunk(empty, last=True)
