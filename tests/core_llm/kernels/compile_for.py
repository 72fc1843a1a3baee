"""Compiles every kernel as its own launcher would launch it, for GPUs that need not be present.

`python compile_for.py CAPABILITY [--all]` prints one JSON object per compiled variant: kernel, tiles,
bytes of shared memory, registers and stack bytes per thread (spills), and the matrix instructions found.
With --all, every dtype, head dim, mask and tile size; otherwise a few without gradients.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from core_llm.kernels import Mask, triton_decode, triton_prefill

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LAUNCH = JITFunction.run


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        "registers": int(re.findall(r"REG:(\d+)", out)[0]),
        "stack": int(re.findall(r"STACK:(\d+)", out)[0]),
    }


def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    kernel = LAUNCH(self, *args, grid=grid, warmup=True, **kwargs)
    ptx = kernel.asm["ptx"]
    report = {
        "kernel": self.__name__,
        "element": str(args[0].dtype),
        "settings": {k: v for k, v in kwargs.items() if isinstance(v, int)},
        "masks": [name for name, arg in zip(self.arg_names, args) if name in MASKS and arg is not None],
        "shared": kernel.metadata.shared,
        "wgmma": "wgmma.mma_async" in ptx,
        "mma": "mma.sync" in ptx,
        **resources(kernel.asm["cubin"]),
    }
    print(json.dumps(report), flush=True)


MASKS = ("offsets", "documents", "visible")


def every_config(self: Autotuner, *args: Any, **kwargs: Any) -> None:
    self.nargs = dict(zip(self.arg_names, args))
    chosen = self.prune_configs(kwargs)
    for config in chosen if "--all" in sys.argv else chosen[:1]:
        self.fn.run(*args, **kwargs, **config.all_kwargs())


def tensors(dtype: torch.dtype, d: int, t: int, s: int, h: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.empty(2, t, h, d, dtype=dtype).transpose(1, 2)
    k, v = torch.empty(2, 2, max(1, h // 4), s, d, dtype=dtype).unbind(0)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def prefill(dtype: torch.dtype, d: int, mask: Mask, t: int = 2048, h: int = 8) -> None:
    # The gradient's kernels are launched by the backward pass; contents do not matter, nothing runs.
    triton_prefill.prefill(*tensors(dtype, d, t, t, h), mask).sum().backward()


def decode(dtype: torch.dtype, d: int, mask: Mask, t: int, s: int = 4096, h: int = 8) -> None:
    with torch.no_grad():
        triton_decode.decode(*tensors(dtype, d, t, s, h), mask)


def main() -> None:
    capability = int(sys.argv[1])
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    JITFunction.run = compile_only
    Autotuner.run = every_config
    documents, t = torch.zeros(2, 2048, dtype=torch.long), 2048
    masks = {
        "causal": Mask.causal(),
        "packed": Mask.packed(documents),
        "prefix": Mask.packed(documents, shared_prefix=True),
        "cached": Mask.cached(torch.zeros(2, dtype=torch.long)),
        "full": Mask.full(),
        "pairs": Mask.pairs(torch.ones(2, t, t, dtype=torch.bool)),
    }
    every = [
        (dtype, d, kind)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for d in (64, 128)
        for kind in masks
        # Elements other than bf16 differ in the products only, which every mask shares.
        if dtype == torch.bfloat16 or kind in ("causal", "prefix")
    ]
    if "--all" not in sys.argv:
        with torch.no_grad():
            triton_prefill.prefill(*tensors(torch.bfloat16, 64, 2048, 2048), masks["packed"])
        decode(torch.bfloat16, 64, masks["cached"], 1)
        return
    # Triton turns integer arguments that are 1 into constants.
    for mask in (Mask.causal(), Mask.full(), Mask.packed(documents[:, :1], shared_prefix=True)):
        prefill(torch.bfloat16, 64, mask, 1, 1)
    decode(torch.bfloat16, 64, masks["full"], 1, 1, 1)
    for dtype, d, kind in every:
        prefill(dtype, d, masks[kind])
        if kind in ("causal", "cached", "full"):
            for queries in (1, 5):
                decode(dtype, d, masks[kind], queries)


if __name__ == "__main__":
    main()
