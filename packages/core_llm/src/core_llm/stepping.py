"""One decode step, and the ways to run it again and again.

Axes: B batch, V vocabulary.
"""

from collections.abc import Callable, Mapping
from functools import cache as memoised
from typing import Literal

import torch
from torch import Tensor

from core_llm.cache import KVCache
from core_llm.model import Llama

Engine = Literal["eager", "static", "compile", "cuda-graph"]
Step = Callable[[Tensor], Tensor]
Interleaved = Mapping[int, Callable[[Tensor], Tensor]]

# Capacities of fixed-shape caches are multiples of this: requests of like length share one compilation.
CAPACITY_UNIT = 256
# torch.compile's backend for `engine="compile"`.
BACKEND = "inductor"


def decode_step(
    core: Llama, cache: KVCache, tokens: Tensor, interleaved: Interleaved | None = None
) -> Tensor:
    """Append tokens [B] to the rows of the cache; logits [B, V] of what follows.

    With `cache.fix_shapes()` before, no shape and no value on the host changes from step to step, and
    nothing waits for the device: the step compiles once and can be captured in a CUDA graph.
    """
    return core.logits(core.hidden(tokens[:, None], cache=cache, interleaved=interleaved)[:, 0])


def padded_capacity(needed: int, engine: Engine, limit: int) -> int:
    """Positions to reserve for `needed` ones: rounded up for fixed shapes, at most `limit`."""
    if engine == "eager":
        return needed
    return min(limit, -(-needed // CAPACITY_UNIT) * CAPACITY_UNIT)


def stepper(
    core: Llama,
    cache: KVCache,
    engine: Engine = "eager",
    interleave: Callable[[Tensor], Interleaved] | None = None,
) -> Step:
    """A function from tokens [B] to logits [B, V] that moves the cache on; call it after the prefill.

    eager: reads only the filled part of the cache, shapes grow. static: fixed shapes, uncompiled.
    compile: fixed shapes through torch.compile. cuda-graph: fixed shapes, captured once and replayed;
    needs no compiler, its result is overwritten by the next call. `interleave` gives the layers of
    adapters for positions [B, 1].
    Raises ValueError for another engine, for cuda-graph away from a CUDA device, or for layers of
    adapters in a compiled or captured step: they are new functions in every pass.
    """
    if engine not in ("eager", "static", "compile", "cuda-graph"):
        raise ValueError(f"unknown engine '{engine}'; known: eager, static, compile, cuda-graph")
    if engine != "eager":
        cache.fix_shapes()
    if engine in ("eager", "static"):

        def step(tokens: Tensor) -> Tensor:
            return decode_step(core, cache, tokens, interleave(cache.positions(1)) if interleave else None)

        return step
    if interleave is not None:
        raise ValueError(f"engine '{engine}' cannot run the layers of adapters; use eager or static")
    if engine == "cuda-graph":
        return _captured(core, cache)
    compiled = compiled_step(BACKEND)
    return lambda tokens: compiled(core, cache, tokens)


@memoised
def compiled_step(backend: str = "inductor", mode: str | None = None) -> Callable[..., Tensor]:
    """`decode_step` through torch.compile, as one graph without breaks.

    The same object for the same arguments, so that later requests of the same shapes compile nothing.
    """
    return torch.compile(decode_step, backend=backend, mode=mode, fullgraph=True, dynamic=False)


def _captured(core: Llama, cache: KVCache) -> Step:
    device = cache.lengths.device
    if device.type != "cuda":
        raise ValueError(f"a CUDA graph needs a CUDA device, the model is on {device}")
    tokens = torch.zeros(len(cache.lengths), dtype=torch.long, device=device)
    before = cache.lengths.clone()
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):  # libraries allocate and tune in their first calls, which capture forbids
            decode_step(core, cache, tokens)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = decode_step(core, cache, tokens)
    # The warm-up wrote behind the filled part alone: with the lengths set back, nothing of it is visible.
    cache.lengths.copy_(before)

    def step(following: Tensor) -> Tensor:
        tokens.copy_(following)
        graph.replay()
        return logits

    return step
