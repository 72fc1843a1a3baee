import pytest
import torch

from core_llm.chat import Audio
from core_llm.errors import UserError
from speech_adapter.adapter import SpeechAdapter, SpeechInputs
from speech_adapter.chunks import Chunking
from speech_adapter.conformer import Conformer, ConformerLayer, MacaronFeedForward, RotaryAttention
from speech_adapter.testing import chirp


def turned(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary embedding spelled out on [S, H, D]."""
    half = x.shape[-1] // 2
    angles = positions[:, None].double() / 10_000.0 ** (torch.arange(half).double() / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attended(layer: RotaryAttention, x: torch.Tensor, before: list[torch.Tensor], at: int) -> torch.Tensor:
    """The block x [S, C] that begins at frame `at`, behind the inputs `before`, by a plain softmax."""
    seen = torch.stack([*before, *x])
    heads = lambda y: y.unflatten(-1, (-1, layer.head_dim))  # noqa: E731
    k, v = (heads(part) for part in layer.qkv(layer.norm(seen)).chunk(3, -1)[1:])
    q = heads(layer.qkv(layer.norm(x)).chunk(3, -1)[0])
    q = turned(q, torch.arange(at, at + len(x)))
    k = turned(k, torch.arange(at - len(before), at + len(x)))
    scores = torch.einsum("qhd,khd->hqk", q, k) / layer.head_dim**0.5
    return layer.out(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1))


def convolved(layer: torch.nn.Module, x: torch.Tensor, before: list[torch.Tensor]) -> torch.Tensor:
    """A convolution whose frames see `before` and the block, and nothing behind it."""
    gate = lambda y: torch.nn.functional.glu(layer.gated(layer.norm(y)), -1)  # noqa: E731
    rows = [gate(y) for y in (*before, *x)]
    weight, reach = layer.depthwise.weight[:, 0].T, layer.depthwise.kernel_size[0] // 2
    out = []
    for i in range(len(before), len(rows)):
        near = [(j, rows[i + j - reach]) for j in range(2 * reach + 1) if 0 <= i + j - reach < len(rows)]
        out.append(sum(weight[j] * row for j, row in near) + layer.depthwise.bias)
    return layer.out(torch.nn.functional.silu(layer.inner_norm(torch.stack(out))))


def fed_forward(layer: MacaronFeedForward, x: torch.Tensor) -> torch.Tensor:
    """The two products of a feed-forward and what is between them, without dropout and without its weight."""
    hidden = x.sub(x.mean(-1, keepdim=True))
    hidden = hidden / (hidden.square().mean(-1, keepdim=True) + layer.norm.eps).sqrt()
    hidden = (hidden * layer.norm.weight + layer.norm.bias) @ layer.up.weight.T + layer.up.bias
    return hidden / (1 + (-hidden).exp()) @ layer.down.weight.T + layer.down.bias


def by_hand(encoder: Conformer, x: torch.Tensor, chunking: Chunking) -> torch.Tensor:
    """Frames [S, C] through all layers, block by block, as the module's docstring describes it."""
    kept: list[dict[str, list[torch.Tensor]]] = [{"a": [], "c": []} for _ in encoder.layers]
    done = []
    for at in range(0, len(x), chunking.chunk):
        block = x[at : at + chunking.width]
        n = min(chunking.chunk, len(block))
        for layer, past in zip(encoder.layers, kept, strict=True):
            assert isinstance(layer, ConformerLayer)
            block = block + 0.5 * fed_forward(layer.first, block)
            back = past["a"][-chunking.look_back :] if chunking.look_back else []
            past["a"] += block[:n]
            block = block + attended(layer.attention, block, back, at)
            back = past["c"][-3:]
            past["c"] += block[:n]
            block = block + convolved(layer.convolution, block, back)
            block = layer.norm(block + 0.5 * fed_forward(layer.second, block))
        done.append(block[:n])
    return torch.cat(done)


@torch.no_grad()
@pytest.mark.parametrize("times", [(160, 80, 240), (80, 0, 0), (80, 240, 80), (320, 160, 0), (800, 0, 1600)])
def test_all_blocks_at_once_equal_one_after_the_other_by_hand(
    adapter: SpeechAdapter, times: tuple[int, int, int]
) -> None:
    adapter = adapter.double()
    features = torch.randn(1, 92, 80, dtype=torch.float64).clamp(-1, 1)
    chunking = Chunking.of_ms(*times)
    memory = adapter.encode(SpeechInputs(features, torch.tensor([92])), chunking)
    encoder = adapter.encoder
    assert isinstance(encoder, Conformer)
    expected = by_hand(encoder, encoder.project(features[0].reshape(23, 320)), chunking)
    torch.testing.assert_close(memory.hidden[0], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_chunk_as_long_as_the_clip_is_the_plain_pass(adapter: SpeechAdapter) -> None:
    parts = [Audio(chirp(s, seed=i), 16_000) for i, s in enumerate((0.4, 1.3, 0.05))]
    plain = adapter.encode(adapter.preprocess(parts))
    for raw in (True, False):
        whole = adapter.encode(adapter.preprocess(parts, raw=raw), Chunking.of_ms(2_000, 0, 0))
        for a, b, n in zip(whole.vectors, plain.vectors, plain.lengths.tolist(), strict=True):
            torch.testing.assert_close(a[:n], b[:n], atol=1e-5, rtol=1e-5)
    raw_inputs = adapter.preprocess(parts, raw=True)
    torch.testing.assert_close(adapter.encode(raw_inputs).vectors, plain.vectors, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_batch_in_chunks_equals_its_clips_one_by_one(adapter: SpeechAdapter) -> None:
    chunking = Chunking.of_ms(160, 80, 240)
    parts = [Audio(chirp(s, seed=i), 16_000) for i, s in enumerate((0.4, 1.3, 0.05))]
    inputs = adapter.preprocess(parts, raw=True)
    for row, n in zip(inputs.log_mel, inputs.frames.tolist(), strict=True):
        row[n:] = float("nan")
    together = adapter.place(adapter.encode(inputs, chunking))
    for part, batched in zip(parts, together, strict=True):
        (alone,) = adapter.place(adapter.encode(adapter.preprocess([part], raw=True), chunking))
        torch.testing.assert_close(batched, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_nothing_depends_on_what_comes_behind_the_look_ahead(adapter: SpeechAdapter) -> None:
    chunking = Chunking.of_ms(160, 80, 240)
    samples = chirp(2.0)
    louder = samples.copy()
    louder[16_000:] *= 3.0
    before, after = (
        adapter.encode(adapter.preprocess([Audio(s, 16_000)], raw=True), chunking) for s in (samples, louder)
    )
    # 1 s and the edge of 160 ms are 29 frames; blocks of 6 that begin every 4 end before that up to frame 24.
    torch.testing.assert_close(before.hidden[:, :20], after.hidden[:, :20], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before.hidden[:, 28:], after.hidden[:, 28:], atol=1e-3)


def test_chunked_passes_train_every_parameter_of_the_encoder(adapter: SpeechAdapter) -> None:
    inputs = adapter.preprocess([Audio(chirp(1.0), 16_000)])
    adapter.train().encode(inputs, Chunking.of_ms(160, 80, 240)).vectors.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.encoder.parameters())


@pytest.mark.parametrize("times", [(0, 80, 80), (100, 80, 80), (160, -80, 80), (160, 80, 50)])
def test_impossible_times_are_one_line(times: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match="multiples of 80"):
        Chunking.of_ms(*times)
