"""The nano family from scratch: train every part, install the weights, measure them, write their cards."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from core_llm.errors import CheckpointError, UserError
from core_llm.files import write_text
from evals import cards, readme
from evals.tasks import QUICKSTART

# All bundled weights together must stay below this in git.
WEIGHT_LIMIT = 24_000_000  # bytes
_KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
REPORT_SECONDS = 30.0  # between two lines of progress while several stages run
DATASET_TASKS = (
    "text-perplexity",
    "easy-vqa",
    "fsdd",
    "spoken-commands",
    "spoken-vqa",
    "guard-diasafety",
    "guard-openai-moderation",
)
# config.json last: without it a folder holds no model.
_FILES = ("tokenizer.json", "guard.json", "model.safetensors", "config.json")


_running: set["subprocess.Popen[bytes]"] = set()


@dataclass(frozen=True)
class Stage:
    """One trainer. `name` is the sub-folder of the model and the import package ("core" for core_llm)."""

    name: str
    command: tuple[str, ...]

    @property
    def package(self) -> str:
        return "core_llm" if self.name == "core" else self.name


def stages(data_root: Path | None, out: Path, seed: int) -> list[Stage]:
    """The trainers in order; every adapter is trained on the core of the first stage."""
    common = (*_data_flag(data_root), "--seed", str(seed))
    on_core = (*common, "--core", str(out / "core"))
    return [
        Stage("core", ("core-llm", "pretrain", *common, "--out", str(out / "core"))),
        Stage("vision_adapter", ("vision-adapter", "train", *on_core, "--out", str(out / "vision_adapter"))),
        Stage("speech_adapter", ("speech-adapter", "train", *on_core, "--out", str(out / "speech_adapter"))),
        Stage("guard", ("guard", "train", *on_core, "--out", str(out / "guard"))),
    ]


def encoder_stage(out: Path, seed: int) -> Stage:
    """The image encoder's own training, which needs no core: the vision adapter's stage finds it done."""
    folder = str(out / "vision_adapter")
    return Stage("vision_encoder", ("vision-adapter", "train-encoder", "--seed", str(seed), "--out", folder))


def reproduce(data_root: Path | None, out: Path, seed: int, install: bool) -> None:
    """Run the stages that are not finished, then install, evaluate and write the cards.

    Raises `UserError` when the data root is missing or a stage fails; finished stages are kept.
    """
    if data_root is not None and not data_root.is_dir():
        raise UserError(f"--data-root {data_root}: no such folder")
    out.mkdir(parents=True, exist_ok=True)
    plan = stages(data_root and data_root.resolve(), out.resolve(), seed)
    encoder = encoder_stage(out.resolve(), seed)
    # The core first: everything else is trained on it, but for the image encoder. One thread everywhere: sums
    # over more threads round differently, and the bundled weights were trained with one.
    _train_side_by_side([plan[0], encoder], out)
    _train_side_by_side(plan[1:], out)
    model = "nano" if install else str(out)
    docs = _root() / "docs" if install else out / "docs"
    if install:
        _install(plan, out)
    seconds = {stage.name: _spent(stage, out)["seconds"] for stage in plan}
    seconds["vision_adapter"] += _spent(encoder, out)["seconds"]
    started = time.perf_counter()
    for name, tasks in (("nano_bundled", QUICKSTART), ("nano_datasets", DATASET_TASKS)):
        result = docs / "results" / f"{name}.json"
        command = ["evals", "run", *tasks, "--model", model, "--seed", str(seed), "--output", str(result)]
        command += ["--records", str(out / "records"), "--report", str(out / f"report_{name}")]
        _call([*command, *_data_flag(data_root)])
    seconds["evaluation"] = time.perf_counter() - started
    for path in cards.write_all(out, docs, seed, seconds):
        print(f"model card: {path}")
    if install:
        readme.update(_root() / "README.md", sorted((docs / "results").glob("nano_*.json")))
    _show(seconds)


def _data_flag(data_root: Path | None) -> tuple[str, ...]:
    """Without a data root the datasets come from the hub."""
    return ("--data-root", str(data_root)) if data_root is not None else ()


def _root() -> Path:
    """The source tree; weights can only be installed into one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "packages").is_dir():
        raise UserError("evals is not installed from the source tree; use --install False")
    return root


def _spent(stage: Stage, out: Path) -> dict[str, float]:
    path = out / f"{stage.name}.stage.json"
    return json.loads(path.read_text()) if path.exists() else {"seconds": 0.0, "done": 0}


def _train(stage: Stage, out: Path, log: Path | None, threads: int | None = None) -> None:
    """Run a trainer unless it has finished; its wall time adds up over interruptions."""
    spent = _spent(stage, out)
    if spent["done"]:
        print(f"{stage.name}: finished before, {spent['seconds'] / 60:.1f} minutes", flush=True)
        return
    print(f"{stage.name}: training{f', see {log}' if log else ''}", flush=True)
    started = time.perf_counter()
    done = 0
    try:
        _call(list(stage.command), log, threads)
        done = 1
    finally:
        total = spent["seconds"] + time.perf_counter() - started
        write_text(out / f"{stage.name}.stage.json", json.dumps({"seconds": total, "done": done}) + "\n")
    print(f"{stage.name}: finished, {total / 60:.1f} minutes", flush=True)


def _train_side_by_side(plan: Sequence[Stage], out: Path) -> None:
    """Run stages that do not need each other, one thread each: models this small gain little from more."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    logs = [out / f"{stage.name}.log" for stage in plan]
    with ThreadPoolExecutor(max_workers=min(cores, len(plan))) as pool:
        running = [pool.submit(_train, stage, out, log, 1) for stage, log in zip(plan, logs, strict=True)]
        try:
            while wait(running, timeout=REPORT_SECONDS).not_done:
                for log in logs:
                    if progress := _last_line(log):
                        print(f"  {log.stem}: {progress}", flush=True)
        except BaseException:  # else the pool would wait for the trainers to finish
            for process in list(_running):
                process.terminate()
            raise
    for future in running:
        future.result()


def _last_line(log: Path) -> str:
    """The newest state of a trainer's progress bar."""
    if not log.exists():
        return ""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 2000))
        text = stream.read().decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1][-160:] if lines else ""


def _call(command: list[str], log: Path | None = None, threads: int | None = None) -> None:
    """Run one of our console scripts of this very environment, its output on our terminal or in a log."""
    script = Path(sys.executable).with_name(command[0])
    executable = str(script) if script.exists() else shutil.which(command[0])
    if executable is None:
        raise UserError(f"{command[0]} is not installed in this environment")
    # Threads that wait must not spin: on few cores they would take them from the ones that work. And
    # glibc must keep large blocks: to fetch them anew from the kernel at every step costs more than the sums.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **_KEEP_MEMORY, **os.environ}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("a")) if log is not None else None
        process = subprocess.Popen([executable, *command[1:]], env=environment, stdout=output, stderr=output)
        _running.add(process)
        try:
            status = process.wait()
        except BaseException:  # killed ourselves: a trainer left alone would fight with the next run's
            process.terminate()
            raise
        finally:
            _running.discard(process)
    if status:
        reason = f": {_last_line(log)}" if log is not None else ""
        raise UserError(
            f"`{command[0]} {command[1]}` failed with status {status}{reason}; the same command continues"
        )


def _install(plan: list[Stage], out: Path) -> None:
    """Copy the weights into the packages, if together they are small enough."""
    root = _root()
    sources = [out / stage.name / name for stage in plan for name in _FILES]
    sources = [path for path in sources if path.exists()]
    for stage in plan:
        if not (out / stage.name / "model.safetensors").exists():
            raise CheckpointError(f"{out / stage.name}: the trainer left no model.safetensors")
    total = sum(path.stat().st_size for path in sources)
    if total > WEIGHT_LIMIT:
        raise UserError(f"the weights take {total / 1e6:.1f} MB, more than {WEIGHT_LIMIT / 1e6:.0f} MB")
    packages = {stage.name: stage.package for stage in plan}
    for path in sources:
        package = packages[path.parent.name]
        folder = root / "packages" / package / "src" / package / "nano"
        folder.mkdir(exist_ok=True)
        temporary = folder / f"{path.name}.tmp"
        shutil.copyfile(path, temporary)
        os.replace(temporary, folder / path.name)
    print(f"installed {total / 1e6:.1f} MB of weights into packages/*/src/*/nano")


def _show(seconds: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("stage", "minutes", title="Wall time (two stages run at a time)")
    for name, value in seconds.items():
        table.add_row(name, f"{value / 60:.1f}")
    Console().print(table)
