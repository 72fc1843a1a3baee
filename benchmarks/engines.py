"""Engines that generate from one set of random weights, each alone in a process of its own.

Run as `python engines.py NAME FOLDER THREADS STARTED`; commands come as lines of JSON on standard input,
answers go to standard output.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

CONTEXT = 1024  # positions of every engine's cache


class Engine(Protocol):
    """One row: `prefill` starts anew and returns the next token, `decode` goes on from the last token."""

    def prefill(self, tokens: Sequence[int]) -> int: ...

    def decode(self, n: int) -> None: ...


class Ours:
    """core_llm with a bf16 or quantised checkpoint."""

    def __init__(self, folder: Path) -> None:
        import torch

        from core_llm.checkpoint import load_core
        from core_llm.quantize import load_quantized, pack

        self.torch = torch
        if folder.name == "bf16":
            self.core, _ = load_core(folder, "auto")
        else:
            self.core, _ = load_quantized(folder, torch.bfloat16)
            pack(self.core)

    def prefill(self, tokens: Sequence[int]) -> int:
        from core_llm.cache import KVCache

        with self.torch.inference_mode():
            self.cache = KVCache(self.core.config, 1, CONTEXT, self.torch.bfloat16)
            hidden = self.core.hidden(self.torch.tensor([tokens]), cache=self.cache)
            self.next = self.core.logits(hidden[:, -1:]).float().argmax(-1)
            return int(self.next)

    def decode(self, n: int) -> None:
        with self.torch.inference_mode():
            for _ in range(n):
                self.next = self.core.logits(self.core.hidden(self.next, cache=self.cache)).float().argmax(-1)


class Transformers:
    """transformers' LlamaForCausalLM in bf16 with its default cache and attention."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import LlamaForCausalLM

        self.torch = torch
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.cache: Any = None

    def _step(self, tokens: Any) -> None:
        out = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache, self.next = out.past_key_values, out.logits[:, -1:].float().argmax(-1)

    def prefill(self, tokens: Sequence[int]) -> int:
        with self.torch.inference_mode():
            self.cache = None
            self._step(self.torch.tensor([tokens]))
            return int(self.next)

    def decode(self, n: int) -> None:
        with self.torch.inference_mode():
            for _ in range(n):
                self._step(self.next)


class LlamaCpp:
    """llama.cpp through llama-cpp-python."""

    def __init__(self, file: Path, threads: int) -> None:
        import llama_cpp
        import numpy

        self.api, self.numpy = llama_cpp, numpy
        self.model = llama_cpp.Llama(
            str(file), n_ctx=CONTEXT, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def _step(self, tokens: Sequence[int]) -> None:
        self.model.eval(tokens)
        logits = self.api.llama_get_logits(self.model.ctx)
        self.next = int(self.numpy.ctypeslib.as_array(logits, (self.model.n_vocab(),)).argmax())

    def prefill(self, tokens: Sequence[int]) -> int:
        self.model.reset()
        self._step(tokens)
        return self.next

    def decode(self, n: int) -> None:
        for _ in range(n):
            self._step([self.next])


class Bandwidth:
    """No engine: `decode` reads one GiB of memory n times, which is what decoding cannot beat."""

    BYTES = 1 << 30

    def __init__(self) -> None:
        import torch

        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "bandwidth.so"
            source = Path(__file__).with_name("bandwidth.c")
            compiler = [os.environ.get("CC", "cc"), "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
            subprocess.run([*compiler, str(source), "-o", str(library)], check=True)
            self.read = ctypes.CDLL(str(library)).read_all
        self.read.argtypes, self.read.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_uint64
        self.block = torch.ones(self.BYTES, dtype=torch.uint8)

    def prefill(self, tokens: Sequence[int]) -> int:
        return 0

    def decode(self, n: int) -> None:
        for _ in range(n):
            self.read(self.block.data_ptr(), self.BYTES // 32)


class Attention:
    """No engine: one query over 4,096 keys, 32 / 8 heads, head dim 128, bf16; ours ("attend") or torch's."""

    def __init__(self, ours: bool) -> None:
        import torch

        from core_llm.kernels import Mask, attend

        self.inference_mode, self.ours, self.attend, self.mask = (
            torch.inference_mode,
            ours,
            attend,
            Mask.full(),
        )
        self.fused = torch.nn.functional.scaled_dot_product_attention
        self.q, self.k, self.v = (
            torch.randn(1, n, s, 128).bfloat16() for n, s in ((32, 1), (8, 4096), (8, 4096))
        )

    def prefill(self, tokens: Sequence[int]) -> int:
        return 0

    def decode(self, n: int) -> None:
        with self.inference_mode():
            for _ in range(n):
                if self.ours:
                    self.attend(self.q, self.k, self.v, self.mask)
                else:
                    self.fused(self.q, self.k, self.v, enable_gqa=True)


def build(name: str, folder: Path, threads: int) -> Engine:
    """The engine of that name over the weights that `weights.py` wrote into `folder`."""
    if name == "read":
        return Bandwidth()
    if name in ("attend", "sdpa"):
        return Attention(name == "attend")
    library, kind = name.split()
    if library == "llama.cpp":
        return LlamaCpp(folder / f"{kind}.gguf", threads)
    return Transformers(folder / "bf16") if library == "transformers" else Ours(folder / kind)


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def serve(name: str, folder: Path, threads: int, started: float) -> None:
    """Build the engine, then answer commands until standard input ends."""
    if not name.startswith("llama.cpp"):
        import torch

        torch.set_num_threads(threads)
    imported = peak_bytes()
    engine = build(name, folder, threads)
    engine.prefill([1, 2, 3, 4, 5, 6, 7, 8])  # a short prompt: what remains is the start itself
    answer: dict[str, Any] = {"start_s": time.monotonic() - started}
    while True:
        answer |= {"peak_bytes": peak_bytes(), "imported_bytes": imported}
        print(json.dumps(answer), flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        command = json.loads(line)
        begun = time.perf_counter()
        if command["do"] == "prefill":
            engine.prefill(command["tokens"])
        else:
            engine.decode(command["n"])
        answer = {"seconds": time.perf_counter() - begun}


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
