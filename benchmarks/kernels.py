"""Speed and exactness of the attention kernels on an NVIDIA GPU, beside SDPA and FlexAttention.

Needs torch, triton and this repository alone. Prefill: TFLOP/s of the causal products that are not masked,
forward and backward. Packed: the same for documents in one text. Decode: bytes of keys and values per second,
beside those that a copy moves in the same minute. Before a case is timed its error against float64 is
measured; a case that fails says why in the table, and the others go on. FlexAttention's block masks are built
beforehand, our document spans within the time. `--smoke` runs every path on the CPU, tiny and interpreted.
"""

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "packages" / "core_llm" / "src")]

from exact import exact  # noqa: E402
from reporting import provenance, save, show  # noqa: E402

from core_llm.kernels import Mask, attend  # noqa: E402

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Row = dict[str, Any]
# What rounding in another order may add to twice the error of SDPA, as a share of the greatest true value.
ORDER_OF_SUMS = 4 * torch.finfo(torch.float32).eps
EXACT_SCORES = 32 * 16384**2  # more scores than these are not computed in float64
FILLED = 4096  # of a long cache: only these keys should cost time


@dataclass(frozen=True)
class Settings:
    """Sizes of a run."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    groups: int
    lengths: tuple[int, ...]
    head_dims: tuple[int, ...]
    documents: int  # per packed text
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    seconds: float  # spent on timing one line


GPU = Settings(
    torch.device("cuda"), torch.bfloat16, 32, 8, (2048, 4096, 8192, 16384), (64, 128), 8,
    (4096, 8192, 16384, 32768, 65536, 131072), (1, 8), 0.3,
)  # fmt: skip
SMOKE = Settings(
    torch.device("cpu"), torch.float32, 2, 1, (40,), (64,), 2, (50,), (1, 2), 0.0
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One problem; q [B, H, T, D], k and v [B, G, S, D]."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    work: float  # FLOP of a forward pass, or bytes
    unit: str


def times(run: Callable[[], object], settings: Settings) -> tuple[float, float, float]:
    """Seconds of one call: the 20th, 50th and 80th percentile."""
    calls = run.calls if isinstance(run, Repeated) else 1
    run(), run()
    measured: list[float] = []
    begun = time.perf_counter()
    while len(measured) < 2 or (time.perf_counter() - begun < settings.seconds and len(measured) < 500):
        if settings.device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            stop.synchronize()
            measured.append(start.elapsed_time(stop) / 1e3 / calls)
        else:
            before = time.perf_counter()
            run()
            measured.append(time.perf_counter() - before)
    p20, _, _, p80 = statistics.quantiles(measured, n=5)
    return p20, statistics.median(measured), p80


def errors(case: Case, call: Attend, true: list[Tensor], grad: Tensor | None) -> list[float]:
    """Greatest errors of the output and of the gradients of q, k and v."""
    inputs = [x.detach().requires_grad_(grad is not None) for x in (case.q, case.k, case.v)]
    out = call(*inputs)
    found = [out, *(torch.autograd.grad(out, inputs, grad) if grad is not None else ())]
    return [float((a.detach() - b).abs().max()) for a, b in zip(found, true)]


def make_row(case: Case, backend: str, step: str, **found: Any) -> Row:
    """One line of the table."""
    b, h, t, d = case.q.shape
    empty = dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "rate", "unit", "share_of_copy", "error"), "")
    shape = {"B": b, "H": h, "G": case.k.shape[1], "T": t, "S": case.k.shape[2], "D": d}
    made = {"case": case.name, "backend": backend, "pass": step, **shape, **empty, "problem": "", **found}
    if not made["problem"]:
        print(f"{case.name} {backend} {step} T={t} S={made['S']} D={d}: {made['rate']} {made['unit']}")
    return made


def timed(case: Case, backend: str, step: str, work: float, run: Callable[[], object], s: Settings) -> Row:
    """Time one line and turn it into a rate."""
    p20, p50, p80 = times(run, s)
    scale = 1e12 if case.unit == "TFLOP/s" else 1e9
    spread = {f"p{p}_ms": round(x * 1e3, 4) for p, x in ((20, p20), (50, p50), (80, p80))}
    return make_row(case, backend, step, **spread, rate=round(work / p50 / scale, 2), unit=case.unit)


def problem(error: Exception) -> str:
    """The first line of what went wrong."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]


def measure(case: Case, calls: dict[str, Attend], backward: bool, settings: Settings) -> list[Row]:
    """Error and speed of every backend; `calls` begins with the SDPA that errors are compared with."""
    grad = torch.randn_like(case.q) if backward else None
    b, h, t, _ = case.q.shape
    true: list[Tensor] | None = None
    rows: list[Row] = []
    limits: list[float] | None = None
    trouble = "not checked: too long for float64"
    if b * h * t * case.k.shape[2] <= EXACT_SCORES:
        try:
            true = exact(case.q, case.k, case.v, case.mask, grad)
        except Exception as error:  # as everywhere here: a benchmark reports and goes on
            trouble = f"not checked: {problem(error)}"
    for backend, call in calls.items():
        verdict = {"error": "" if true else trouble}
        try:
            if true:
                found = errors(case, call, true, grad)
                if backend == next(iter(calls)):
                    limits = [2 * x + ORDER_OF_SUMS * float(y.abs().max()) for x, y in zip(found, true)]
                verdict["error"] = judge(found, limits)
            forward = partial(call, case.q, case.k, case.v)
            with torch.no_grad():
                run = graphed(case, call) if case.unit == "GB/s" else forward
                rows.append({**timed(case, backend, "forward", case.work, run, settings), **verdict})
            if grad is not None:
                inputs = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
                out = call(*inputs)
                run = partial(torch.autograd.grad, out, inputs, grad, retain_graph=True)
                # Five products where the forward pass has two.
                rows.append({**timed(case, backend, "backward", 2.5 * case.work, run, settings), **verdict})
                del out
        except Exception as error:
            rows.append(make_row(case, backend, "", **{**verdict, "problem": problem(error)}))
        release()
    return rows


def judge(found: list[float], limits: list[float] | None) -> str:
    """The worst error as a multiple of SDPA's; at most 2 is wanted, NaN is never enough."""
    if limits is None:
        return "no SDPA to compare with"
    worst = max(2 * x / limit for x, limit in zip(found, limits))
    fine = all(x <= limit for x, limit in zip(found, limits))
    return f"{worst:.2f}x SDPA" + ("" if fine else " TOO HIGH")


def release() -> None:
    """Free what the last line held."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def graphed(case: Case, call: Attend) -> Callable[[], object]:
    """The call as a CUDA graph over enough caches in turn that none stays in the L2 cache; on a CPU, itself.

    Times are then of one call, without the launches' cost, as in a captured decoding step.
    """
    if case.q.device.type == "cpu":
        return lambda: call(case.q, case.k, case.v)
    held = case.k.numel() * case.k.element_size() * 2
    copies = [(case.k, case.v)]
    for _ in range(min(15, (1 << 28) // held)):
        copies.append((case.k.clone(), case.v.clone()))
    call(case.q, *copies[0])  # compiles before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for k, v in copies:
            call(case.q, k, v)
    return Repeated(graph, len(copies), copies)


@dataclass(frozen=True)
class Repeated:
    """A graph that holds several calls; `times` divides by their number."""

    graph: Any
    calls: int
    copies: Any  # kept alive: the graph reads them

    def __call__(self) -> None:
        self.graph.replay()


def sdpa_with(backend: SDPBackend, causal: bool) -> Attend:
    """SDPA with one of its backends, which must not hand over to another."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        choice = sdpa_kernel(backend) if q.is_cuda else contextlib.nullcontext()
        with choice:
            return attend(q, k, v, Mask.causal() if causal else Mask.full(), backend="sdpa")

    return call


def flex(case: Case) -> Attend:
    """FlexAttention, compiled, with its block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    t, documents = case.q.shape[2], case.mask.documents

    def causal(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    def packed(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert documents is not None
        return (query >= key) & (documents[b, query] == documents[b, key])

    rows = None if documents is None else case.q.shape[0]
    rule = causal if documents is None else packed
    blocks = create_block_mask(rule, rows, None, t, t, device=str(case.q.device))
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = compiled(q, k, v, block_mask=blocks, enable_gqa=True)
        assert isinstance(out, Tensor)
        return out

    return call


def later(make: Callable[[], Attend]) -> Attend:
    """A backend that is made when first called, so that what goes wrong there lands in its own line."""
    made: list[Attend] = []

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not made:
            made.append(make())
        return made[0](q, k, v)

    return call


def ours(backend: str, mask: Mask) -> Attend:
    """One of the backends behind `attend`."""
    return lambda q, k, v: attend(q, k, v, mask, backend=backend)


def tensors(settings: Settings, b: int, t: int, s: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v laid out as the model has them for T = S, and as its cache has them otherwise."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=settings.device, dtype=settings.dtype)

    g = settings.groups
    both = random(2, b, s, g, d).transpose(2, 3) if t == s else random(2, b, g, s, d)
    return random(b, t, settings.heads, d).transpose(1, 2), both[0], both[1]


def prefill(settings: Settings) -> list[Row]:
    """Causal attention over whole texts."""
    rows: list[Row] = []
    for d in settings.head_dims:
        for t in settings.lengths:
            mask = Mask.causal()
            q, k, v = tensors(settings, 1, t, t, d)
            case = Case("prefill", q, k, v, mask, 2.0 * settings.heads * t * t * d, "TFLOP/s")
            calls = {
                "sdpa flash": sdpa_with(SDPBackend.FLASH_ATTENTION, True),
                "triton": ours("triton", mask),
            }
            if settings.device.type == "cuda":
                calls["sdpa cudnn"] = sdpa_with(SDPBackend.CUDNN_ATTENTION, True)
                calls["flex compiled"] = later(partial(flex, case))
            rows += measure(case, calls, True, settings)
    return rows


def packed(settings: Settings) -> list[Row]:
    """Documents of unequal lengths in one text."""
    rows: list[Row] = []
    for d in settings.head_dims:
        for t in settings.lengths:
            weights = torch.linspace(1, 3, settings.documents)
            ends = (weights.cumsum(0) / weights.sum() * t).round().long()
            numbers = torch.bucketize(torch.arange(t), ends, right=True)[None].to(settings.device)
            lengths = torch.unique(numbers, return_counts=True)[1]
            q, k, v = tensors(settings, 1, t, t, d)
            work = 2.0 * settings.heads * float(lengths.double().square().sum()) * d
            mask = Mask.packed(numbers)
            case = Case("packed", q, k, v, mask, work, "TFLOP/s")
            calls = {"sdpa per document": ours("documents", mask), "triton": ours("triton", mask)}
            if settings.device.type == "cuda":
                calls["flex compiled"] = later(partial(flex, case))
            rows += measure(case, calls, True, settings)
    return rows


def decode(settings: Settings, copied: float) -> list[Row]:
    """One query per row over a filled cache, and over a long one of which little is filled."""
    rows: list[Row] = []
    for d in settings.head_dims:
        for b in settings.batches:
            for s in settings.contexts:
                q, k, v = tensors(settings, b, 1, s, d)
                full = Mask.cached(torch.full((b,), s - 1, device=settings.device))
                moved = 2.0 * k.numel() * k.element_size()
                case = Case("decode", q, k, v, full, moved, "GB/s")
                calls = {"sdpa": ours("sdpa", Mask.full()), "triton_decode": ours("triton_decode", full)}
                rows += measure(case, calls, False, settings)
            filled = min(FILLED, s // 2)
            part = Mask.cached(torch.full((b,), filled - 1, device=settings.device))
            case = Case(f"decode, {filled} filled", q, k, v, part, moved * filled / s, "GB/s")
            calls = {"sdpa": ours("sdpa", part), "triton_decode": ours("triton_decode", part)}
            rows += measure(case, calls, False, settings)
    for line in rows:
        if line["rate"] != "":
            line["share_of_copy"] = round(line["rate"] * 1e9 / copied, 3)
    return rows


def copy_bandwidth(settings: Settings) -> float:
    """Bytes read and written per second by a copy of 2 GiB (1 MiB in a smoke run)."""
    size = 1 << (31 if settings.device.type == "cuda" else 20)
    source = torch.ones(size, dtype=torch.uint8, device=settings.device)
    target = torch.empty_like(source)
    return 2 * size / times(lambda: target.copy_(source), settings)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="tiny, interpreted, on the CPU; writes no file")
    parser.add_argument("--only", choices=("prefill", "packed", "decode"), help="one part")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "kernels.csv")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        print("error: no NVIDIA GPU found; --smoke runs every path on the CPU", file=sys.stderr)
        raise SystemExit(2)
    if args.smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # triton is imported when first used, which comes later
    settings = SMOKE if args.smoke else GPU
    torch.manual_seed(0)
    copied = copy_bandwidth(settings)
    print(f"copy: {copied / 1e9:.0f} GB/s read and written")
    parts = {"prefill": prefill, "packed": packed, "decode": lambda settings: decode(settings, copied)}
    rows = [line for name, part in parts.items() if args.only in (None, name) for line in part(settings)]
    rows.append(copy_row(rows[0], copied))
    show(rows)
    if args.smoke:
        raise SystemExit(
            any(
                line["problem"] or "x SDPA" not in line["error"] or "HIGH" in line["error"]
                for line in rows[:-1]
            )
        )
    save(args.out, rows, provenance(("torch", "triton")))


def copy_row(like: Row, copied: float) -> Row:
    """The copy's own line."""
    empty = dict.fromkeys(like, "")
    return {**empty, "case": "copy", "backend": "torch", "rate": round(copied / 1e9, 1), "unit": "GB/s"}


if __name__ == "__main__":
    main()
