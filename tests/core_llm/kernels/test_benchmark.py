"""benchmarks/kernels.py runs as it would on a GPU machine: by its path alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "kernels.py"


def run(*options: str) -> "subprocess.CompletedProcess[str]":
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_smoke_run_checks_and_times_every_path(tmp_path: Path) -> None:
    done = run("--smoke", "--out", str(tmp_path / "kernels.csv"))
    assert done.returncode == 0, done.stdout + done.stderr  # it fails where an error is too high
    for line in (
        "prefill            triton",
        "packed             triton",
        "decode             triton_decode",
    ):
        assert line in done.stdout
    assert not list(tmp_path.iterdir())  # no figures from a run that measures nothing


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = run()
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no NVIDIA GPU" in done.stderr
