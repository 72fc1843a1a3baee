"""Speed and memory of Llama 3.2-Vision's architecture on a CPU, against transformers' Mllama.

Both hold the same random weights, in one process; that their logits agree is checked first. In every round
each has its turn; ratios are medians over rounds of paired figures. Prefill is everything from pixels to the
first token's logits, decode one further token behind it. bf16 is the dtype of the released weights. The cache
is what all cross-attention layers keep of one picture of four tiles, against keys and values repeated for
every query head as in the released code: bytes of tensors.

The memory of the picture in decoding is measured, in a process of its own for each engine: the highest
resident set (VmHWM of Linux, reset before) while tokens are decoded behind a picture of four full-sized
tiles, less the same behind a text alone. It holds the cache and whatever a step makes of it. "repeated" is
our cache with keys and values repeated for every query head, read by the same code.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from reporting import provenance, save, save_markdown, show  # noqa: E402

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from core_llm.model import Llama
    from vision_adapter.mllama_adapter import MllamaAdapter

RESULTS = Path(__file__).resolve().parent / "results"
GRIDS = {1: 1, 6: 4}  # aspect-ratio id → tiles
VOCAB = 4096


def peer_model(folder: Path, image_size: int, dtype: torch.dtype) -> Any:
    """A random Mllama, about a hundredth of the 11B, saved to `folder`; its gates are open."""
    import torch
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    text = {
        "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10, "num_attention_heads": 16,
        "num_key_value_heads": 4, "vocab_size": VOCAB, "cross_attention_layers": [3, 8],
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    }  # fmt: skip
    vision = {
        "hidden_size": 256, "num_hidden_layers": 8, "num_global_layers": 2, "attention_heads": 4,
        "intermediate_size": 1024, "image_size": image_size, "patch_size": 14, "vision_output_dim": 768,
        "intermediate_layers_indices": [3, 6],
    }  # fmt: skip
    torch.manual_seed(0)
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=VOCAB)
    peer = MllamaForConditionalGeneration(config).eval().requires_grad_(False)
    for name, parameter in peer.named_parameters():
        if "gate" in name and parameter.numel() == 1:
            parameter.fill_(0.5)
    peer.to(dtype).save_pretrained(folder)
    return peer


class Theirs:
    """transformers' model, called as its `generate` calls it, without that function's own overhead."""

    def __init__(self, peer: Any, ratio: int, pixels: Tensor, tokens: Tensor) -> None:
        import torch

        tiles = GRIDS[ratio]
        padded = torch.zeros(1, 1, 4, *pixels.shape[1:])
        padded[0, 0, :tiles] = pixels
        valid = (torch.arange(4) < tiles).long()
        self.peer, self.tokens = peer, tokens
        self.mask: Tensor | None = valid.expand(1, 4096, 1, 4)
        self.images = {
            "pixel_values": padded,
            "aspect_ratio_ids": torch.tensor([[ratio]]),
            "aspect_ratio_mask": valid[None, None],
        }

    def forget(self) -> None:
        """Start over with a text alone."""
        self.cache = None
        n = self.tokens.shape[1]
        out = self.peer(self.tokens.clamp(max=VOCAB - 1), use_cache=True, logits_to_keep=1)
        self.cache, self.length, self.mask = out.past_key_values, n, None

    def prefill(self) -> Tensor:
        """Logits [V] of the first token."""
        n = self.tokens.shape[1]
        out = self.peer(
            self.tokens,
            **self.images,
            cross_attention_mask=None if self.mask is None else self.mask[:, :n],
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache, self.length = out.past_key_values, n
        return out.logits[0, -1]

    def decode(self, token: Tensor) -> Tensor:
        """Logits [V] behind one more token."""
        seen = None if self.mask is None else self.mask[:, self.length : self.length + 1]
        out = self.peer(
            token[None, None], past_key_values=self.cache, cross_attention_mask=seen, use_cache=True
        )
        self.length += 1
        return out.logits[0, -1]


class Ours:
    """Core and adapter, called as `generate` calls them."""

    def __init__(
        self, core: Llama, adapter: MllamaAdapter, ratio: int, pixels: Tensor, tokens: Tensor, room: int
    ) -> None:
        from vision_adapter.mllama_encoder import Tiles

        self.core, self.adapter, self.tokens, self.room = core, adapter, tokens, room
        self.tiles = Tiles(pixels, (GRIDS[ratio],), (ratio,))

    def prefill(self) -> Tensor:
        """Logits [V] of the first token."""
        import torch

        from core_llm.adapters import Spans
        from core_llm.cache import KVCache
        from core_llm.generate import Request, prefill
        from core_llm.stepping import stepper

        memory = self.adapter.encode(self.tiles)
        embeddings = self.core.embed(self.tokens.clamp(max=VOCAB - 1)).clone()
        embeddings[0, 0] = self.adapter.place(memory)[0][0]
        zero, end, lengths = torch.zeros(1).long(), torch.tensor([10**9]), torch.tensor([embeddings.shape[1]])
        unused = torch.zeros_like(self.tokens, dtype=torch.bool)

        def interleave(positions: Tensor) -> Any:
            return self.adapter.interleave(memory, Spans(zero, zero, end, positions))

        request = Request(None, embeddings, lengths, self.tokens, unused, lengths, interleave)
        cache = KVCache(self.core.config, 1, self.tokens.shape[1] + self.room, embeddings.dtype)
        self.memory = memory
        logits = self.core.logits(prefill(self.core, request, cache))[0]
        self.step = stepper(self.core, cache, "eager", interleave)
        return logits

    def forget(self) -> None:
        """Start over with a text alone."""
        from core_llm.cache import KVCache
        from core_llm.generate import Request, prefill
        from core_llm.stepping import stepper

        del self.memory, self.step
        request = Request.of_tokens(self.tokens.clamp(max=VOCAB - 1).tolist())
        cache = KVCache(self.core.config, 1, request.width + self.room, self.core.embed_tokens.weight.dtype)
        prefill(self.core, request, cache)
        self.step = stepper(self.core, cache, "eager")

    def decode(self, token: Tensor) -> Tensor:
        """Logits [V] behind one more token."""
        return self.step(token[None])[0]


class Repeated(Ours):
    """Ours with the picture's keys and values kept once for every query head, as the released code does."""

    def prefill(self) -> Tensor:
        """Logits [V] of the first token."""
        from vision_adapter.mllama_memory import TileMemory

        encode, repeats = self.adapter.encode, self.core.config.n_heads // self.core.config.n_kv_heads

        def repeating(tiles: Any) -> TileMemory:
            kept = encode(tiles)
            keys, values = (
                {layer: tensor.repeat_interleave(repeats, dim=0) for layer, tensor in pair.items()}
                for pair in (kept.keys, kept.values)
            )
            return TileMemory(keys, values, kept.bounds)

        self.adapter.encode = repeating  # type: ignore[method-assign, assignment]
        try:
            return super().prefill()
        finally:
            self.adapter.encode = encode  # type: ignore[method-assign]


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def check(ours: Ours, theirs: Theirs) -> float:
    """The largest difference of their logits, in prefill and two decoded tokens."""
    import torch

    worst = (ours.prefill() - theirs.prefill()).abs().max().item()
    for token in (5, 6):
        both = ours.decode(torch.tensor(token)), theirs.decode(torch.tensor(token))
        worst = max(worst, (both[0] - both[1]).abs().max().item())
    if worst > (1e-3 if ours.core.embed_tokens.weight.dtype == torch.float32 else 0.05):
        raise SystemExit(f"error: the two models differ by {worst}: nothing to compare")
    return worst


def measure(ours: Ours, theirs: Theirs, rounds: int, new_tokens: int) -> dict[str, list[float]]:
    """Seconds per prefill and per decoded token of both, by round, in turns."""
    import torch

    token = torch.tensor(7)
    times: dict[str, list[float]] = {}
    for turn in range(rounds + 1):  # the first warms up
        pair: list[tuple[str, Ours | Theirs]] = [("ours", ours), ("theirs", theirs)]
        for name, engine in pair if turn % 2 else reversed(pair):
            spent = seconds(engine.prefill)
            steps = [seconds(partial(engine.decode, token)) for _ in range(new_tokens)]
            if turn:
                times.setdefault(f"{name} prefill", []).append(spent)
                times.setdefault(f"{name} decode", []).append(statistics.median(steps))
    return times


def repeated_bytes(ours: Ours) -> tuple[int, int]:
    """Bytes that the keys and values of the picture take: as kept, and repeated for every query head."""
    kept, repeated = 0, 0
    repeats = ours.core.config.n_heads // ours.core.config.n_kv_heads
    for tensor in (*ours.memory.keys.values(), *ours.memory.values.values()):
        kept += tensor.untyped_storage().nbytes()
        repeated += tensor.repeat_interleave(repeats, dim=0).nbytes
    return kept, repeated


def rows(times: dict[str, list[float]], dtype: str, tiles: int) -> list[dict[str, Any]]:
    """One row per engine and phase: medians in milliseconds, and transformers' time over ours."""
    table = []
    for phase in ("prefill", "decode"):
        mine, other = times[f"ours {phase}"], times[f"theirs {phase}"]
        ratio = statistics.median(b / a for a, b in zip(mine, other, strict=True))
        for name, values in (("ours", mine), ("transformers", other)):
            table.append(
                {
                    "dtype": dtype,
                    "tiles": tiles,
                    "phase": phase,
                    "engine": name,
                    "median_ms": round(statistics.median(values) * 1e3, 2),
                    "min_ms": round(min(values) * 1e3, 2),
                    "max_ms": round(max(values) * 1e3, 2),
                    "times_transformers": round(ratio, 2) if name == "ours" else 1.0,
                }
            )
    return table


def targets(table: list[dict[str, Any]], shares: dict[str, float]) -> list[dict[str, Any]]:
    """What was to be reached with a picture of four tiles, and what was, in each dtype."""
    goals: list[tuple[str, float, float, bool]] = []
    for dtype, share in shares.items():
        own = {
            row["phase"]: row["times_transformers"]
            for row in table
            if (row["engine"], row["dtype"], row["tiles"]) == ("ours", dtype, 4)
        }
        goals += [
            (f"prefill with one picture, {dtype}, times transformers", own["prefill"], 1.3, True),
            (f"decode, {dtype}, times transformers", own["decode"], 1.5, True),
            (f"image cache, {dtype}, times the repeated form", share, 0.25, False),
        ]
    return [
        {
            "target": name,
            "measured": round(value, 3),
            "reach": f"{'>=' if at_least else '<='} {bound}",
            "reached": "yes" if (value >= bound if at_least else value <= bound) else "NO",
        }
        for name, value, bound, at_least in goals
    ]


def compare(args: argparse.Namespace, dtype: torch.dtype) -> tuple[list[dict[str, Any]], float]:
    """Rows of figures in one dtype, and the image cache's share of its repeated form."""
    import torch

    from core_llm.checkpoint import read_core
    from vision_adapter.mllama_checkpoint import open_fused, read_adapter

    name = str(dtype).removeprefix("torch.")
    size = args.image_size
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        peer = peer_model(Path(folder), size, dtype)
        weights = open_fused(Path(folder))
        core, adapter = read_core(weights), read_adapter(weights)
        adapter.encoder.config = replace(adapter.config, capture="output")  # as transformers has it
        tokens = torch.randint(0, VOCAB, (1, args.prompt))
        tokens[0, 0] = VOCAB
        for ratio, tiles in GRIDS.items():
            pixels = torch.randn(tiles, 3, size, size)
            ours = Ours(core, adapter, ratio, pixels, tokens, args.new_tokens + 2)
            theirs = Theirs(peer, ratio, pixels, tokens)
            print(f"{name}, {tiles} tiles: logits differ by {check(ours, theirs):.1e}", flush=True)
            table += rows(measure(ours, theirs, args.rounds, args.new_tokens), name, tiles)
        kept, repeated = repeated_bytes(ours)
    return table, kept / repeated


def peak(call: Callable[[], Any]) -> int:
    """The highest resident set of this process during a call, bytes. Linux alone."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free inside goes back to the system
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    call()
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def child(args: argparse.Namespace) -> None:
    """Print the bytes that a picture of four tiles takes while tokens are decoded, in this process."""
    import torch

    from core_llm.checkpoint import read_core
    from vision_adapter.mllama_checkpoint import open_fused, read_adapter

    torch.set_num_threads(args.threads)
    token = torch.tensor(7)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        peer = peer_model(Path(folder), args.memory_image_size, getattr(torch, args.dtypes[0]))
        tokens = torch.randint(0, VOCAB, (1, args.prompt))
        tokens[0, 0] = VOCAB
        pixels = torch.randn(4, 3, args.memory_image_size, args.memory_image_size)
        engine: Ours | Theirs
        if args.child == "transformers":
            engine = Theirs(peer, 6, pixels, tokens)
        else:
            del peer
            weights = open_fused(Path(folder))
            kind = Repeated if args.child == "repeated" else Ours
            room = 8 * args.new_tokens
            engine = kind(read_core(weights), read_adapter(weights), 6, pixels, tokens, room)

        def decode() -> None:
            for _ in range(args.new_tokens):
                engine.decode(token)

        engine.prefill()
        decode()  # touches every weight, and what libraries allocate once
        behind_picture = peak(decode)
        engine.forget()
        decode()
        print(json.dumps({"bytes": behind_picture - peak(decode)}))


def measure_memory(args: argparse.Namespace, dtype: str) -> list[dict[str, Any]]:
    """One row per engine, each measured in a process of its own."""
    table = []
    for engine in ("ours", "repeated", "transformers"):
        flags = ["--child", engine, "--dtypes", dtype, "--threads", str(args.threads)]
        flags += ["--memory-image-size", str(args.memory_image_size), "--prompt", str(args.prompt)]
        command = [sys.executable, __file__, *flags, "--new-tokens", str(args.new_tokens)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"error: the process that measures {engine} failed: {done.stderr[-2000:]}")
        size = json.loads(done.stdout.splitlines()[-1])["bytes"]
        table.append({"dtype": dtype, "engine": engine, "picture_mib": round(size / 2**20, 2)})
    ours = table[0]["picture_mib"]
    return [row | {"times_ours": round(row["picture_mib"] / ours, 2)} for row in table]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--image-size", type=int, default=112, help="pixels of a tile's edge")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt, the picture among them")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens decoded per round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--memory-image-size", type=int, default=560, help="the same, where memory is measured"
    )
    parser.add_argument("--child", choices=("ours", "repeated", "transformers"), help=argparse.SUPPRESS)
    parser.add_argument("--note", default="", help="written beside the figures, such as 'busy machine'")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()

    if args.child:
        child(args)
        return

    import torch

    torch.set_num_threads(args.threads)
    memory: list[dict[str, Any]] = []
    table: list[dict[str, Any]] = []
    shares: dict[str, float] = {}
    for name in args.dtypes:
        found, shares[name] = compare(args, getattr(torch, name))
        table += found
        memory += measure_memory(args, name)
    goals = targets(table, shares)
    show(table)
    print()
    show(memory)
    print()
    show(goals)
    source = provenance(("torch", "transformers"))
    source["note"] = args.note
    save(args.output / "vision_cpu.csv", table, source)
    save(args.output / "vision_cpu_memory.csv", memory, source)
    save(args.output / "vision_cpu_targets.csv", goals, source)
    source["command"] = "python benchmarks/vision.py " + " ".join(sys.argv[1:])
    title = f"A picture on a CPU: scaled-down Llama 3.2-Vision, random weights, prompt {args.prompt}"
    save_markdown(args.output / "vision_cpu.md", title, [goals, table, memory], source)


if __name__ == "__main__":
    main()
