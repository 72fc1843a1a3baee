"""A process in which Triton interprets kernels on the CPU, and the calls that the tests make in it.

Triton decides when it is first imported whether it compiles or interprets, so one process cannot do both.
The tests keep their own process as it is and send the interpreted calls to this file, run as a child.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core_llm.kernels import Mask, attend

Call = Callable[..., Any]


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Call]:
    """`interpreted(name, *args)`: the result of that function of this file, called in the child."""
    child = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert child.stdin is not None and child.stdout is not None
    to_child, from_child = child.stdin, child.stdout

    def call(name: str, *args: Any) -> Any:
        pickle.dump((name, args), to_child)
        to_child.flush()
        error, answer = pickle.load(from_child)
        if error:
            raise RuntimeError(error)
        return answer

    yield call
    to_child.close()
    child.wait(timeout=30)


def evaluate(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, backend: str, grad_out: Tensor | None = None
) -> list[Tensor]:
    """The output, and with `grad_out` also the gradients of q, k and v."""
    if grad_out is None:
        with torch.no_grad():
            return [attend(q, k, v, mask, backend=backend)]
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*inputs, mask, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]


def errors(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, backend: str, grad_out: Tensor | None = None
) -> list[tuple[float, float, float]]:
    """Greatest error against the float64 reference of `backend` and of SDPA, and the greatest true value."""
    exact = [None if x is None else x.double() for x in (q, k, v, grad_out)]
    true = evaluate(*exact[:3], mask, "reference", exact[3])  # type: ignore[arg-type]
    own, sdpa = (evaluate(q, k, v, mask, name, grad_out) for name in (backend, "sdpa"))

    def greatest(x: Tensor) -> float:
        return float(x.abs().max())

    return [(greatest(a - x), greatest(b - x), greatest(x)) for a, b, x in zip(own, sdpa, true)]


def spans(documents: Tensor, shared_prefix: bool) -> tuple[Tensor, int]:
    """The table of document spans and the number of positions per entry."""
    from core_llm.kernels.triton_tiles import GRANULE, document_spans

    return document_spans(documents, shared_prefix), GRANULE


def compiled(q: Tensor, k: Tensor, v: Tensor, mask: Mask, backend: str) -> list[Tensor]:
    """As `evaluate`, traced whole by torch.compile; gradients of the sum where inputs want them."""
    traced = torch.compile(
        lambda *inputs: attend(*inputs, mask, backend=backend), backend="aot_eager", fullgraph=True
    )
    out = traced(q, k, v)
    return [out.detach(), *(torch.autograd.grad(out.sum(), (q, k, v)) if q.requires_grad else ())]


def check_operator(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> None:
    """torch's own checks of an operator's schema, fake tensors and gradient registration."""
    from core_llm.kernels.triton_prefill import _attention

    arguments = (q, k, v, None, documents, None, True, False)
    torch.library.opcheck(_attention, arguments, test_utils=("test_schema", "test_faketensor"))


def patch_once_per_kernel() -> None:
    """Twice the speed: the interpreter patches Triton's language anew for every call of a helper function."""
    from triton.runtime import interpreter

    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_new(function: Any) -> Any:
        if id(function.__globals__) in patched:
            return None
        patched.add(id(function.__globals__))
        return patch(function)

    def run_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        run(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_new, run_anew


def serve() -> None:
    """Answer calls until the parent closes the pipe."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a kernel prints must not mix with the answers
    patch_once_per_kernel()
    while True:
        try:
            name, args = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = None, globals()[name](*args)
        except Exception as problem:  # raised again by the test that called
            answer = f"{type(problem).__name__}: {problem}", None
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))  # where a script's own folder stands: nothing there to import
    serve()
