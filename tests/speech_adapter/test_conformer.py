import pytest
import torch

from core_llm.rope import inverse_frequencies, rotations
from speech_adapter.config import SpeechConfig
from speech_adapter.conformer import Conformer, ConformerLayer, MacaronFeedForward, RotaryAttention
from speech_adapter.testing import small_config


def rotation(length: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return rotations(torch.arange(length)[None], inverse_frequencies(head_dim, 10_000.0), torch.float32)


@torch.no_grad()
def test_attention_equals_a_plain_float64_softmax() -> None:
    torch.manual_seed(0)
    layer = RotaryAttention(8, n_heads=1, dropout=0.0).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    cos, sin = (part.double() for part in rotation(5, 8))
    real = torch.tensor([[True, True, True, False, False]])
    q, k, v = layer.qkv(layer.norm(x)).chunk(3, dim=-1)

    def turned(vectors: torch.Tensor) -> torch.Tensor:
        half = torch.cat((-vectors[..., 4:], vectors[..., :4]), dim=-1)
        return vectors * cos[:, 0] + half * sin[:, 0]

    scores = turned(q) @ turned(k).transpose(1, 2) / 8**0.5
    weights = scores.masked_fill(~real[:, None], float("-inf")).softmax(-1)
    expected = x + layer.out(weights @ v)
    torch.testing.assert_close(layer.eval().add_to(x, (cos, sin), real), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("gradients", [True, False])
def test_feed_forwards_around_attention_and_convolution_weigh_one_half(gradients: bool) -> None:
    torch.manual_seed(0)
    layer = ConformerLayer(small_config()).double().eval()
    x = torch.randn(2, 5, layer.norm.normalized_shape[0], dtype=torch.float64)
    cos, sin = (part.double() for part in rotation(5, layer.attention.head_dim))
    # Of attention and convolution nothing is left: two halves and a norm.
    for out in (layer.attention.out, layer.convolution.out):
        torch.nn.init.zeros_(out.weight)
    torch.nn.init.zeros_(layer.convolution.out.bias)

    def plain(part: MacaronFeedForward, x: torch.Tensor) -> torch.Tensor:
        hidden = part.norm(x) @ part.up.weight.T + part.up.bias
        return (hidden * hidden.sigmoid()) @ part.down.weight.T + part.down.bias

    half = x + plain(layer.first, x) / 2
    expected = layer.norm(half + plain(layer.second, half) / 2)
    with torch.set_grad_enabled(gradients):
        found = layer(x.clone(), (cos, sin), None)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


@torch.no_grad()
def test_padding_reaches_no_real_frame() -> None:
    torch.manual_seed(0)
    config = small_config()
    encoder = Conformer(config, n_mels=80).eval()
    features = torch.randn(1, 40, 80)
    real = torch.ones(1, 10, dtype=torch.bool)
    alone = encoder(features, rotation(10, 16), real)
    padded = torch.cat((features, torch.randn(1, 24, 80) * 100), dim=1)
    wide = encoder(padded, rotation(16, 16), torch.cat((real, ~real[:, :6]), dim=1))
    torch.testing.assert_close(wide[:, :10], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_position_matters_only_relatively() -> None:
    torch.manual_seed(0)
    layer = RotaryAttention(16, n_heads=2, dropout=0.0)
    x, real = torch.randn(1, 6, 16), torch.ones(1, 6, dtype=torch.bool)
    frequencies = inverse_frequencies(8, 10_000.0)
    at_zero = layer.add_to(x.clone(), rotations(torch.arange(6)[None], frequencies, torch.float32), real)
    later = layer.add_to(x.clone(), rotations(torch.arange(100, 106)[None], frequencies, torch.float32), real)
    torch.testing.assert_close(at_zero, later, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("values", [{"n_heads": 5}, {"kernel": 6}])
def test_impossible_sizes_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        SpeechConfig(64, **values)  # type: ignore[arg-type]
