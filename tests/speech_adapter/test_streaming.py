import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core_llm.chat import Audio
from core_llm.errors import UserError
from core_llm.testing import tiny_core
from speech_adapter.adapter import SpeechAdapter
from speech_adapter.chunks import Chunking
from speech_adapter.config import SpeechConfig
from speech_adapter.features import log_mel
from speech_adapter.streaming import FrameStream, StreamingEncoder
from speech_adapter.testing import chirp, small_config

MS = st.integers(0, 6).map(lambda n: 80 * n)


@pytest.fixture(scope="module")
def adapter() -> SpeechAdapter:
    torch.manual_seed(0)
    return SpeechAdapter(small_config(merge=False), tiny_core()[0].embed_tokens.weight).eval()


def clip(n: int, seed: int = 0) -> np.ndarray:
    """A chirp that grows louder, so that the running level moves."""
    samples = chirp(n / 16_000 + 0.01, seed=seed)[:n]
    return samples * np.linspace(0.05, 1.0, n, dtype=np.float32)


def fed(stream: StreamingEncoder, samples: np.ndarray, cuts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    heard = [h for piece in np.split(samples, sorted(cuts)) for h in stream.feed(piece)] + stream.finish()
    return torch.cat([h.hidden for h in heard]), torch.cat([h.vectors for h in heard])


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40_000), chunk=MS.filter(bool), ahead=MS, back=MS, data=st.data())
def test_any_split_of_the_samples_gives_the_full_pass_under_the_same_chunks(
    adapter: SpeechAdapter, n: int, chunk: int, ahead: int, back: int, data: st.DataObject
) -> None:
    samples = clip(n)
    cuts = data.draw(st.lists(st.integers(0, n), max_size=6))
    hidden, vectors = fed(StreamingEncoder(adapter, chunk, ahead, back), samples, cuts)
    with torch.no_grad():
        inputs = adapter.preprocess([Audio(samples, 16_000)], raw=True)
        full = adapter.encode(inputs, Chunking.of_ms(chunk, ahead, back))
    assert hidden.shape == full.hidden[0].shape and vectors.shape == full.vectors[0].shape
    torch.testing.assert_close(hidden, full.hidden[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vectors, full.vectors[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_chunk_is_out_as_soon_as_its_look_ahead_is_in(adapter: SpeechAdapter) -> None:
    stream = StreamingEncoder(adapter, chunk_ms=320, look_ahead_ms=160, look_back_ms=640)
    came = []
    for i in range(200):
        for heard in stream.feed(clip(32_000)[i * 160 : (i + 1) * 160]):
            came.append(((i + 1) / 100, heard.start))
    assert [round(start, 3) for _, start in came] == [round(-0.16 + 0.32 * k, 3) for k in range(len(came))]
    # The last frame of a block needs half a window of 25 ms more, and pieces are of 10 ms.
    assert came and all(0 <= at - (start + 0.48) <= 0.021 for at, start in came)


@torch.no_grad()
def test_what_a_stream_keeps_does_not_grow(adapter: SpeechAdapter) -> None:
    stream = StreamingEncoder(adapter, chunk_ms=160, look_ahead_ms=80, look_back_ms=320)

    def kept() -> int:
        tensors = [stream._features, stream._frames._held, *stream._cache.kept.values()]
        return sum(t.untyped_storage().nbytes() for t in tensors)

    sizes = []
    for i in range(30):
        stream.feed(clip(5_120, seed=i))
        sizes.append(kept())
    assert max(sizes[3:]) == min(sizes[3:])


@torch.no_grad()
def test_a_stream_that_begins_at_a_known_level_scales_by_it(adapter: SpeechAdapter) -> None:
    samples = clip(16_000)
    quiet, loud = (StreamingEncoder(adapter, level=level) for level in (None, 5.0))
    a, b = fed(quiet, samples, []), fed(loud, samples, [])
    assert loud.level == 5.0 and quiet.level < 5.0
    assert not torch.allclose(a[0], b[0], atol=1e-3)


def test_frames_in_pieces_are_log_mels() -> None:
    samples = torch.from_numpy(clip(9_999))
    stream = FrameStream(80)
    pieces = [stream.feed(piece) for piece in samples.split([1, 199, 1, 700, 3_000, 6_098])]
    whole = torch.cat([*pieces, stream.finish()])[: len(samples) // 160]
    torch.testing.assert_close(whole, log_mel(samples), atol=1e-5, rtol=1e-5)


def test_silence_nothing_and_misuse(adapter: SpeechAdapter) -> None:
    stream = StreamingEncoder(adapter)
    assert stream.feed(np.zeros(0, np.float32)) == [] and stream.finish() == []
    with pytest.raises(RuntimeError, match="finished"):
        stream.feed(np.zeros(1, np.float32))
    hidden, vectors = fed(StreamingEncoder(adapter), np.zeros(9_000, np.float32), [])
    assert torch.isfinite(hidden).all() and torch.isfinite(vectors).all()
    with pytest.raises(UserError, match="multiples of 80"):
        StreamingEncoder(adapter, chunk_ms=100)
    config = SpeechConfig(64, dim=32, n_layers=1, n_heads=2, encoder="whisper")
    with pytest.raises(UserError, match="Whisper"):
        StreamingEncoder(SpeechAdapter(config, torch.zeros(16, 64)))
