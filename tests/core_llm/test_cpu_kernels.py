"""The C kernels against float64, and the door's way around them.

Axes: B batch, H query heads, G key/value heads, S keys, D head dim, T rows, N outputs, K inputs.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core_llm.kernels import Mask, attend, steps
from core_llm.kernels.cpu import build, ops

pytestmark = pytest.mark.skipif(not ops.available(), reason="no C compiler on this machine")

SHAPES = [(1, 1, 64), (2, 7, 64), (3, 33, 128), (4, 130, 192), (5, 9, 320)]  # T, N, K
BF16_STEP = 2.0**-8  # relative distance of neighbouring bf16 values, halved by rounding


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def within(out: Tensor, exact: Tensor, bound: Tensor, dtype: torch.dtype) -> bool:
    """Error at most the rounding of the result plus a share of the sum of absolute products."""
    step = BF16_STEP if dtype == torch.bfloat16 else 2.0**-23
    return bool(((out.double() - exact).abs() <= exact.abs() * step + bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_product_is_as_exact_as_fp32_sums(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    t, n, k = shape
    x, weight = random(t, k, dtype=dtype), random(n, k, dtype=torch.bfloat16)
    exact = x.double() @ weight.double().T
    bound = x.double().abs() @ weight.double().abs().T * 2.0**-20
    assert within(ops.linear_bf16(x, weight), exact, bound, dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_product_is_as_exact_as_fp32_sums(shape: tuple[int, ...]) -> None:
    t, n, k = shape
    x, weight = random(t, k), random(n, k)
    bound = x.double().abs() @ weight.double().abs().T * 2.0**-20
    assert within(ops.linear_f32(x, weight), x.double() @ weight.double().T, bound, torch.float32)


def test_large_fp32_weights_meet_few_rows_in_the_kernel_and_all_else_in_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[tuple[int, ...]] = []
    kernel = ops.linear_f32
    monkeypatch.setattr(ops, "linear_f32", lambda x, w: called.append(tuple(x.shape)) or kernel(x, w))
    large, small = random(512, 512), random(64, 64)
    for x, weight in ((random(1, 4, 512), large), (random(5, 512), large), (random(1, 64), small)):
        exact = x.double() @ weight.double().T
        assert torch.allclose(steps.linear(x, weight).double(), exact, atol=1e-4)
    assert called == [(1, 4, 512)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_product_rounds_activations_to_16_bits_only(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    t, n, k = shape
    generator = torch.Generator().manual_seed(1)
    weight = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    scale, x = torch.rand(n, generator=generator) + 0.1, random(t, k, dtype=dtype)
    x[:, 3] *= 300  # an outlier spoils only its own group of 64
    wide = weight.double() * scale.double()[:, None]
    largest = x.double().abs().unflatten(1, (-1, ops.GROUP)).amax(-1).repeat_interleave(ops.GROUP, 1)
    bound = (largest * 2.0**-16 + x.double().abs() * 2.0**-20) @ wide.abs().T
    assert within(ops.linear_int8(x, weight, scale), x.double() @ wide.T, bound, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_int4_product_reads_nibbles_scales_and_minima(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    t, n, k = shape
    generator = torch.Generator().manual_seed(2)
    packed = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
    scale_min = torch.randn(n, k // ops.GROUP, 2, generator=generator).bfloat16()
    x = random(t, k, dtype=dtype)
    words = packed.reshape(n, -1, 16, 2).long()
    words = words[..., 0] | words[..., 1] << 8
    nibbles = torch.stack([words >> 4 * j & 15 for j in range(4)], dim=2).double()  # [N, K/64, 4, 16]
    scale, low = scale_min.double().unbind(-1)
    wide = (nibbles * scale[..., None, None] + low[..., None, None]).reshape(n, k)
    largest = x.double().abs().unflatten(1, (-1, ops.GROUP)).amax(-1).repeat_interleave(ops.GROUP, 1)
    bulk = (nibbles * scale.abs()[..., None, None] + low.abs()[..., None, None]).reshape(n, k)
    bound = (largest * 2.0**-16 + x.double().abs() * 2.0**-20) @ bulk.T
    assert within(ops.linear_int4(x, packed, scale_min), x.double() @ wide.T, bound, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("h", "g", "s", "d"), [(4, 4, 1, 16), (6, 2, 77, 32), (5, 1, 1000, 64), (8, 2, 640, 128)]
)
def test_decode_attention_errs_at_most_twice_as_much_as_sdpa(
    h: int, g: int, s: int, d: int, dtype: torch.dtype
) -> None:
    q, k, v = (
        random(3, h, 1, d, dtype=dtype),
        random(3, g, s, d, dtype=dtype),
        random(3, g, s, d, dtype=dtype, seed=1),
    )
    exact = attend(q.double(), k.double(), v.double(), Mask.full(), backend="reference")
    ours = (attend(q, k, v, Mask.full(), backend="cpu_decode").double() - exact).abs().max()
    peer = (F.scaled_dot_product_attention(q, k, v, enable_gqa=True).double() - exact).abs().max()
    assert ours <= 2 * peer + 1e-6


def test_decode_attention_reads_strided_caches_up_to_each_rows_length() -> None:
    cache_k, cache_v = random(2, 3, 50, 32), random(2, 3, 50, 32, seed=1)
    k, v, q = cache_k[:, :, :40], cache_v[:, :, :40], random(2, 6, 1, 32, seed=2)
    mask = Mask.cached(torch.tensor([39, 4]))
    expected = attend(q.double(), k.double(), v.double(), mask, backend="reference")
    torch.testing.assert_close(
        attend(q, k, v, mask, backend="cpu_decode").double(), expected, atol=1e-6, rtol=1e-5
    )
    cache_k[1, :, 5:], cache_v[1, :, 5:] = float("nan"), float("nan")
    assert attend(q, k, v, mask, backend="cpu_decode").isfinite().all()


def test_decode_attention_of_no_visible_key_is_zero() -> None:
    q, k = random(2, 2, 1, 16), random(2, 2, 8, 16)
    out = attend(q, k, k, Mask.cached(torch.tensor([-1, 7])), backend="cpu_decode")
    assert torch.equal(out[0], torch.zeros(2, 1, 16)) and out[1].abs().sum() > 0


def test_decode_attention_survives_scores_far_apart() -> None:
    q, k, v = random(1, 4, 1, 64) * 60, random(1, 2, 300, 64) * 60, random(1, 2, 300, 64, seed=1)
    expected = attend(q.double(), k.double(), v.double(), Mask.full(), backend="reference")
    torch.testing.assert_close(
        attend(q, k, v, Mask.full(), backend="cpu_decode").double(), expected, atol=2e-3, rtol=1e-3
    )


def test_decode_attention_by_name_says_why_it_cannot_serve() -> None:
    q, k = random(1, 2, 3, 16), random(1, 2, 8, 16)
    with pytest.raises(ValueError, match="one query per row"):
        attend(q, k, k, Mask.full(), backend="cpu_decode")


@pytest.mark.parametrize("rows", [1, 4])
def test_small_steps_in_bf16_round_like_torch(rows: int) -> None:
    x, up, weight = (random(rows, 64, dtype=torch.bfloat16, seed=i) * 3 for i in range(3))
    with torch.no_grad():
        normed, gated = steps.rms_norm(x, weight[0], 1e-5), steps.swiglu(x, up)
    x32 = x.float()
    plain = (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-5)).bfloat16() * weight[0]
    torch.testing.assert_close(normed, plain, rtol=2 * BF16_STEP, atol=0)
    torch.testing.assert_close(gated, F.silu(x) * up, rtol=2 * BF16_STEP, atol=1e-6)


def test_silu_of_large_values_stays_finite() -> None:
    gate = torch.tensor([-1e4, -200.0, -0.0, 200.0] * 4).bfloat16()
    out = ops.silu_times(gate, torch.ones_like(gate))
    assert torch.equal(out, F.silu(gate.float()).bfloat16())


def test_rotation_in_bf16_is_within_rounding_of_float64() -> None:
    x = random(2, 3, 2, 32, dtype=torch.bfloat16).transpose(1, 2)[:, :, :2]  # [B, H, T, D]
    angles = random(2, 1, 2, 16)
    cos, sin = (torch.cat((f(angles),) * 2, -1).bfloat16() for f in (torch.cos, torch.sin))
    x = x.transpose(1, 2).contiguous().transpose(1, 2)
    first, second = x.double().chunk(2, -1)
    exact = x.double() * cos.double() + torch.cat((-second, first), -1) * sin.double()
    with torch.no_grad():
        assert ((steps.rotate(x, cos, sin).double() - exact).abs() <= exact.abs() * BF16_STEP + 1e-6).all()


def test_gradients_go_around_the_kernels() -> None:
    x, weight = random(1, 64, dtype=torch.bfloat16).requires_grad_(), random(8, 64, dtype=torch.bfloat16)
    steps.linear(x, weight).float().sum().backward()
    torch.testing.assert_close(x.grad, weight.float().sum(0, keepdim=True).bfloat16(), rtol=2e-2, atol=1e-2)


def test_many_rows_in_bf16_equal_the_fp32_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "multiplies_bf16", lambda device: False)
    monkeypatch.setattr(steps, "UPCAST_ELEMENTS", 64 * 3)
    x, weight = random(2, 5, 64, dtype=torch.bfloat16), random(10, 64, dtype=torch.bfloat16)
    expected = (x.float() @ weight.float().T).bfloat16()
    torch.testing.assert_close(steps.linear(x, weight), expected, rtol=BF16_STEP, atol=1e-6)


def test_without_a_compiler_torch_decodes_and_the_log_says_so(tmp_path: os.PathLike[str]) -> None:
    code = (
        "import torch\nfrom core_llm.kernels import Mask, attend\nfrom core_llm.kernels.cpu import ops\n"
        "assert not ops.available()\nq = torch.ones(1, 2, 1, 16)\n"
        "print(attend(q, q, q, Mask.full()).sum().item())"
    )
    environment = {**os.environ, "CC": "/nonexistent/cc", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) == 32.0 and "torch alone decodes" in done.stderr


def test_compilation_leaves_one_library_and_nothing_half_written(
    tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    try:
        assert build.library() is not None
    finally:
        build.library.cache_clear()
    files = [name for _, _, names in os.walk(tmp_path) for name in names]
    assert len(files) == 1 and files[0].endswith(".so")
