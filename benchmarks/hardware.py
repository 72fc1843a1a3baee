"""What a result must say about where it came from."""

import datetime
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def provenance(packages: tuple[str, ...] = ("torch",)) -> dict[str, str]:
    """Date, commit, processor or GPU, and versions: the columns that every results file begins with."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "hardware": hardware(),
        "versions": " ".join(filter(None, map(_version, packages))),
    }


def commit() -> str:
    """Short hash of the checkout, with a + where tracked files differ from it."""
    root = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def hardware() -> str:
    """The GPU if there is one, else the processor with its number of cores and its widest instructions."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return f"{package}-{version(package)}"
    except PackageNotFoundError:
        return ""
