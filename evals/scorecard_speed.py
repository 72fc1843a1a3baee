"""Speed and memory of a model, in a process of its own, so that the harness weighs nothing in them."""

import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core_llm.errors import UserError

ROUNDS = 5
PROMPT_TOKENS, NEW_TOKENS = 256, 64
CLIPS = 8
_LIMIT = 3600  # seconds


@dataclass(frozen=True)
class Figure:
    """One figure. low, high: smallest and largest of `rounds`; equal for what does not vary."""

    name: str
    unit: str
    value: float
    low: float
    high: float
    rounds: int
    note: str = ""
    lower_is_better: bool = False


def measure(model: str, quantization: str | None = None) -> list[Figure]:
    """Measure in a fresh process. Raises `UserError` with the last line of what went wrong there."""
    command = [sys.executable, "-m", "evals.scorecard_speed", json.dumps([model, quantization])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LIMIT)
    except subprocess.TimeoutExpired:
        raise UserError(f"speed: no figures after {_LIMIT // 60} minutes") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"speed: {lines[-1] if lines else f'status {done.returncode}'}")
    return [Figure(**values) for values in json.loads(done.stdout.splitlines()[-1])]


def sizes(model: str) -> dict[str, tuple[int, int]]:
    """Parameters and bytes on disk of each part of one of the project's own models, from the files' headers.

    Empty for what runs elsewhere or has no such files.
    """
    from evals.models import folders

    try:
        places = folders(model)
    except UserError:
        return {}
    found = {}
    for kind, folder in places.items():
        files = sorted(folder.glob("*.safetensors"))
        if files:
            shapes = [shape for path in files for shape in _shapes(path)]
            found[kind] = (sum(map(_product, shapes)), sum(path.stat().st_size for path in files))
    return found


def _shapes(path: Path) -> list[Sequence[int]]:
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return [value["shape"] for key, value in header.items() if key != "__metadata__"]


def _product(shape: Sequence[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def _peak() -> float:
    """Largest resident set of this process so far, in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would hand down the peak of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS counts in bytes


def _seconds(call: Callable[[], Any]) -> list[float]:
    """Wall times of `ROUNDS` calls after one that does not count."""
    call()
    gc.collect()
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times


def _rate(name: str, unit: str, work: float, times: Sequence[float], note: str = "") -> Figure:
    """Work per second: the median, the slowest and the fastest round."""
    return Figure(
        name, unit, work / statistics.median(times), work / max(times), work / min(times), len(times), note
    )


def _cost(name: str, unit: str, per: float, times: Sequence[float], note: str = "") -> Figure:
    """Seconds per unit of work; lower is better."""
    middle, low, high = (f(times) / per for f in (statistics.median, min, max))
    return Figure(name, unit, middle, low, high, len(times), note, lower_is_better=True)


def _once(name: str, unit: str, value: float, note: str = "") -> Figure:
    return Figure(name, unit, value, value, value, 1, note, lower_is_better=True)


def _figures(model: str, quantization: str | None) -> list[Figure]:
    """All figures that this model has, measured in this process."""
    import torch

    from core_llm.chat import Message
    from evals.models import Subject, open_model

    count = torch.get_num_threads()
    threads = f"{count} thread{'s' if count > 1 else ''}"
    subject = open_model(model, quantization=quantization)
    before, started = _peak(), time.perf_counter()
    asked = [[Message("user", "what is two plus three?")]]
    can_talk = _can(subject, ("core",))
    if can_talk:
        subject.generate(asked, 1)
    loading = time.perf_counter() - started
    found = []
    if isinstance(subject, Subject) and can_talk:
        found += _token_figures(subject, threads)
    elif can_talk:
        found.append(
            _cost("text answer", "s per answer", 1, _seconds(lambda: subject.generate(asked, NEW_TOKENS)))
        )
    found += _media_figures(subject, threads)
    if _can(subject, ("guard",)):
        verdict = _seconds(lambda: subject.score(asked))
        found.append(_cost("guard verdict", "s per verdict", 1, verdict, "one short request at a time"))
    if torch.cuda.is_available():
        found.append(
            _once("peak GPU memory", "MB", torch.cuda.max_memory_allocated() / 1e6, "allocated tensors")
        )
    found.append(_once("start", "s", loading, "until the first token, weights read from disk"))
    found.append(
        _once("peak memory", "MB", _peak(), f"resident, all parts used; {before:.0f} MB without a model")
    )
    return found


def _can(subject: Any, needs: Sequence[str]) -> bool:
    try:
        subject.require(needs, "speed")
    except UserError:
        return False
    return True


def _token_figures(subject: Any, threads: str) -> list[Figure]:
    """Tokens per second of the core: reading a prompt, and writing with a batch of one."""
    from core_llm.generate import generate
    from core_llm.sampling import Sampling

    core, tokenizer = subject.assistant.core, subject.assistant.tokenizer
    room = core.config.max_positions
    ids = tokenizer.encode("the red circle is left of the blue square. ") * PROMPT_TOKENS
    prompt, short = ids[: min(PROMPT_TOKENS, room // 2)], ids[:8]
    new = min(NEW_TOKENS, room // 2)
    # Stop tokens are ignored, so that every round writes as many.
    read = _seconds(lambda: generate(core, [prompt], Sampling(max_new_tokens=1), stop_ids=()))
    one = _seconds(lambda: generate(core, [short], Sampling(max_new_tokens=1), stop_ids=()))
    write = _seconds(lambda: generate(core, [short], Sampling(max_new_tokens=new + 1), stop_ids=()))
    start = statistics.median(one)
    return [
        _rate("reading", "tokens/s", len(prompt), read, f"prompt of {len(prompt)} tokens, {threads}"),
        _rate(
            "writing", "tokens/s", new, [t - start for t in write], f"{new} tokens, batch of one, {threads}"
        ),
    ]


def _media_figures(subject: Any, threads: str) -> list[Figure]:
    """Real-time factor on bundled clips, seconds per question on bundled pictures."""
    from core_llm.chat import Image, Message, Text

    found = []
    if _can(subject, ("core", "audio")):
        import soundfile

        from core_llm.chat import Audio
        from evals.tasks.speech import CLIPS as FOLDER
        from evals.tasks.speech import _recognition, bundled_clips

        files = [FOLDER / clip["file"] for clip in bundled_clips()["digits"][:CLIPS]]
        length = sum(soundfile.info(file).duration for file in files)
        asked = [[*_recognition(Audio(file))] for file in files]
        times = _seconds(lambda: [subject.generate([one], 32) for one in asked])
        note = f"{len(files)} clips of {length:.0f} s in all, one at a time, {threads}"
        found.append(_cost("speech", "s per s of sound (RTF)", length, times, note))
    if _can(subject, ("core", "image")):
        from evals.tasks.vision import bundled_scene

        pictures = [bundled_scene(i)[1] for i in range(CLIPS)]
        asked = [[Message("user", (Image(p), Text("what color is the shape?")))] for p in pictures]
        times = _seconds(lambda: [subject.generate([one], 8) for one in asked])
        found.append(
            _cost("image question", "s per question", len(asked), times, f"one at a time, {threads}")
        )
    return found


def main() -> None:
    """Measure what the one argument names and print the figures as JSON on the last line."""
    model, quantization = json.loads(sys.argv[1])
    try:
        figures = _figures(model, quantization)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    print(json.dumps([asdict(figure) for figure in figures]))


def from_json(values: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Figures that were kept."""
    return [Figure(**value) for value in values]


if __name__ == "__main__":
    main()
