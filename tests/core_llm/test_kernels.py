"""Every attention backend against the formula in float64."""

import pytest
import torch

from core_llm.kernels import BACKENDS, Mask, attend

SHAPES = [(1, 4, 4, 7, 7, 16), (2, 6, 2, 5, 5, 32), (3, 8, 1, 9, 9, 24)]


def masks(b: int, t: int, s: int) -> dict[str, Mask]:
    generator = torch.Generator().manual_seed(0)
    documents = torch.sort(torch.randint(0, 3, (b, t), generator=generator), dim=1).values
    visible = torch.rand(b, t, s, generator=generator) < 0.5
    visible[0, 0] = False  # a query that sees nothing
    return {
        "full": Mask.full(),
        "causal": Mask.causal(),
        "cached": Mask.cached(torch.arange(b) % 2),
        "packed": Mask.packed(documents),
        "prefix": Mask.packed(documents, shared_prefix=True),
        "keys": Mask.keys(visible[:, 0] | (torch.arange(s) == 0)),
        "pairs": Mask.pairs(visible),
    }


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["full", "causal", "cached", "packed", "prefix", "keys", "pairs"])
def test_backend_equals_reference_in_float64(backend: str, shape: tuple[int, ...], kind: str) -> None:
    b, h, g, t, s, d = shape
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(b, n, m, d, generator=generator, dtype=torch.float64) for n, m in ((h, t), (g, s), (g, s))
    )
    mask = masks(b, t, s)[kind]
    expected = attend(q, k, v, mask, backend="reference")
    out = attend(q.float(), k.float(), v.float(), mask, backend=backend)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)


def test_query_that_sees_nothing_gives_zero() -> None:
    q = torch.randn(1, 2, 3, 8)
    k = v = torch.randn(1, 2, 4, 8)
    visible = torch.zeros(1, 3, 4, dtype=torch.bool)
    visible[0, 1] = True
    for backend in BACKENDS:
        out = attend(q, k, v, Mask.pairs(visible), backend=backend)
        assert torch.equal(out[:, :, [0, 2]], torch.zeros(1, 2, 2, 8)) and out[:, :, 1].abs().sum() > 0


def test_packed_documents_do_not_see_each_other() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 2, 6, 8, generator=generator) for _ in range(3))
    packed = attend(q, k, v, Mask.packed(torch.tensor([[1, 1, 1, 2, 2, 2]])))
    alone = attend(q[:, :, 3:], k[:, :, 3:], v[:, :, 3:], Mask.causal())
    torch.testing.assert_close(packed[:, :, 3:], alone)


def test_unknown_backend_lists_the_known_ones() -> None:
    q = torch.zeros(1, 1, 1, 8)
    with pytest.raises(ValueError, match="sdpa"):
        attend(q, q, q, Mask.full(), backend="nope")
