"""Batches, ways of asking, and what a killed, repeated or shared run leaves on disk."""

import json
import multiprocessing
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core_llm.chat import Message
from core_llm.errors import UserError
from core_llm.testing import torchrun
from evals import answers, asking, records, run, runner
from evals.tasks import Options, find
from evals.tasks.base import Output, Sample, Task

# What torchrun starts: the same task, found in this very file.
PROGRAM = """
import importlib.util, sys
from pathlib import Path
from core_llm import processes
spec = importlib.util.spec_from_file_location("tested", sys.argv[1])
tested = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tested)
processes.start()
done = tested.backwards(Path(sys.argv[2]))
print(done.scored.n, done.scored.estimates["accuracy"].value, done.reused)
"""


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


class Backwards:
    """Says every question backwards, slowly."""

    name, quantization = "backwards", None
    part_hashes: dict[str, str] = {}

    def fingerprint(self, needs: Any) -> str:
        return "backwards"

    def generate(self, conversations: Any, max_new_tokens: int) -> list[str]:
        time.sleep(0.004)
        return [messages[-1].text[::-1] for messages in conversations]


def backwards(folder: Path) -> runner.Evaluation:
    rows = [
        Sample(str(i), str(i), (Message("user", f"question {i} " * (1 + i % 9)),), "x") for i in range(400)
    ]
    task = Task(
        "slow", "", "text", ("core",), "", "", ("accuracy",), "generate", lambda options: rows,
        lambda sample, output: {"correct": float(output["text"] == sample.messages[0].text[::-1])},
        batch_size=4,
    )  # fmt: skip
    return runner.evaluate(task, Backwards(), Options(), folder)  # type: ignore[arg-type]


def test_run_killed_again_and_again_loses_and_repeats_nothing(tmp_path: Path) -> None:
    path = tmp_path / "killed" / "slow.jsonl"
    seen = 0
    for more in (5, 60, 150):
        child = multiprocessing.get_context("fork").Process(target=backwards, args=(path.parent,))
        child.start()
        deadline = time.monotonic() + 60
        while len(lines_of(path)) < seen + more and time.monotonic() < deadline:
            time.sleep(0.001)
        child.kill()  # SIGKILL: nothing can clean up
        child.join()
        assert seen < len(lines_of(path)) < 400
        seen = len(lines_of(path))
    last = backwards(path.parent)
    assert (last.scored.n, last.scored.estimates["accuracy"].value, last.reused) == (400, 1.0, seen)
    backwards(tmp_path / "whole")
    assert path.read_bytes() == (tmp_path / "whole" / "slow.jsonl").read_bytes()
    assert len({json.loads(line)["id"] for line in lines_of(path)}) == 400


@pytest.mark.slow
def test_torchrun_splits_the_samples_and_merges_them(program: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    # What a killed process of an earlier run has left, with a half line at its end.
    task = Task("slow", "", "text", ("core",), "", "", ("accuracy",), "generate", list, dict)
    left = Sample("3", "3", (Message("user", "question 3 " * 4),), "x")
    line = {"key": records.record_key(task, left, "backwards"), "id": "3", "output": {"text": "taken over"}}
    (folder / "slow.rank7.jsonl").write_text(json.dumps(line) + '\n{"key": "half')
    told = sorted(torchrun(program, Path(__file__), folder).splitlines())
    accuracy = str(399 / 400)
    assert told == [f"400 {accuracy} 1"] * 2
    assert [path.name for path in folder.iterdir()] == ["slow.jsonl"]
    found = [json.loads(line) for line in lines_of(folder / "slow.jsonl")]
    assert len(found) == 400 and {record["id"] for record in found} == {str(i) for i in range(400)}


def test_batches_hold_like_lengths_and_long_samples_come_alone() -> None:
    rows = {
        str(i): Sample(str(i), "", (Message("user", "x" * length),), "")
        for i, length in enumerate([5, 900, 7, 6])
    }
    rows["huge"] = Sample("huge", "", (Message("user", "x" * (1 << 18)),), "")
    assert asking.batches(rows, 2) == [["huge"], ["1", "2"], ["3", "0"]]


def test_a_run_goes_on_with_the_batches_it_began_with(fake: Any, data_root: Path, tmp_path: Path) -> None:
    task = replace(find(["text-perplexity"])[0], batch_size=3, controls=())

    class Notes(fake):  # type: ignore[valid-type, misc]
        batches: list[list[str]] = []

        def loglikelihood(self, conversations: Any, answers: Any) -> Any:
            self.batches.append(list(answers))
            return super().loglikelihood(conversations, answers)

    runner.evaluate(task, Notes(), Options(data_root), tmp_path)
    whole = [list(batch) for batch in Notes.batches]
    path = tmp_path / "text-perplexity.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines_of(path)[:3]))
    Notes.batches.clear()
    runner.evaluate(task, Notes(), Options(data_root), tmp_path)
    assert Notes.batches == whole[1:]


def multiple_choice(**more: Any) -> Task:
    rows = [
        Sample(str(i), str(i), (Message("user", "which?"),), "b c", choices=("a", "b c", "d e f"))
        for i in range(3)
    ]

    def judge(sample: Sample, output: Output) -> dict[str, float]:
        best = max(range(3), key=output["logprobs"].__getitem__)
        return {"correct": float(sample.choices[best] == sample.target)}

    settings: dict[str, Any] = {"ask": "choices", "load": lambda options: rows} | more
    return Task("mc", "", "text", ("core",), "", "", ("accuracy",), judge=judge, **settings)


def test_choices_are_asked_side_by_side(fake: Any, tmp_path: Path) -> None:
    done = runner.evaluate(multiple_choice(), fake(), Options(), tmp_path)
    assert done.outputs == [{"logprobs": [-2.0, -4.0, -6.0], "tokens": [1, 2, 3]}] * 3
    assert done.scored.estimates["accuracy"].value == 0.0
    one = [Sample("0", "", (Message("user", "which?"),), "a", choices=("a",))]
    with pytest.raises(UserError, match="fewer than two choices"):
        runner.evaluate(multiple_choice(load=lambda options: one), fake(), Options(), tmp_path / "one")


def test_a_task_may_ask_in_its_own_way(fake: Any, tmp_path: Path) -> None:
    def own(model: Any, samples: Any) -> list[Output]:
        return [{"logprobs": [0.0, 1.0, 0.0]} for _ in samples]

    done = runner.evaluate(multiple_choice(ask="own", asks=own), fake(), Options(), tmp_path)
    assert done.scored.estimates["accuracy"].value == 1.0


def test_two_runs_with_one_seed_give_equal_files(
    fake: Any, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "open_model", lambda spec, **_: fake())
    for name in "ab":
        folder = tmp_path / name
        run.run_tasks(
            find(["easy-vqa"]), "m", Options(data_root, "all", 20, 3), folder / "records", folder / "out.json"
        )
    for file in ("out.samples.jsonl", "records/easy-vqa.jsonl"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    pair = [json.loads((tmp_path / name / "out.json").read_text())[0] for name in "ab"]
    for entry in pair:
        del entry["seconds"], entry["model_seconds"], entry["provenance"]["date"]
    assert pair[0] == pair[1]


def test_every_file_says_where_it_comes_from(
    fake: Any, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "open_model", lambda spec, **_: fake())
    run.run_tasks(
        find(["easy-vqa"]), "m", Options(data_root, "all"), tmp_path / "records", tmp_path / "out.json"
    )
    header = json.loads((tmp_path / "out.samples.jsonl").read_text().splitlines()[0])["answers_of"][
        "easy-vqa"
    ]
    beside = next(iter(json.loads((tmp_path / "records" / "easy-vqa.runs.json").read_text()).values()))
    entry = json.loads((tmp_path / "out.json").read_text())[0]["provenance"]
    for where in (header, beside, entry):
        assert where["versions"]["torch"] and where["command"] and where["model_sha256"]
        assert where["seed"] == 0 and "commit" in where and len(where["dataset_sha256"]) == 64


@pytest.mark.parametrize(
    ("spec", "guard", "shown"),
    [
        ("/somewhere/of/mine/model", None, "model"),
        ("openai:http://localhost:8000/v1#tiny", None, "openai:http://localhost:8000/v1#tiny"),
        ("hf:org/name", "/of/mine/watch", "hf:org/name + guard watch on input"),
    ],
)
def test_results_name_the_model_and_its_guard(
    fake: Any,
    data_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spec: str,
    guard: str,
    shown: str,
) -> None:
    monkeypatch.setattr(run, "open_model", lambda spec, **_: fake())
    places = tmp_path / "records", tmp_path / "out.json"
    options = Options(data_root, "all", 4)
    run.run_tasks(find(["easy-vqa"]), spec, options, *places, guard=guard, guard_on=("input",))
    entry = json.loads(places[1].read_text())[0]["provenance"]
    assert entry["model"] == shown and str(tmp_path) not in entry["command"]


def test_changed_dataset_under_a_resumed_run_is_refused(
    fake: Any, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "open_model", lambda spec, **_: fake())
    root = tmp_path / "data"
    shutil.copytree(data_root / "easy_vqa", root / "easy_vqa")
    places = tmp_path / "records", tmp_path / "out.json"
    run.run_tasks(find(["easy-vqa"]), "m", Options(root, "all"), *places)
    before = places[1].read_bytes()
    questions = root / "easy_vqa" / "questions.json"
    questions.write_text(questions.read_text().replace("what color is", "which color has"))
    with pytest.raises(UserError, match="rows of task 'easy-vqa' have changed.*--records"):
        run.run_tasks(find(["easy-vqa"]), "m", Options(root, "all"), *places)
    assert places[1].read_bytes() == before
    run.run_tasks(find(["easy-vqa"]), "m", Options(root, "all"), tmp_path / "new", places[1])


def test_two_runs_at_once_in_one_place_are_refused(fake: Any, data_root: Path, tmp_path: Path) -> None:
    with (
        records.RecordStore(tmp_path, "easy-vqa"),
        pytest.raises(UserError, match="another run is writing there"),
    ):
        runner.evaluate(find(["easy-vqa"])[0], fake(), Options(data_root, "all"), tmp_path)


def test_output_that_cannot_be_written_is_refused_before_any_work(
    fake: Any, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fake()
    monkeypatch.setattr(run, "open_model", lambda spec, **_: model)
    (tmp_path / "file").write_text("")
    for output in (tmp_path, tmp_path / "file" / "out.json"):
        with pytest.raises(UserError, match="folder"):
            run.run_tasks(find(["easy-vqa"]), "m", Options(data_root, "all"), tmp_path / "records", output)
    (tmp_path / "taken.samples.jsonl").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        run.run_tasks(find(["easy-vqa"]), "m", Options(data_root), tmp_path / "r", tmp_path / "taken.json")
    if os.geteuid():  # root writes everywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(UserError, match="cannot write there"):
            run.run_tasks(
                find(["easy-vqa"]), "m", Options(data_root), tmp_path, tmp_path / "locked" / "o.json"
            )
    with pytest.raises(UserError, match="--records DIR"):
        run.run_tasks(find(["easy-vqa"]), "m", Options(data_root, "all"), tmp_path / "file")
    assert model.asked == 0 and answers.beside(tmp_path / "a.json").name == "a.samples.jsonl"
