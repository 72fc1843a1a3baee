"""Where a number came from: versions, commit, command, hardware, model and data."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "transformers", "scikit-learn", "numpy", "core-llm")


def collect(model: str, hashes: dict[str, str], seed: int, quantization: str | None = None) -> dict[str, Any]:
    """What all tasks of one run share."""
    name = Path(model).name
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(sys.argv),
        "commit": commit(),
        "seed": seed,
        "model": f"{name} ({quantization})" if quantization else name,
        "quantization": quantization,
        "model_sha256": hashes,
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        "hardware": hardware(),
    }


def command(argv: Sequence[str]) -> str:
    """The command line; absolute paths are cut to their last part, since they say nothing elsewhere."""
    shown = [Path(word).name if Path(word).is_absolute() else word for word in argv[1:]]
    for i, word in enumerate(argv[1:-1]):
        if word == "--data-root":
            shown[i + 1] = "DATA_ROOT"
    return shlex.join([Path(argv[0]).name, *shown])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the source tree, "+changes" when it differs; None outside a git checkout."""
    root = Path(__file__).parent
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *args: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *args], capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout.strip()


def hardware() -> str:
    """The processor, the cores this process may use, and the GPU if there is one."""
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        name = models[0] if models else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {cores} cores{gpu}"
