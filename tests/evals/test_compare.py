"""`evals compare` over files that runs have written."""

import json
from pathlib import Path
from typing import Any

import pytest

from core_llm.errors import UserError
from evals import answers, compare, run
from evals.tasks import Options, find


@pytest.fixture
def two_runs(
    fake: Any, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """A model that always says yes, and one that says blue, on the same rows."""
    paths = []
    for name, said in (("a", "yes"), ("b", "blue")):
        model = fake(lambda messages, said=said: said, checkpoint=name)
        monkeypatch.setattr(run, "open_model", lambda spec, model=model, **_: model)
        paths.append(tmp_path / f"{name}.json")
        tasks = find(["easy-vqa", "text-perplexity"])
        run.run_tasks(tasks, name, Options(data_root, "all"), tmp_path / "records", paths[-1])
    return paths[0], paths[1]


def test_two_runs_are_joined_and_counted(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    found = {one.task: one for one in compare.run(*two_runs, out)}
    head = found["easy-vqa"].tests[0]
    before, after = (json.loads(path.read_text())[0]["metrics"]["accuracy"]["value"] for path in two_runs)
    assert head.first == pytest.approx(before) and head.second == pytest.approx(after)
    assert (head.wins, head.losses) == (6, 24)  # a quarter of the colours is blue, half of all answers is yes
    assert found["easy-vqa"].verdict == "first is better"
    assert found["text-perplexity"].verdict == "no difference shown"
    content = json.loads(out.read_text())
    written = {task["task"]: task for task in content["tasks"]}["easy-vqa"]["metrics"]["accuracy"]
    assert written["wins"] == 6 and written["p_mcnemar"] < 0.01
    assert content["first"]["runs"]["easy-vqa"]["dataset_sha256"]
    assert content["provenance"]["versions"] and "Holm" in content["note"]


def test_samples_of_one_run_only_are_told_and_left_out(two_runs: tuple[Path, Path]) -> None:
    place = answers.beside(two_runs[1])
    lines = place.read_text().splitlines(keepends=True)
    place.write_text(
        "".join(line for line in lines if json.loads(line).get("id") != json.loads(lines[1])["id"])
    )
    found = {one.task: one for one in compare.compare(*two_runs)}
    assert found["easy-vqa"].alone == (1, 0) and found["easy-vqa"].tests[0].n == 47


def test_other_right_answers_are_refused(two_runs: tuple[Path, Path]) -> None:
    place = answers.beside(two_runs[1])
    place.write_text(place.read_text().replace('"target": "yes"', '"target": "no"'))
    with pytest.raises(UserError, match="another right answer in each run"):
        compare.compare(*two_runs)


def test_missing_and_damaged_files_are_one_line(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--output RESULTS.json"):
        compare.compare(two_runs[0], tmp_path / "nothing.json")
    answers.beside(two_runs[1]).write_text("{}\n")
    with pytest.raises(UserError, match="not a file of answers"):
        compare.compare(*two_runs)
    with pytest.raises(UserError, match="'mmmlu' is not in both runs"):
        compare.compare(two_runs[0], two_runs[0], ["mmmlu"])
