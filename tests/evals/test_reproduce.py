"""Reproduction of the nano family with stand-ins for the trainers: order, resuming, installing, cards."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from core_llm.errors import UserError
from evals import readme, reproduce


class Trainers:
    """Stands in for the console scripts: a trainer leaves a small model, `evals run` a results file."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.called = fails, list[str]()

    def __call__(self, command: list[str], log: Path | None = None, threads: int | None = None) -> None:
        flags = dict(zip(command[-len(command) :], command[1:], strict=False))
        self.called.append(command[0])
        if command[0] == self.fails:
            raise UserError(f"`{command[0]}` failed")
        if command[0] == "evals":
            tasks = command[2 : command.index("--model")]
            entries = [self.entry(task) for task in tasks]
            path = Path(flags["--output"])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(entries))
            return
        folder = Path(flags["--out"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
        save_file({"weight": torch.zeros(3, 4, dtype=torch.bfloat16)}, folder / "model.safetensors")

    @staticmethod
    def entry(task: str) -> dict[str, Any]:
        metrics = {"accuracy": {"value": 0.9, "ci95": [0.8, 1.0]}}
        return {
            "task": task,
            "n": 10,
            "metrics": metrics,
            "controls": {},
            "section": "text",
            "title": task,
        } | {"provenance": {"command": f"evals run {task}"}}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree with empty packages."""
    for package in ("core_llm", "vision_adapter", "speech_adapter", "guard"):
        (tmp_path / "packages" / package / "src" / package).mkdir(parents=True)
    (tmp_path / "README.md").write_text(f"{readme.BEGIN}\n{readme.END}\n")
    monkeypatch.setattr(reproduce, "_root", lambda: tmp_path)
    return tmp_path


def test_stages_weights_and_cards(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainers = Trainers()
    monkeypatch.setattr(reproduce, "_call", trainers)
    reproduce.reproduce(tmp_path, tmp_path / "runs", seed=0, install=True)
    assert sorted(trainers.called[:2]) == ["core-llm", "vision-adapter"]
    assert sorted(trainers.called[2:5]) == ["guard", "speech-adapter", "vision-adapter"]
    assert trainers.called[5:] == ["evals", "evals"]
    assert "0.900" in (tree / "README.md").read_text()
    for package in ("core_llm", "vision_adapter", "speech_adapter", "guard"):
        assert (tree / "packages" / package / "src" / package / "nano" / "model.safetensors").exists()
    card = (tree / "docs" / "model_cards" / "vision_adapter.md").read_text()
    for part in ("easy-VQA", "MIT", "Seed 0", "Parameters: 12", "docs/results/nano_datasets.json", "0.900"):
        assert part in card


def test_failed_stage_is_repeated_and_finished_ones_are_not(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduce, "_call", Trainers(fails="speech-adapter"))
    with pytest.raises(UserError):
        reproduce.reproduce(tmp_path, tmp_path / "runs", seed=0, install=True)
    assert not (tree / "docs").exists()
    rest = Trainers()
    monkeypatch.setattr(reproduce, "_call", rest)
    reproduce.reproduce(tmp_path, tmp_path / "runs", seed=0, install=True)
    assert rest.called == ["speech-adapter", "evals", "evals"]


def test_weights_beyond_the_limit_are_not_installed(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduce, "_call", Trainers())
    monkeypatch.setattr(reproduce, "WEIGHT_LIMIT", 100)
    with pytest.raises(UserError, match="MB"):
        reproduce.reproduce(tmp_path, tmp_path / "runs", seed=0, install=True)
    assert not list(tree.glob("packages/*/src/*/nano"))


def test_failing_script_names_itself() -> None:
    with pytest.raises(UserError, match="evals run"):
        reproduce._call(["evals", "run", "no-such-task"])


def test_last_line_is_the_newest_state_of_a_progress_bar(tmp_path: Path) -> None:
    log = tmp_path / "stage.log"
    assert reproduce._last_line(log) == ""
    log.write_text("starting\nvision:   1%|\rvision:  50%|=====     \n\n")
    assert reproduce._last_line(log) == "vision:  50%|====="


def test_a_killed_run_takes_its_trainers_along(tmp_path: Path) -> None:
    child = "import time\nfor _ in range(600):\n    print('child', flush=True)\n    time.sleep(0.1)\n"
    parent = (
        "from pathlib import Path\nfrom core_llm import cli_tools\nfrom evals import reproduce\n"
        "def main() -> None:\n"
        "    stages = [reproduce.Stage(n, ('python', '-c', Path('child.py').read_text())) for n in 'ab']\n"
        "    reproduce._train_side_by_side(stages, Path('.'))\n"
        "cli_tools.run('test', 'test', main, [])\n"
    )
    (tmp_path / "child.py").write_text(child)
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path, stdout=subprocess.DEVNULL)
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    deadline = time.monotonic() + 60
    while not all(log.exists() and log.stat().st_size for log in logs):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=20) == 143
    sizes = [log.stat().st_size for log in logs]
    time.sleep(0.5)
    assert [log.stat().st_size for log in logs] == sizes
