"""Every attention backend against the formula in float64."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from core_llm.errors import UserError
from core_llm.kernels import BACKENDS, Mask, attend, attention

# The backends that take every mask on a CPU; the others have files of their own or stand further down.
GENERAL = ["folded", "reference", "sdpa"]
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


@pytest.mark.parametrize("backend", GENERAL)
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


@pytest.mark.parametrize("backend", GENERAL)
def test_query_that_sees_nothing_gives_zero_and_no_gradient(backend: str) -> None:
    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (3, 4, 4))
    visible = torch.zeros(1, 3, 4, dtype=torch.bool)
    visible[0, 1] = True
    out = attend(q, k, v, Mask.pairs(visible), backend=backend)
    assert torch.equal(out[:, :, [0, 2]], torch.zeros(1, 2, 2, 8)) and out[:, :, 1].abs().sum() > 0
    dq, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert torch.equal(dq[:, :, [0, 2]], torch.zeros(1, 2, 2, 8)) and dq[:, :, 1].abs().sum() > 0
    assert dk.isfinite().all() and dv.isfinite().all()


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


def heads(b: int, h: int, g: int, t: int, d: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = [torch.randn(b, n, t, d, generator=generator).requires_grad_() for n in (h, g, g)]
    return made[0], made[1], made[2]


def test_documents_one_by_one_equal_the_reference_forward_and_backward() -> None:
    q, k, v = heads(2, 4, 2, 9)
    mask = Mask.packed(torch.tensor([[4, 4, 4, 1, 1, 1, 1, 2, 2], [0, 5, 5, 5, 5, 5, 5, 5, 5]]))
    found = []
    for backend in ("documents", "reference"):
        out = attend(q, k, v, mask, backend=backend)
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "mask",
    [
        Mask.causal(),
        Mask.packed(torch.tensor([[1, 2, 1]])),
        Mask.packed(torch.tensor([[0, 1, 1]]), shared_prefix=True),
    ],
)
def test_documents_that_are_not_in_one_piece_are_refused(mask: Mask) -> None:
    with pytest.raises(ValueError, match="in one piece"):
        attend(*heads(1, 1, 1, 3), mask, backend="documents")


def chosen(monkeypatch: pytest.MonkeyPatch, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> str:
    """Name of the backend that "auto" calls."""
    called: list[str] = []
    for name in BACKENDS:
        monkeypatch.setitem(BACKENDS, name, lambda q, *rest, name=name: called.append(name) or q)
    attend(q, k, v, mask)
    monkeypatch.undo()
    return called[0]


def test_long_packed_texts_on_a_cpu_go_document_by_document(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = heads(1, 1, 1, 600, 8)
    few = torch.arange(600)[None] // 100
    assert chosen(monkeypatch, q, k, v, Mask.packed(few)) == "documents"
    with torch.no_grad():
        assert chosen(monkeypatch, q, k, v, Mask.packed(few)) == "documents"
    assert chosen(monkeypatch, q, k, v, Mask.packed(few, shared_prefix=True)) == "sdpa"
    assert chosen(monkeypatch, q, k, v, Mask.packed(few % 2)) == "sdpa"
    assert chosen(monkeypatch, q, k, v, Mask.packed(torch.arange(600)[None] // 10)) == "sdpa"
    short = [x[:, :, :500] for x in (q, k, v)]
    assert chosen(monkeypatch, *short, Mask.packed(few[:, :500])) == "folded"
    with torch.no_grad():
        assert chosen(monkeypatch, *short, Mask.packed(few[:, :500])) == "sdpa"


def test_choice_on_a_gpu_follows_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "_HAS_TRITON", True)
    choose = attention._choose_on_gpu
    many, one = torch.zeros(1, 8, 100, 64), torch.zeros(1, 8, 1, 64)
    k = v = torch.zeros(1, 2, 100, 64)
    cached, packed = Mask.cached(torch.tensor([3])), Mask.packed(torch.zeros(1, 100))
    assert choose(one, k, v, cached) == choose(one, k, v, Mask.full()) == "triton_decode"
    assert choose(one.clone().requires_grad_(), k, v, cached) == "triton"
    assert choose(many, k, v, cached) == choose(many, k, v, packed) == "triton"
    assert choose(many, k, v, Mask.causal()) == choose(many, k, v, Mask.full()) == "sdpa"
    assert choose(many, k, v, Mask.pairs(torch.ones(1, 100, 100, dtype=torch.bool))) == "sdpa"
    assert choose(many.double(), k.double(), v.double(), packed) == "sdpa"
    assert choose(many[..., :32], k[..., :32], v[..., :32], packed) == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose(many, k, v, packed) == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "_HAS_TRITON", False)
    assert choose(many, k, v, packed) == "sdpa"


@pytest.mark.parametrize("backend", ["triton", "triton_decode"])
def test_triton_asked_for_where_it_cannot_run_says_so(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    q = torch.zeros(1, 2, 1, 64)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="on a GPU, these are on 'cpu'"):
        attend(q, q, q, Mask.full(), backend=backend)
    monkeypatch.setattr(attention, "_HAS_TRITON", False)
    with pytest.raises(UserError, match="not installed"):
        attend(q, q, q, Mask.full(), backend=backend)


def test_importing_the_kernels_does_not_import_triton() -> None:
    code = "import core_llm.kernels, sys; print('triton' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
