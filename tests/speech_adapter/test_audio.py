import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from core_llm.errors import MediaError
from speech_adapter.audio import SAMPLE_RATE, decode
from speech_adapter.testing import chirp


def encoded(samples: np.ndarray, rate: int, **options: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG", "MP3"])
def test_every_container_decodes_to_16_khz_mono(container: str) -> None:
    samples = chirp(1.0, 44_100)
    decoded = decode(encoded(np.stack([samples, samples], axis=1), 44_100, format=container))
    assert decoded.dtype == np.float32 and decoded.ndim == 1
    assert abs(len(decoded) - SAMPLE_RATE) < SAMPLE_RATE * 0.1


def test_path_bytes_and_array_give_the_same_samples(tmp_path: Path) -> None:
    samples = chirp(0.5, 8_000)
    content = encoded(samples, 8_000, format="WAV", subtype="FLOAT")
    path = tmp_path / "clip.wav"
    path.write_bytes(content)
    np.testing.assert_array_equal(decode(path), decode(content))
    np.testing.assert_array_equal(decode(str(path)), decode(samples, 8_000))


def test_resampling_keeps_a_sine_a_sine() -> None:
    time8, time16 = np.arange(8_000) / 8_000, np.arange(16_000) / 16_000
    decoded = decode(np.sin(2 * np.pi * 440 * time8).astype(np.float32), 8_000)
    expected = np.sin(2 * np.pi * 440 * time16)
    assert np.abs(decoded[1000:-1000] - expected[1000:-1000]).max() < 1e-3


def test_integer_samples_are_scaled_to_one() -> None:
    decoded = decode(np.array([16384, -16384] * 800, dtype=np.int16), 16_000)
    np.testing.assert_allclose(np.abs(decoded), 0.5, atol=1e-4)


def test_silence_is_valid_audio() -> None:
    decoded = decode(encoded(np.zeros(1600, dtype=np.float32), 16_000, format="WAV"))
    assert len(decoded) == 1600 and not decoded.any()


def bad_files(folder: Path) -> dict[str, Path]:
    whole = encoded(chirp(1.0), 16_000, format="WAV")
    flac = encoded(chirp(1.0), 16_000, format="FLAC")
    contents = {
        "empty.wav": b"",
        "noise.wav": bytes(range(256)) * 20,
        "text.mp3": b"this is not audio\n" * 50,
        "cut.wav": whole[: len(whole) // 2],
        "header_only.wav": whole[:30],
        "cut.flac": flac[: len(flac) // 2],
        "no_samples.wav": encoded(np.zeros(0, dtype=np.float32), 16_000, format="WAV"),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in [*contents, "missing.wav"]} | {"folder": folder}


def test_every_bad_file_is_one_line_that_names_it(tmp_path: Path) -> None:
    for name, path in bad_files(tmp_path).items():
        with pytest.raises(MediaError) as error:
            decode(path)
        assert str(path) in str(error.value), name
        assert "\n" not in str(error.value), name


@pytest.mark.parametrize(
    "samples, rate",
    [
        (np.zeros(100, dtype=np.float32), None),
        (np.zeros(100, dtype=np.float32), 0),
        (np.zeros(0, dtype=np.float32), 16_000),
        (np.full(100, np.nan, dtype=np.float32), 16_000),
        (np.zeros((2, 3, 4), dtype=np.float32), 16_000),
        (np.zeros(100, dtype=bool), 16_000),
    ],
)
def test_bad_arrays_are_refused(samples: np.ndarray, rate: int | None) -> None:
    with pytest.raises(MediaError):
        decode(samples, rate)


def test_other_types_are_refused() -> None:
    with pytest.raises(MediaError, match="path, bytes or a numpy array"):
        decode(42)  # type: ignore[arg-type]
