"""FP8 against a float64 emulation that knows e4m3 only by its definition.

Axes: M activation rows, K inputs, N outputs.
"""

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from core_llm.config import LlamaConfig
from core_llm.float8 import E4M3, SCALE_BOUND, Float8Linear, quantize_rows
from core_llm.model import Llama
from core_llm.quantize import quantize


def e4m3(x: Tensor) -> Tensor:
    """Nearest e4m3 number in float64: 3 bits after the point, exponents from -6, at most 448."""
    exponent = torch.floor(torch.log2(x.abs().clamp(min=2.0**-20))).clamp(min=-6)
    step = 2 ** (exponent - 3)
    return ((x / step).round() * step).clamp(-448, 448)


def emulated(x: Tensor, weight: Tensor) -> Tensor:
    """The product of float64 tensors [M, K] and [N, K], both rounded row by row as the paper says."""
    x_scale = x.abs().amax(1, keepdim=True).clamp(max=1200) / 448
    w_scale = weight.abs().amax(1, keepdim=True) / 448
    return (e4m3(x / x_scale) * x_scale) @ (e4m3(weight / w_scale) * w_scale).T


def test_casts_agree_with_the_definition_of_e4m3() -> None:
    x = torch.cat((torch.linspace(-448, 448, 4001), torch.logspace(-12, 2, 500)))
    assert torch.equal(x.to(E4M3).double(), e4m3(x.double()))


@pytest.mark.parametrize("shape", [(1, 32, 16), (5, 48, 33), (40, 17, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_equals_the_float64_emulation(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, k, n = shape
    generator = torch.Generator().manual_seed(m)
    weight = torch.randn(n, k, generator=generator) * 0.02
    x = torch.randn(m, k, generator=generator).to(dtype)
    ours = Float8Linear.from_weight(weight)(x)
    wanted = emulated(x.double(), weight.double())
    # A quotient at the middle between two e4m3 numbers may round the other way in fp32: rare, and small.
    tolerance = 2e-3 if dtype == torch.float32 else 8e-3
    assert ours.dtype == dtype
    assert (ours.double() - wanted).norm() <= tolerance * wanted.norm()


def test_weights_are_off_by_at_most_half_a_step_of_e4m3() -> None:
    weight = torch.randn(24, 100, generator=torch.Generator().manual_seed(0))
    layer = Float8Linear.from_weight(weight)
    largest = weight.abs().amax(1, keepdim=True)
    # Relative error 2^-4 down to the smallest normal number, below it half of a fixed step.
    bound = torch.maximum(weight.abs() * 2**-4, largest / 448 * 2**-10) * (1 + 1e-5)
    assert bool(((layer.dequantized() - weight).abs() <= bound).all())


def test_an_outlier_is_cut_at_the_bound_and_spares_its_row() -> None:
    x = torch.full((2, 64), 0.3)
    x[0, 5], x[1, 5] = 1_000_000.0, 1000.0
    bounded, scale = quantize_rows(x, SCALE_BOUND)
    free, free_scale = quantize_rows(x)
    assert scale[0].item() == pytest.approx(1200 / 448)
    assert bounded[0, 5].float().item() * scale[0].item() == pytest.approx(1200)
    assert torch.equal(bounded[1].float(), free[1].float()) and scale[1] == free_scale[1]
    others = torch.arange(64) != 5
    assert bool((free[0, others].float() == 0).all())  # without the bound the whole row underflows
    restored = bounded[0, others].float() * scale[0]
    assert bool(((restored - 0.3).abs() < 0.03).all())


def test_layer_bounds_the_scales_of_activations_but_not_of_weights() -> None:
    weight = torch.eye(16) * 5000
    x = torch.zeros(1, 16)
    x[0, 0], x[0, 1] = 3000.0, 1.0
    y = Float8Linear.from_weight(weight)(x)
    assert y[0, 0].item() == pytest.approx(1200 * 5000, rel=1e-5)
    assert y[0, 1].item() == pytest.approx(5000, rel=0.07)


def test_a_row_of_zeros_gives_zeros() -> None:
    layer = Float8Linear.from_weight(torch.cat((torch.zeros(1, 32), torch.ones(1, 32))))
    x = torch.cat((torch.zeros(1, 32), torch.ones(1, 32)))
    assert torch.allclose(layer(x), torch.tensor([[0.0, 0.0], [0.0, 32.0]]), rtol=1e-6)


def test_only_feed_forward_layers_between_first_and_last_block_change() -> None:
    config = LlamaConfig(64, 4, 4, 2, 128, vocab_size=96, max_positions=64, tied_embeddings=True)
    core = Llama(config).initialise(0).eval()
    before = {name: parameter.detach().clone() for name, parameter in core.named_parameters()}
    quantize(core, "fp8")
    changed = {name for name, module in core.named_modules() if isinstance(module, Float8Linear)}
    assert changed == {f"layers.{i}.mlp.{kind}_proj" for i in (1, 2) for kind in ("gate", "up", "down")}
    left = dict(core.named_parameters())
    assert set(before) - set(left) == {f"{name}.weight" for name in changed}
    assert all(torch.equal(left[name], before[name]) for name in left)
    assert core.lm_head.weight is core.embed_tokens.weight


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
def test_torchao_rounds_activations_as_we_do() -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    x[1, 3], x[2] = 50_000.0, 0.0
    tensor = Float8Linear.from_weight(torch.ones(16, 32)).torchao_weight(torch.float32)
    asked = tensor.act_quant_kwargs  # type: ignore[attr-defined]
    theirs = type(tensor).from_hp(  # type: ignore[attr-defined]
        x, asked.float8_dtype, asked.granularity, hp_value_lb=asked.hp_value_lb, hp_value_ub=asked.hp_value_ub
    )
    values, scale = quantize_rows(x, SCALE_BOUND)
    assert torch.equal(theirs.scale[:, 0], scale)
    assert torch.equal(theirs.qdata.float(), values.float())
