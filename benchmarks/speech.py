"""Speed of the speech adapter on a CPU: features and encoder against openai-whisper's, and nano in real time.

Ours and openai-whisper's take turns in one process; ratios are medians over rounds of paired figures. Log-mel
is computed of the same samples, and that both agree is checked first. The encoders run in fp32 over the same
features [1, 3000, 80] (30 s) with the same width, layers, heads and frames (1,500 of 20 ms), both with
torch's fused attention; the Conformer's feed-forwards are as wide as gives both the same number of parameters
(within 1 %). Beside it stand the Conformer whose two feed-forwards are together as wide as Whisper's one,
which has a fifth more parameters, and that at its own 40 ms per frame. The real-time factor is
the time from a file to its written text over the file's duration, one clip at a time, over the bundled clips.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from reporting import provenance, save, save_markdown, show  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
CLIPS = Path(__file__).resolve().parents[1] / "evals" / "samples"
SIZES = {
    "tiny": (384, 4, 6),
    "base": (512, 6, 8),
    "small": (768, 12, 12),
}  # width, layers, heads of Whisper's


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def paired(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in every round; they take turns, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return times


def rows(what: str, times: dict[str, list[float]], notes: dict[str, str]) -> list[dict[str, Any]]:
    """One row per engine; `times_whisper` is openai-whisper's time over this one's."""
    base = times["openai-whisper"]
    return [
        {
            "what": what,
            "engine": name,
            "note": notes.get(name, ""),
            "median_ms": round(statistics.median(values) * 1e3, 2),
            "min_ms": round(min(values) * 1e3, 2),
            "max_ms": round(max(values) * 1e3, 2),
            "times_whisper": round(statistics.median(b / a for a, b in zip(values, base, strict=True)), 2),
        }
        for name, values in times.items()
    ]


def features(rounds: int) -> list[dict[str, Any]]:
    """Log-mel of 1, 10 and 30 s."""
    import torch
    import whisper

    from speech_adapter.features import log_mel, whisper_scale

    table = []
    for length in (1, 10, 30):
        samples = torch.randn(length * 16_000) * 0.1

        def ours(samples: torch.Tensor = samples) -> torch.Tensor:
            return whisper_scale(log_mel(samples)).T

        def theirs(samples: torch.Tensor = samples) -> torch.Tensor:
            return whisper.log_mel_spectrogram(samples)

        gap = float((ours() - theirs()).abs().max())
        assert gap < 1e-4, f"log-mels differ by {gap}"
        table += rows(f"log-mel of {length} s", paired({"ours": ours, "openai-whisper": theirs}, rounds), {})
    return table


def parameters(module: Any) -> int:
    """How many numbers a module learns."""
    return sum(p.numel() for p in module.parameters())


def encoders(size: str, rounds: int) -> list[dict[str, Any]]:
    """30 s of features through both encoders."""
    import torch
    from whisper.model import AudioEncoder as Whisper

    from speech_adapter.config import SpeechConfig
    from speech_adapter.encoders import ConformerEncoder

    dim, n_layers, n_heads = SIZES[size]
    sizes: dict[str, Any] = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads}
    torch.manual_seed(0)
    theirs = Whisper(80, 1500, dim, n_heads, n_layers).eval()
    wide = ConformerEncoder(SpeechConfig(64, **sizes, ffn_dim=2 * dim, stack=2)).eval()
    own = ConformerEncoder(SpeechConfig(64, **sizes, ffn_dim=2 * dim)).eval()
    # Each unit of width costs 2 dim weights and a bias in both feed-forwards of a layer.
    surplus = (parameters(wide) - parameters(theirs)) / (n_layers * 2 * (2 * dim + 1))
    equal = 16 * round((2 * dim - surplus) / 16)
    same = ConformerEncoder(SpeechConfig(64, **sizes, ffn_dim=equal, stack=2)).eval()
    assert abs(parameters(same) / parameters(theirs) - 1) < 0.01
    mel, frames = torch.randn(1, 3000, 80), torch.tensor([3000])
    assert same.encode(mel, frames).hidden.shape == theirs(mel.transpose(1, 2)).shape == (1, 1500, dim)
    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: same.encode(mel, frames),
        "openai-whisper": lambda: theirs(mel.transpose(1, 2)),
        "ours, wider": lambda: wide.encode(mel, frames),
        "ours, wider, 40 ms": lambda: own.encode(mel, frames),
    }
    modules = {"ours": same, "openai-whisper": theirs, "ours, wider": wide, "ours, wider, 40 ms": own}
    notes = {name: f"{parameters(module) / 1e6:.1f} M parameters" for name, module in modules.items()}
    return rows(f"encoder of 30 s, Whisper's {size}", paired(calls, rounds), notes)


def real_time(limit: int | None) -> list[dict[str, Any]]:
    """Nano over the bundled clips: the encoder with its features, and all up to the text."""
    from core_llm.adapters import Assistant
    from core_llm.chat import Audio
    from core_llm.checkpoint import load_core
    from core_llm.sampling import Sampling
    from speech_adapter import load
    from speech_adapter.audio import SAMPLE_RATE, decode
    from speech_adapter.transcribe import recognition_request

    core, tokenizer = load_core("nano")
    adapter = load("nano", core)
    assistant = Assistant(core, tokenizer, [adapter])
    listed = json.loads((CLIPS / "clips.json").read_text())
    table = []
    for kind, clips in listed.items():
        files = [CLIPS / clip["file"] for clip in clips[:limit]]
        duration = sum(len(decode(file)) for file in files) / SAMPLE_RATE

        def hear(file: Path) -> None:
            adapter.encode(adapter.preprocess([Audio(file)]))

        def write(file: Path) -> None:
            assistant.generate([recognition_request(Audio(file))], Sampling(max_new_tokens=64))

        for what, call in (("features and encoder", hear), ("file to text", write)):
            call(files[0])
            spent = sum(seconds(partial(call, file)) for file in files)
            table.append(
                {
                    "clips": f"{len(files)} {kind}",
                    "audio_s": round(duration, 1),
                    "what": what,
                    "spent_s": round(spent, 3),
                    "real_time_factor": round(spent / duration, 4),
                }
            )
    return table


def targets(table: list[dict[str, Any]], factors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was to be reached, and what was."""
    goals = [(f"{row['what']}, times openai-whisper", row["times_whisper"], ">= 1.0")
             for row in table if row["engine"] == "ours"]  # fmt: skip
    goals += [(f"real-time factor, {row['clips']}, {row['what']}", row["real_time_factor"], "<= 0.05")
              for row in factors if row["what"] == "file to text"]  # fmt: skip
    return [
        {
            "target": name,
            "measured": value,
            "reach": reach,
            "reached": "yes" if (value >= 1.0 if reach.startswith(">") else value <= 0.05) else "NO",
        }
        for name, value, reach in goals
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["tiny", "base"], choices=list(SIZES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clips", type=int, default=None, help="at most this many of each kind (all)")
    parser.add_argument("--note", default="", help="written beside the figures, such as 'busy machine'")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()

    import torch

    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        table = features(args.rounds)
        for size in args.sizes:
            table += encoders(size, args.rounds)
        factors = real_time(args.clips)
    goals = targets(table, factors)
    for part in (table, factors, goals):
        show(part)
        print()
    source = provenance(("torch", "openai-whisper"))
    source["note"] = args.note
    save(args.output / "speech_cpu.csv", table, source)
    save(args.output / "speech_cpu_real_time.csv", factors, source)
    save(args.output / "speech_cpu_targets.csv", goals, source)
    source["command"] = "python benchmarks/speech.py " + " ".join(sys.argv[1:])
    title = "Speech on a CPU: features, encoder and real-time factor"
    save_markdown(args.output / "speech_cpu.md", title, [goals, table, factors], source)


if __name__ == "__main__":
    main()
