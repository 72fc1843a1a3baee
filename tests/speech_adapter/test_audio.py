import io
import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core_llm.adapters import Assistant
from core_llm.chat import Audio
from core_llm.checkpoint import load_core
from core_llm.errors import MediaError
from speech_adapter.adapter import load
from speech_adapter.audio import SAMPLE_RATE, blocks, decode
from speech_adapter.testing import chirp
from speech_adapter.transcribe import recognition_request

SAMPLES = Path(__file__).parents[2] / "evals" / "samples"


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


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 96_000])
def test_blocks_resample_as_one_pass_does(rate: int) -> None:
    samples = np.random.default_rng(0).standard_normal(700_000).astype(np.float32)
    parts = list(blocks(samples, rate))
    assert len(parts) > 1 and all(len(part) for part in parts)
    np.testing.assert_array_equal(np.concatenate(parts), soxr.resample(samples, rate, SAMPLE_RATE))


_NARROW = pytest.mark.xfail(
    strict=True, reason="without what lies above 4 kHz the bundled weights hear this clip's 'eight' as 'six'"
)
# Every container, sample format, rate and channel count at least once.
LAYOUTS = [
    pytest.param("WAV", "PCM_U8", 8_000, 1, marks=_NARROW),
    ("WAV", "PCM_16", 11_025, 2),
    ("WAV", "PCM_24", 22_050, 6),
    ("WAV", "PCM_32", 96_000, 6),
    ("WAV", "FLOAT", 48_000, 2),
    ("WAV", "DOUBLE", 32_000, 1),
    ("FLAC", "PCM_16", 96_000, 6),
    ("FLAC", "PCM_24", 44_100, 2),
    ("OGG", "VORBIS", 96_000, 6),
    pytest.param("OGG", "OPUS", 8_000, 1, marks=_NARROW),
    ("OGG", "OPUS", 48_000, 6),
    pytest.param("MP3", "MPEG_LAYER_III", 8_000, 2, marks=_NARROW),
    ("MP3", "MPEG_LAYER_III", 44_100, 1),
]


class Heard(NamedTuple):
    text: Callable[[Path | bytes], str]
    said: str
    samples: np.ndarray


@pytest.fixture(scope="module")
def heard() -> Heard:
    """The bundled model's ears, and a clip of several digits that they hear right."""
    core, tokenizer = load_core("nano")
    assistant = Assistant(core, tokenizer, [load("nano", core)])
    clip = next(
        row for row in json.loads((SAMPLES / "clips.json").read_text())["digits"] if len(row["text"]) > 15
    )

    def text(data: Path | bytes) -> str:
        return assistant.generate([recognition_request(Audio(data))])[0].strip()

    assert text(SAMPLES / clip["file"]) == clip["text"]
    return Heard(text, clip["text"], decode(SAMPLES / clip["file"]))


@pytest.mark.parametrize(("container", "subtype", "rate", "channels"), LAYOUTS)
def test_the_same_words_in_every_format_rate_and_channel_layout(
    heard: Heard,
    container: str,
    subtype: str,
    rate: int,
    channels: int,
) -> None:
    played = soxr.resample(heard.samples, SAMPLE_RATE, rate)
    content = encoded(np.stack([played] * channels, axis=1), rate, format=container, subtype=subtype)
    assert heard.text(content) == heard.said


def test_the_same_words_where_it_is_overdriven(heard: Heard) -> None:
    loud = np.clip(heard.samples * 8 / np.abs(heard.samples).max(), -1, 1)
    content = encoded(loud, SAMPLE_RATE, format="WAV")
    assert heard.text(content) == heard.said


def test_the_extension_of_a_name_does_not_matter(tmp_path: Path) -> None:
    samples = chirp(0.3)
    for name in ("clip.raw", "clip.mp3", "clip.txt", "clip"):
        (tmp_path / name).write_bytes(encoded(samples, 16_000, format="FLAC", subtype="PCM_24"))
        np.testing.assert_allclose(decode(tmp_path / name), samples, atol=1e-6)


def test_a_longer_file_is_refused_without_decoding_it_all(tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    path.write_bytes(encoded(np.zeros(3 * 8_000, dtype=np.float32), 8_000, format="WAV"))
    assert len(decode(path, max_seconds=3.0)) == 3 * SAMPLE_RATE
    with pytest.raises(MediaError, match=f"{path}: longer than the limit of 2 s"):
        decode(path, max_seconds=2.0)


def wav_header(data_bytes: int, rate: int, channels: int) -> bytes:
    block = 2 * channels
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, channels, rate, rate * block, block, 16)
    riff = struct.pack("<4sI4s", b"RIFF", min(data_bytes + 36, 0xFFFFFFFF), b"WAVE")
    return riff + form + struct.pack("<4sI", b"data", data_bytes)


def test_ten_minutes_at_96_khz_pass_through_in_constant_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    size = 600 * 96_000 * 2
    with path.open("wb") as file:
        file.write(wav_header(size, 96_000, 1))
        file.truncate(44 + size)  # sparse: 115 MB of silence that no disk holds
    tracemalloc.start()
    total = sum(len(block) for block in blocks(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 600 * SAMPLE_RATE
    assert peak < 12e6


def test_huge_claims_of_a_header_cost_nothing() -> None:
    content = encoded(chirp(0.2), 16_000, format="WAV")[44:]
    flac = bytearray(encoded(chirp(0.2), 16_000, format="FLAC"))
    flac[21] |= 0x0F  # the 36-bit number of samples in STREAMINFO
    flac[22:26] = b"\xff" * 4
    tracemalloc.start()
    for claim in (
        wav_header(0xFFFFFFF0, 16_000, 1) + content,
        wav_header(len(content), 16_000, 30_000) + content,
        wav_header(len(content), 0xFFFFFFF, 1) + content,
        wav_header(len(content), 1, 1) + content,
        bytes(flac),
    ):
        with pytest.raises(MediaError):
            decode(claim)
    assert tracemalloc.get_traced_memory()[1] < 12e6
    tracemalloc.stop()
    # A recorder that could not go back leaves this size; what is there is all there is.
    assert len(decode(wav_header(0xFFFFFFFF, 16_000, 1) + content)) == len(content) // 2


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_impossible_samples_are_refused(value: float) -> None:
    samples = chirp(0.2)
    samples[1000] = value
    with pytest.raises(MediaError, match="finite|full scale"):
        decode(encoded(samples, 16_000, format="WAV", subtype="FLOAT"))


WHOLE = {
    name: encoded(chirp(0.25), 16_000, format=container, subtype=subtype)
    for name, container, subtype in (
        ("wav", "WAV", "PCM_16"),
        ("float wav", "WAV", "FLOAT"),
        ("flac", "FLAC", "PCM_16"),
        ("vorbis", "OGG", "VORBIS"),
        ("opus", "OGG", "OPUS"),
        ("mp3", "MP3", "MPEG_LAYER_III"),
    )
}
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@QUICK
@given(st.sampled_from(sorted(WHOLE)), st.floats(0, 1, exclude_max=True))
def test_a_cut_file_is_never_half_a_question(name: str, share: float) -> None:
    content = WHOLE[name][: int(len(WHOLE[name]) * share)]
    with pytest.raises(MediaError) as error:
        decode(content)
    assert "\n" not in str(error.value)


@QUICK
@given(
    st.sampled_from(sorted(WHOLE)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=20),
)
def test_a_damaged_file_is_audio_or_one_clear_error(name: str, flips: list[tuple[float, int]]) -> None:
    content = bytearray(WHOLE[name])
    for where, value in flips:
        content[int(where * len(content))] = value
    try:
        samples = decode(bytes(content))
    except MediaError as error:
        assert "\n" not in str(error)
    else:
        assert samples.dtype == np.float32 and samples.ndim == 1 and len(samples)
        assert np.isfinite(samples).all()


@QUICK
@given(
    st.sampled_from([b"", b"RIFF", b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"FORM"]), st.binary(max_size=400)
)
def test_bytes_that_are_no_audio_are_refused(head: bytes, rest: bytes) -> None:
    with pytest.raises(MediaError):
        decode(head + rest)
