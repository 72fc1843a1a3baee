"""Runs that are stopped, continued, begun twice or given damaged state: `guard prune` end to end."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core_llm.errors import UserError
from core_llm.files import lock
from core_llm.train.fit import FitConfig
from guard import distillation
from guard.distillation import DistilTask
from guard.guard import Guard
from guard.runs import PruneRun


class Killed(BaseException):
    """Stands for a kill: nothing in the program may catch it."""


@pytest.fixture(scope="module")
def model(guard: Guard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    guard.save(folder)
    rows = [
        {"text": f"{'red' if i % 3 else 'blue'} number {i} " * (1 + i % 5), "label": int(i % 3 > 0)}
        for i in range(120)
    ]
    (folder.parent / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def prune(model: Path, out: Path, **changes: Any) -> PruneRun:
    run = PruneRun(
        out=out, data_root=None, sets=(), data=(model.parent / "own.jsonl",), held_out=0.1,
        near_duplicates=0.0, drop_repeated=False, temperature=2.0, steps=6, lr=1e-3, batch=8, seed=0,
        device="cpu", resume=True, model=str(model), layers=1, ffn=64, head="verdict", quantize="int8",
        qat=True, rows=16,
    )  # fmt: skip
    return replace(run, **changes)


def weights(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.*"))}


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """State after every second step, opinions after every 16 rows."""
    monkeypatch.setattr("guard.runs.FitConfig", lambda *a, **k: FitConfig(*a, **{**k, "save_every": 2}))
    monkeypatch.setattr(distillation, "_CHUNK", 16)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run comes to that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole") / "out"
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(distillation, "_CHUNK", 16)
    prune(model, out).run()
    monkeypatch.undo()
    return weights(out)


def killed_at(step: int, run: PruneRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run until it is killed in the middle of a step."""
    loss: Callable[..., Any] = DistilTask.loss

    def until(self: DistilTask, batch: Any) -> Any:
        if self._step == step:
            raise Killed
        return loss(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(DistilTask, "loss", until)
        with pytest.raises(Killed):
            run.run()


@pytest.mark.parametrize("step", [1, 5])
def test_a_killed_prune_goes_on_to_the_same_bytes(
    model: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    run = prune(model, tmp_path / "out")
    killed_at(step, run, monkeypatch)
    assert not (tmp_path / "out" / "compression.md").exists()
    steps: list[int] = []
    loss: Callable[..., Any] = DistilTask.loss
    monkeypatch.setattr(
        DistilTask, "loss", lambda self, batch: (steps.append(self._step), loss(self, batch))[1]
    )
    run.run()
    assert steps == list(range(step // 2 * 2, 6))  # from the last state, not from the beginning
    assert weights(tmp_path / "out") == whole


def test_a_prune_that_is_killed_while_the_teacher_speaks_gets_the_same_opinions(
    model: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, cache = prune(model, tmp_path / "out"), tmp_path / "out" / "state" / "opinions.jsonl"
    append = distillation._append
    lines = 0

    def half(path: Path, line: str) -> None:
        nonlocal lines
        lines += 1
        if lines == 2:
            with path.open("a") as file:
                file.write(line[: len(line) // 2])
            raise Killed
        append(path, line)

    with monkeypatch.context() as patch:
        patch.setattr(distillation, "_append", half)
        with pytest.raises(Killed):
            run.run()
    run.run()
    assert weights(tmp_path / "out") == whole
    known = distillation._read_cache(cache)
    assert len(known) >= 48  # 6 steps of 8 rows; the cut line cost none of those behind it
    cache.write_bytes(b'\xff\xfe\n5\n{"a": 1}\n[["x", 3]]\n' + cache.read_bytes())
    assert distillation._read_cache(cache) == known


def test_other_settings_never_continue_a_run(
    model: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    killed_at(5, prune(model, out, lr=5e-3), monkeypatch)
    with pytest.raises(UserError, match="had --lr 0.005; give the same"):
        prune(model, out).run()
    # Begun anew, and killed before its own first state: what is continued then must not be the old one.
    killed_at(1, prune(model, out, resume=False), monkeypatch)
    prune(model, out).run()
    assert weights(out) == whole


def test_damaged_state_is_refused_in_one_line(
    model: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, state = prune(model, tmp_path / "out"), tmp_path / "out" / "state"
    killed_at(3, run, monkeypatch)
    for name, content, says in (
        ("guard-distil.state.pt", b"PK\x03\x04half a file", "delete it to start again"),
        ("settings.json", b"{", "--resume False"),
        ("settings.json", None, "--resume False"),
    ):
        path = state / name
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UserError, match=says):
            run.run()
    replace(run, resume=False).run()
    assert weights(tmp_path / "out") == whole


def test_places_that_a_run_cannot_write_to_are_refused_before_any_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guard.runs.load_data", lambda *_: pytest.fail("data were read"))
    with pytest.raises(UserError, match="made from"):
        prune(model, model.parent / "x" / ".." / model.name).run()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere" / "deep")
    for place in (tmp_path / "file", tmp_path / "file" / "x", Path("/proc/none"), tmp_path / "gone"):
        with pytest.raises(UserError, match="cannot write there"):
            prune(model, place).run()
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "busy" / "state").mkdir(parents=True)
    with (tmp_path / "busy" / "state" / "lock").open("w") as held:
        assert lock(held.fileno())
        with pytest.raises(UserError, match="another run is writing there"):
            prune(model, tmp_path / "busy").run()
    assert os.listdir(tmp_path / "busy" / "state") == ["lock"]
    with pytest.raises(UserError, match="unknown set"):
        prune(model, tmp_path / "no", sets=("nonsense",)).run()
    assert not (tmp_path / "no").exists()
