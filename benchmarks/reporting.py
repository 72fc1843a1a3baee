"""Results as tables and files, each with where it came from."""

import csv
import datetime
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


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


def show(table: list[dict[str, Any]]) -> None:
    """Print rows of equal keys in columns."""
    cells = [list(table[0]), *([str(v) for v in row.values()] for row in table)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def save(path: Path, table: list[dict[str, Any]], source: dict[str, str]) -> None:
    """Write rows as CSV, each with where it came from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, [*table[0], *source])
        writer.writeheader()
        writer.writerows({**row, **source} for row in table)
    print(f"wrote {path}")


def save_markdown(path: Path, title: str, tables: list[list[dict[str, Any]]], source: dict[str, str]) -> None:
    """The same rows for a reader."""
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in source.items())]
    for table in tables:
        lines += ["", "| " + " | ".join(table[0]) + " |", "|" + "---|" * len(table[0])]
        lines += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in table]
    path.write_text("\n".join(lines) + "\n")
    print(f"wrote {path}")
