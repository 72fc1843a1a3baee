"""Speed of decoding and training on an NVIDIA GPU, with random weights of a preset's shape.

Needs torch, triton and this repository alone (PYTHONPATH=packages/core_llm/src). Decoding: tokens per second
at batch 1 in bf16 and int8, captured in a CUDA graph and compiled, against the time that reading the weights
takes at the bandwidth measured here. Training: tokens per second and the share of the multiplication speed
measured here. Without a GPU, `--smoke` runs every path on the CPU with a tiny shape.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from reporting import provenance, save, save_markdown, show  # noqa: E402

from core_llm.cache import KVCache  # noqa: E402
from core_llm.config import LlamaConfig, preset  # noqa: E402
from core_llm.model import Llama  # noqa: E402
from core_llm.rope import rope_frequencies  # noqa: E402
from core_llm.stepping import Engine, compiled_step, stepper  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
SMOKE = LlamaConfig(256, 2, 4, 2, 512, vocab_size=512, max_positions=1024, tied_embeddings=True)


def wait(device: torch.device) -> None:
    """Until the device has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of one call, after two to warm up."""
    run(), run()
    times = []
    for _ in range(repeats):
        wait(device)
        begun = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a copy."""
    source = torch.ones(1 << (30 if device.type == "cuda" else 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device, 10)


def multiplication_speed(device: torch.device) -> float:
    """FLOP/s of a large product in bf16 (fp32 on a CPU)."""
    n = 8192 if device.type == "cuda" else 512
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / seconds(lambda: a @ a, device, 10)


def random_core(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> Llama:
    """Uniform weights: their values change no speed."""
    with torch.device("meta"):
        core = Llama(config)
    core = core.to(dtype).to_empty(device=device)
    if config.tied_embeddings:
        core.lm_head.weight = core.embed_tokens.weight
    core.frequencies = rope_frequencies(config).to(device)
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.uniform_(-0.03, 0.03) if parameter.dim() > 1 else parameter.fill_(1)
    return core


def weight_bytes(core: Llama) -> int:
    """Bytes that one decode step reads: all weights but an embedding that is not the head."""
    head = core.lm_head
    tied = getattr(head, "weight", None) is core.embed_tokens.weight
    tensors = {t.data_ptr(): t for t in [*core.parameters(), *core.buffers()]}
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    embedding = core.embed_tokens.weight
    return total - (0 if tied else embedding.numel() * embedding.element_size())


@torch.inference_mode()
def decode(core: Llama, engine: Engine, prompt: int, new_tokens: int) -> float:
    """Seconds per token at batch 1 behind a prompt."""
    weight = core.embed_tokens.weight
    cache = KVCache(core.config, 1, min(core.config.max_positions, 1024), weight.dtype, weight.device)
    tokens = torch.randint(0, core.config.vocab_size, (1, prompt), device=weight.device)
    following = core.logits(core.hidden(tokens, cache=cache)[:, -1]).float().argmax(-1)
    step = stepper(core, cache, engine)
    for _ in range(4):  # compilation and capture
        following = step(following).float().argmax(-1)
    wait(weight.device)
    begun = time.perf_counter()
    for _ in range(new_tokens):
        following = step(following).float().argmax(-1)
    wait(weight.device)
    return (time.perf_counter() - begun) / new_tokens


def decoding(config: LlamaConfig, device: torch.device, limit: float, args: Any) -> list[dict[str, Any]]:
    """One row per dtype and engine."""
    table = []
    for scheme in (None, "int8"):
        core = random_core(config, device, torch.bfloat16).eval().requires_grad_(False)
        if scheme:
            from core_llm.quantize import pack, quantize

            quantize(core, scheme)
        size, library = weight_bytes(core), pack(core) if scheme else "torch"
        for engine in args.engines:
            row: dict[str, Any] = {"what": f"decode {scheme or 'bf16'}", "how": f"{engine}, {library}"}
            try:
                spent = decode(core, engine, args.prompt, args.new_tokens)
            except Exception as error:  # a benchmark reports what does not run and goes on
                table.append({**row, "tokens_per_s": "", "share": "", "note": repr(error)[:160]})
                continue
            share = size / limit / spent
            note = f"{size / 1e9:.2f} GB of weights, limit {limit / 1e9:.0f} GB/s"
            table.append({**row, "tokens_per_s": round(1 / spent, 1), "share": round(share, 3), "note": note})
            print(table[-1], flush=True)
        compiled_step.cache_clear()
        del core
    return table


def training(config: LlamaConfig, device: torch.device, peak: float, args: Any) -> list[dict[str, Any]]:
    """Forward, backward and an AdamW step on random tokens: bf16 by autocast over fp32 weights."""
    core = random_core(config, device, torch.float32).train()
    optimizer = torch.optim.AdamW(core.parameters(), lr=1e-5, fused=device.type == "cuda")
    if args.compile_blocks:
        for block in core.layers:
            block.compile()
    tokens = torch.randint(0, config.vocab_size, (args.batch, args.length + 1), device=device)

    def loss() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            hidden = core.hidden(tokens[:, :-1])
            total = torch.zeros((), device=device)
            for rows, targets in zip(hidden.flatten(0, 1).split(4096), tokens[:, 1:].flatten().split(4096)):
                logits = core.logits(rows).float()  # in chunks: logits of all tokens would not fit
                total = total + torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        return total / tokens[:, 1:].numel()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    spent = seconds(step, device, args.train_steps)
    count = args.batch * args.length
    weights = sum(p.numel() for p in core.parameters())
    # 6 FLOP per weight and token, and 12 L C T per token for attention (arXiv 2204.02311, appendix B)
    work = count * (6 * weights + 12 * config.n_layers * config.dim * args.length)
    note = f"batch {args.batch} x {args.length}, peak {peak / 1e12:.0f} TFLOP/s measured"
    how = "compiled blocks" if args.compile_blocks else "eager"
    share = round(work / spent / peak, 3)
    return [{"what": "train", "how": how, "tokens_per_s": round(count / spent), "share": share, "note": note}]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="llama-3.1-8b", help="shape to decode")
    parser.add_argument("--train-preset", default="llama-3.2-1b", help="shape to train")
    parser.add_argument("--engines", nargs="*", default=["cuda-graph", "compile"])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--train-steps", type=int, default=5)
    parser.add_argument("--compile-blocks", action="store_true", help="torch.compile every block in training")
    parser.add_argument("--smoke", action="store_true", help="on the CPU, tiny, to see that everything runs")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        raise SystemExit("error: no NVIDIA GPU here; --smoke runs every path on the CPU with a tiny shape")
    device = torch.device("cpu" if args.smoke else "cuda")
    shapes = (SMOKE, SMOKE) if args.smoke else (preset(args.preset), preset(args.train_preset))
    if args.smoke:
        args.engines, args.new_tokens, args.batch, args.length = ["eager", "static"], 8, 2, 64
    limit, peak = copy_bandwidth(device), multiplication_speed(device)
    table = decoding(shapes[0], device, limit, args) + training(shapes[1], device, peak, args)
    show(table)
    if not args.smoke:
        source = provenance(("torch", "triton", "torchao"))
        save(args.output / "generate_gpu.csv", table, source)
        save_markdown(args.output / "generate_gpu.md", "Generation and training on a GPU", [table], source)


if __name__ == "__main__":
    main()
