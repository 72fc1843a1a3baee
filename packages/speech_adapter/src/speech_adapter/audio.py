"""Audio from files, bytes or arrays to what the encoder hears: 16 kHz mono float32."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np

from core_llm.errors import MediaError

SAMPLE_RATE = 16_000  # samples per second, of everything behind `decode`
_FORMATS = "WAV, FLAC, OGG, Opus or MP3"
_STREAMED = (0, 0x7FFFFFFF, 0xFFFFFFFF)  # data sizes that a streaming writer leaves in a WAV header


def decode(data: str | Path | bytes | np.ndarray, rate: int | None = None) -> np.ndarray:
    """Decode audio to 16 kHz mono float32 samples [N], N > 0.

    data: a path, an encoded file as bytes, or samples [N] or [N, channels] (float in -1 to 1, or integers)
    with their `rate` in Hz. Silence is valid audio. Raises MediaError, naming the file, when the file is
    missing, empty, cut off or no audio.
    """
    if isinstance(data, np.ndarray):
        return _from_array(data, rate)
    if isinstance(data, (bytes, bytearray, memoryview)):
        return _from_bytes(bytes(data), "the given audio bytes")
    if not isinstance(data, (str, Path)):
        raise MediaError(f"audio must be a path, bytes or a numpy array, not {type(data).__name__}")
    path = Path(data)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise MediaError(f"{path}: no such audio file") from None
    except IsADirectoryError:
        raise MediaError(f"{path}: is a folder, not an audio file") from None
    except (OSError, ValueError) as error:
        raise MediaError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    return _from_bytes(content, str(path))


def _from_bytes(content: bytes, name: str) -> np.ndarray:
    import soundfile

    if not content:
        raise MediaError(f"{name}: empty, not an audio file")
    _refuse_truncated_wav(content, name)
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            promised, rate = file.frames, file.samplerate
            samples = file.read(dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, MemoryError, ValueError):
        raise MediaError(f"{name}: not a readable audio file (expected {_FORMATS})") from None
    # Compressed formats only estimate their length; lossless ones know it.
    if len(samples) < promised and content[:4] == b"fLaC":
        raise MediaError(f"{name}: cut off, {len(samples)} of {promised} samples are there")
    return _finish(samples, rate, name)


def _refuse_truncated_wav(content: bytes, name: str) -> None:
    """libsndfile silently shortens a WAV whose data ends early; half a question is a wrong question."""
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        return
    position = 12
    while position + 8 <= len(content):
        kind, size = struct.unpack_from("<4sI", content, position)
        position += 8
        if kind == b"data":
            present = len(content) - position
            if size not in _STREAMED and present < size:
                raise MediaError(f"{name}: cut off, {present} of {size} bytes of audio are there")
            return
        position += size + size % 2
    raise MediaError(f"{name}: cut off before its audio begins")


def _from_array(samples: np.ndarray, rate: int | None) -> np.ndarray:
    name = "the given audio array"
    if rate is None:
        raise MediaError(f"{name}: give its sample rate in Hz as `rate`")
    if samples.ndim not in (1, 2):
        raise MediaError(f"{name}: expected shape [N] or [N, channels], got {list(samples.shape)}")
    if samples.size == 0:
        raise MediaError(f"{name}: holds no audio samples")
    if np.issubdtype(samples.dtype, np.signedinteger):
        scale = float(np.iinfo(samples.dtype).max) + 1.0
        samples = (samples / scale).astype(np.float32)
    elif not np.issubdtype(samples.dtype, np.floating):
        raise MediaError(f"{name}: expected float or signed integer samples, got {samples.dtype}")
    return _finish(samples.reshape(len(samples), -1), rate, name)


def _finish(samples: np.ndarray, rate: int, name: str) -> np.ndarray:
    """[N, channels] at `rate` → [N'] at 16 kHz."""
    if samples.size == 0:
        raise MediaError(f"{name}: holds no audio samples")
    if rate <= 0:
        raise MediaError(f"{name}: sample rate {rate} Hz is impossible")
    mono = samples.mean(axis=1, dtype=np.float32)
    if not np.isfinite(mono).all():
        raise MediaError(f"{name}: holds samples that are not finite numbers")
    mono = resample(mono, rate, SAMPLE_RATE)
    if mono.size == 0:
        raise MediaError(f"{name}: too short to hold audio ({len(samples)} samples at {rate} Hz)")
    return mono


def resample(samples: np.ndarray, source: float, target: float) -> np.ndarray:
    """Change the sample rate of float32 mono samples [N]; a copy is made only when the rates differ."""
    if source == target:
        return np.ascontiguousarray(samples, dtype=np.float32)
    import soxr

    return soxr.resample(samples.astype(np.float32, copy=False), source, target)
