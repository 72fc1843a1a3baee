"""Speed of generation with random weights: prefill, decode, memory and start, against peers in the same run.

On a CPU: ours in bf16, int8 and int4, transformers in bf16, llama.cpp in BF16, Q8_0 and Q4_0 where
llama-cpp-python and gguf are installed. Every engine lives in a process of its own; in every round each has
its turn, and so has a plain reading of memory, so that all see the same changes of a shared machine. Ratios
are medians over rounds of paired figures.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from reporting import provenance, save, save_markdown, show  # noqa: E402
from weights import bytes_per_token, weight_bytes, write_all  # noqa: E402

if TYPE_CHECKING:
    from core_llm.config import LlamaConfig

RESULTS = Path(__file__).resolve().parent / "results"
PEERS = ("llama.cpp bf16", "llama.cpp q8_0", "llama.cpp q4_0")
ENGINES = ("ours bf16", "ours int8", "ours int4", "transformers bf16")
PROBES = {"read": 3, "attend": 200, "sdpa": 20}  # repetitions per round
SLOW_PREFILL = 20.0  # seconds; a slower engine does not repeat its prefill in every round
GIB = 1 << 30


@dataclass
class Worker:
    """One engine's process and what it has measured, in seconds per round."""

    name: str
    process: "subprocess.Popen[str]"
    facts: dict[str, float]
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)  # bytes per second read just before and after

    def ask(self, **command: Any) -> dict[str, float]:
        """Send one command and wait for the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return _answer(self)


def _answer(worker: Worker) -> dict[str, float]:
    assert worker.process.stdout is not None
    while line := worker.process.stdout.readline():
        if line.startswith("{"):
            answer: dict[str, float] = json.loads(line)
            worker.facts |= {k: v for k, v in answer.items() if k != "seconds"}
            return answer
    raise SystemExit(
        f"error: {worker.name} died with status {worker.process.wait()}; its message stands above"
    )


def start(name: str, folder: Path, threads: int) -> Worker:
    """Start an engine; its facts hold the seconds from here to its first token."""
    script = Path(__file__).with_name("engines.py")
    command = [sys.executable, str(script), name, str(folder), str(threads), str(time.monotonic())]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    worker = Worker(name, process, {})
    _answer(worker)
    return worker


def bandwidth(reader: Worker) -> float:
    """Bytes per second that a plain reading of memory reaches at this moment."""
    return PROBES["read"] * GIB / reader.ask(do="decode", n=PROBES["read"])["seconds"]


def measure(workers: list[Worker], rounds: int, prompt: list[int], new_tokens: int) -> None:
    """All engines take turns, in a new order every round."""
    reader = next(w for w in workers if w.name == "read")
    order = [w for w in workers if w is not reader]
    rng = random.Random(0)
    for turn in range(rounds):
        rng.shuffle(order)
        for worker in order:
            probe = PROBES.get(worker.name)
            if probe is None and (not worker.prefill or worker.prefill[-1] < SLOW_PREFILL):
                worker.prefill.append(worker.ask(do="prefill", tokens=prompt)["seconds"])
            n = probe or new_tokens
            around = [bandwidth(reader)]
            worker.decode.append(worker.ask(do="decode", n=n)["seconds"] / n)
            around.append(bandwidth(reader))
            worker.read.append(statistics.mean(around))
            print(f"round {turn + 1}/{rounds}: {worker.name} {worker.decode[-1] * 1e3:.2f} ms", flush=True)


def rows(workers: list[Worker], folder: Path, config: LlamaConfig, prompt: int) -> list[dict[str, Any]]:
    """One row of figures per engine; speeds are medians over the rounds."""
    table = []
    for w in workers:
        if w.name in PROBES:
            continue
        size = weight_bytes(folder, w.name)
        step = bytes_per_token(folder, w.name, config)
        shares = [step / own / most for own, most in zip(w.decode, w.read, strict=True)]
        table.append(
            {
                "engine": w.name,
                "prefill_tokens_per_s": round(prompt / statistics.median(w.prefill), 2),
                "decode_tokens_per_s": round(1 / statistics.median(w.decode), 2),
                "decode_min": round(1 / max(w.decode), 2),
                "decode_max": round(1 / min(w.decode), 2),
                "share_of_read_bandwidth": round(statistics.median(shares), 3),
                "weights_gib": round(size / GIB, 3),
                "peak_gib": round(w.facts["peak_bytes"] / GIB, 3),
                "imports_gib": round(w.facts["imported_bytes"] / GIB, 3),
                "start_s": round(w.facts["start_s"], 2),
            }
        )
    return table


def ratio(workers: dict[str, Worker], ours: str, peer: str, kind: str = "decode") -> float | None:
    """How many times as fast as a peer: the median of the rounds' ratios; None without the peer."""
    if ours not in workers or peer not in workers:
        return None
    mine, other = getattr(workers[ours], kind), getattr(workers[peer], kind)
    if len(mine) != len(other):  # a slow peer that did not repeat
        return statistics.median(other) / statistics.median(mine)
    return statistics.median(b / a for a, b in zip(mine, other, strict=True))


def targets(workers: list[Worker], table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was to be reached, and what was."""
    by_name = {w.name: w for w in workers}
    ours = {row["engine"]: row for row in table}
    bf16, hf = ours["ours bf16"], ours.get("transformers bf16")
    held, above = bf16["peak_gib"], bf16["peak_gib"] - bf16["imports_gib"]
    start = bf16["start_s"] / hf["start_s"] if hf else None
    goals: list[tuple[str, float | None, float, bool]] = [
        ("decode bf16, times transformers", ratio(by_name, "ours bf16", "transformers bf16"), 1.8, True),
        ("decode bf16, times llama.cpp BF16", ratio(by_name, "ours bf16", "llama.cpp bf16"), 0.95, True),
        ("decode bf16, share of read bandwidth", bf16["share_of_read_bandwidth"], 0.85, True),
        ("decode int8, times llama.cpp Q8_0", ratio(by_name, "ours int8", "llama.cpp q8_0"), 1.0, True),
        ("decode int4, times llama.cpp Q4_0", ratio(by_name, "ours int4", "llama.cpp q4_0"), 0.8, True),
        (
            "prefill bf16, times transformers",
            ratio(by_name, "ours bf16", "transformers bf16", "prefill"),
            1.0,
            True,
        ),
        ("attention over 4,096 keys, times SDPA", ratio(by_name, "attend", "sdpa"), 10.0, True),
        ("peak memory bf16 with all imports, times the weights", held / bf16["weights_gib"], 1.15, False),
        ("peak memory bf16 above imports, times the weights", above / bf16["weights_gib"], 1.15, False),
        ("start to first token, times transformers", start, 1.0, False),
    ]
    return [
        {
            "target": name,
            "measured": None if value is None else round(value, 3),
            "reach": f"{'>=' if at_least else '<='} {bound}",
            "reached": "not measured" if value is None else ("yes" if (value >= bound) == at_least else "NO"),
        }
        for name, value, bound, at_least in goals
    ]


def engines(peers: bool) -> list[str]:
    """The engines at hand: llama.cpp only where it and its file writer are installed."""
    from importlib.util import find_spec

    if peers and not (find_spec("llama_cpp") and find_spec("gguf")):
        print("llama.cpp is left out: pip install llama-cpp-python gguf (compiles for about five minutes)")
        peers = False
    return [*PROBES, *ENGINES, *(PEERS if peers else ())]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="llama-3.2-1b", help="shape of the model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=24, help="tokens decoded per engine and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines", nargs="*", help="only these (default: all), such as 'ours int8'")
    parser.add_argument("--no-peers", action="store_true", help="leave llama.cpp out")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/benchmark"), help="for the weights, about 10 GB"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()

    import torch

    from core_llm.config import preset

    torch.set_num_threads(args.threads)
    names = engines(not args.no_peers)
    folder = args.folder / args.preset
    write_all(folder, preset(args.preset), any(name in names for name in PEERS))
    if args.engines:
        names = [name for name in names if name in ("read", "ours bf16", *args.engines)]
    workers = []
    for name in names:
        print(f"starting {name}", flush=True)
        workers.append(start(name, folder, args.threads))
    prompt = torch.randint(0, preset(args.preset).vocab_size, (args.prompt,)).tolist()
    measure(workers, args.rounds, prompt, args.new_tokens)
    table = rows(workers, folder, preset(args.preset), args.prompt)
    goals = targets(workers, table)
    read = statistics.median(value for w in workers for value in w.read) / 1e9
    print(f"\nread bandwidth {read:.1f} GB/s (median over the run)\n")
    show(table)
    print()
    show(goals)
    source = provenance(("torch", "transformers", "llama_cpp_python"))
    source["read_gb_per_s"] = f"{read:.1f}"
    save(args.output / "generate_cpu.csv", table, source)
    save(args.output / "generate_cpu_targets.csv", goals, source)
    source["command"] = "python benchmarks/generate.py " + " ".join(sys.argv[1:])
    title = f"Generation on a CPU: {args.preset}, random weights, batch 1, prompt {args.prompt}"
    save_markdown(args.output / "generate_cpu.md", title, [goals, table], source)


if __name__ == "__main__":
    main()
