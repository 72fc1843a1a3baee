"""The Triton kernels through Triton's interpreter, against the formula in float64 and against SDPA.

Axes: B batch, H query heads, G key/value heads, T query positions, S key positions, D head dim.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from core_llm.kernels import Mask, attend

Call = Callable[..., Any]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# Sums of fp32 products in another order: all that an error may exceed twice that of SDPA by.
ORDER_OF_SUMS = 4 * torch.finfo(FP32).eps


def inputs(b: int, h: int, g: int, t: int, s: int, d: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """q [B, H, T, D] in the model's layout, k and v [B, G, S, D], and a gradient like q."""
    generator = torch.Generator().manual_seed(seed)
    q, grad = (torch.randn(b, t, h, d, generator=generator).to(dtype).transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(b, g, s, d, generator=generator).to(dtype) for _ in range(2))
    return [q, k, v, grad]


def make_mask(kind: str, b: int, t: int, s: int) -> Mask:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.sort(torch.randint(0, 3, (b, t), generator=generator), dim=1).values
    visible = torch.rand(b, t, s, generator=generator) < 0.5
    visible[0, 0] = False  # a query that sees nothing
    made = {
        "full": Mask.full(),
        "causal": Mask.causal(),
        "cached": Mask.cached(torch.arange(b) * 7 + 3),
        "packed": Mask.packed(numbers),
        "prefix": Mask.packed(numbers, shared_prefix=True),
        "keys": Mask.keys(visible[:, t // 2]),
        "pairs": Mask.pairs(visible),
    }
    return made[kind]


def assert_exact_enough(errors: list[tuple[float, float, float]]) -> None:
    for name, (own, sdpa, greatest) in zip(("out", "dq", "dk", "dv"), errors):
        assert own <= 2 * sdpa + ORDER_OF_SUMS * greatest, f"{name}: {own:.2e}, SDPA {sdpa:.2e}"


# B, H, G, T, S, D: odd lengths, group sizes 1, 2, 4 and 8, every dtype and mask at least once.
SOME = [
    ("causal", (1, 2, 1, 77, 77, 64), BF16),
    ("causal", (1, 1, 1, 5, 9, 128), FP32),
    ("full", (1, 2, 2, 37, 50, 128), FP16),
    ("packed", (1, 2, 1, 101, 101, 64), FP32),
    ("prefix", (1, 2, 2, 75, 75, 64), BF16),
    ("cached", (2, 4, 1, 19, 70, 64), FP16),
    ("keys", (2, 1, 1, 33, 65, 64), FP32),
    ("pairs", (1, 8, 1, 17, 34, 64), BF16),
]
EVERY = [
    (kind, (b, ratio * g, g, t, t if kind in ("packed", "prefix") else s, d), dtype)
    for kind in ("full", "causal", "cached", "packed", "prefix", "keys", "pairs")
    for dtype in (FP32, BF16, FP16)
    for b, ratio, g, t, s, d in (
        (2, 1, 2, 65, 97, 64),
        (1, 2, 1, 129, 131, 128),
        (2, 4, 1, 33, 70, 64),
        (1, 8, 2, 7, 40, 128),
    )
]


@pytest.mark.parametrize(("kind", "shape", "dtype"), SOME)
def test_prefill_and_its_gradients_err_at_most_twice_as_much_as_sdpa(
    interpreted: Call, kind: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    q, k, v, grad = inputs(*shape, dtype)  # type: ignore[arg-type]
    mask = make_mask(kind, shape[0], shape[3], shape[4])
    assert_exact_enough(interpreted("errors", q, k, v, mask, "triton", grad))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "shape", "dtype"), EVERY)
def test_prefill_errs_at_most_twice_as_much_as_sdpa_at_many_shapes(
    interpreted: Call, kind: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    q, k, v, grad = inputs(*shape, dtype)  # type: ignore[arg-type]
    mask = make_mask(kind, shape[0], shape[3], shape[4])
    assert_exact_enough(interpreted("errors", q, k, v, mask, "triton", grad))


def test_query_that_sees_nothing_gives_zeros_and_no_gradient(interpreted: Call) -> None:
    q, k, v, grad = inputs(2, 2, 1, 35, 40, 64, FP32)
    visible = torch.zeros(2, 35, 40, dtype=torch.bool)
    visible[0, 3:30, ::3] = True
    out, dq, dk, dv = interpreted("evaluate", q, k, v, Mask.pairs(visible), "triton", grad)
    blind = ~visible.any(dim=2)
    assert not out.transpose(1, 2)[blind].any() and not dq.transpose(1, 2)[blind].any()
    assert out.transpose(1, 2)[~blind].all() and dq.transpose(1, 2)[~blind].any()
    assert dk.isfinite().all() and dv.isfinite().all() and not dk[1].any() and not dv[1].any()


@given(data=st.data(), shared=st.booleans())
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_documents_in_any_order_are_masked_as_in_the_reference(
    interpreted: Call, data: st.DataObject, shared: bool
) -> None:
    runs = data.draw(st.lists(st.tuples(st.integers(-1, 3), st.integers(1, 50)), min_size=1, max_size=5))
    numbers = torch.tensor([[number for number, length in runs for _ in range(length)]])
    q, k, v, _ = inputs(1, 1, 1, numbers.shape[1], numbers.shape[1], 64, FP32, seed=len(runs))
    mask = Mask.packed(numbers, shared_prefix=shared)
    assert_exact_enough(interpreted("errors", q, k, v, mask, "triton"))


@given(data=st.data(), shared=st.booleans())
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_document_spans_hold_every_visible_pair(interpreted: Call, data: st.DataObject, shared: bool) -> None:
    runs = data.draw(st.lists(st.tuples(st.integers(-1, 3), st.integers(1, 40)), min_size=1, max_size=6))
    numbers = torch.tensor([[number for number, length in runs for _ in range(length)]])
    t = numbers.shape[1]
    visible = Mask.packed(numbers, shared).dense(t, t, torch.device("cpu"))[0]  # type: ignore[index]
    table, granule = interpreted("spans", numbers, shared)
    for i, (first, uniform_from, last, uniform_to, prefix_end) in enumerate(table[0].tolist()):
        start, stop = i * granule, min((i + 1) * granule, t)
        seen, seeing = visible[start:stop], visible[:, start:stop]
        assert not seen[:, prefix_end:first].any() and prefix_end <= t
        assert not seeing[last:].any()
        assert seen[:, min(uniform_from, start) : start].all() or uniform_from >= stop
        assert seeing[stop:uniform_to].all()
        if not shared and len(numbers[0, start:stop].unique()) == 1 and numbers[0].diff().ge(0).all():
            same = (numbers[0] == numbers[0, start]).nonzero()[:, 0]  # ascending numbers: nothing to spare
            assert (first, uniform_from) == (same[0], same[0]) and (last, uniform_to) == (same[-1] + 1,) * 2


def test_other_documents_are_not_even_read(interpreted: Call) -> None:
    q, k, v, _ = inputs(1, 1, 1, 192, 192, 64, FP32)
    numbers = torch.arange(3).repeat_interleave(64)[None]
    k[:, :, :64] = float("nan")  # times a weight of zero this would still be NaN
    v[:, :, :64] = float("nan")
    (out,) = interpreted("evaluate", q, k, v, Mask.packed(numbers), "triton")
    assert out[:, :, 64:].isfinite().all() and out[:, :, :64].isnan().all()


DECODED = [
    ("cached", (2, 8, 1, 1, 150, 64), BF16),
    ("full", (1, 4, 2, 1, 61, 128), FP32),
    ("cached", (2, 4, 2, 5, 90, 128), FP16),
    ("causal", (1, 2, 2, 16, 40, 64), FP32),
]


@pytest.mark.parametrize(("kind", "shape", "dtype"), DECODED)
def test_decode_errs_at_most_twice_as_much_as_sdpa(
    interpreted: Call, kind: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    q, k, v, _ = inputs(*shape, dtype)  # type: ignore[arg-type]
    mask = make_mask(kind, shape[0], shape[3], shape[4])
    if kind == "cached":  # one row hardly filled, the other full
        mask = Mask.cached(torch.tensor([0, shape[4] - shape[3]]))
    assert_exact_enough(interpreted("errors", q, k, v, mask, "triton_decode"))


def test_decode_reads_only_what_is_filled_of_a_strided_cache(interpreted: Call) -> None:
    q, k, v, _ = inputs(2, 4, 2, 1, 200, 64, FP32)
    cache = torch.full((2, 2, 2, 300, 64), float("nan"))
    cache[0, :, :, :200], cache[1, :, :, :200] = k, v
    offsets = torch.tensor([199, 10])
    cache[:, 1, :, 11:] = float("nan")  # times a weight of zero this would still be NaN
    mask = Mask.cached(offsets)
    (out,) = interpreted("evaluate", q, *cache, mask, "triton_decode")
    torch.testing.assert_close(out, attend(q, k, v, mask, backend="reference"), atol=2e-6, rtol=1e-5)


@pytest.mark.slow
def test_both_operators_are_traced_whole_by_torch_compile(interpreted: Call) -> None:
    q, k, v, _ = inputs(1, 2, 1, 9, 9, 64, FP32)
    mask = Mask.packed(torch.tensor([[1] * 4 + [2] * 5]))
    traced = interpreted("compiled", *(x.requires_grad_() for x in (q, k, v)), mask, "triton")
    plain = interpreted("evaluate", q.detach(), k.detach(), v.detach(), mask, "triton", torch.ones_like(q))
    assert all(torch.equal(a, b) for a, b in zip(traced, plain, strict=True))
    q, k, v, _ = inputs(1, 2, 1, 1, 20, 64, FP32)
    cached = Mask.cached(torch.tensor([12]))
    (traced,) = interpreted("compiled", q, k, v, cached, "triton_decode")
    assert torch.equal(traced, interpreted("evaluate", q, k, v, cached, "triton_decode")[0])


def test_torch_accepts_the_operator(interpreted: Call) -> None:
    q, k, v, _ = inputs(1, 2, 1, 9, 9, 64, FP32)
    interpreted("check_operator", q, k, v, torch.tensor([[1] * 4 + [2] * 5]))


def test_gradients_are_the_same_bits_each_time(interpreted: Call) -> None:
    q, k, v, grad = inputs(1, 4, 1, 40, 40, 64, FP32)
    first, second = (interpreted("evaluate", q, k, v, Mask.causal(), "triton", grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
