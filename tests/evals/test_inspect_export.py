"""Runs as logs of Inspect: facts of its format, what a log must hold, and inspect_ai itself where it is.

The format is that of inspect_ai 0.3.285, log schema version 2.
"""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import soundfile

from core_llm.chat import Audio, Image, Message, Text
from core_llm.errors import UserError
from evals import answers, inspect_media, results, run
from evals.attacks import apply
from evals.inspect_export import export
from evals.tasks import Options, find

TASKS = ("easy-vqa", "fsdd", "text-perplexity", "guard-diasafety", "guard-basics~rot13")
# `EvalLog`: fields in the order that its reader of heads counts on, samples after all of the head.
HEAD = ("version", "status", "eval", "plan", "results", "stats")
NAME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}-\d{2}-\d{2}[^_]*_[^_]+_[^_]+\.json")  # what its listing takes


@pytest.fixture(scope="module")
def finished(fake: Any, data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """results.json of five tasks of the stand-in, and a folder with their logs."""
    folder = tmp_path_factory.mktemp("inspect")
    subject = fake(lambda m: "yes", lambda m: len(m[-1].text) / 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "open_model", lambda spec, **_: subject)
        tasks = [*find(list(TASKS[:-1])), apply(find(["guard-basics"])[0], ["rot13"], 0)]
        run.run_tasks(tasks, "nano", Options(data_root, "all", 12), folder / "records", folder / "r.json")
    export(folder / "r.json", folder / "logs", data_root=data_root)
    return folder / "r.json", folder / "logs"


def logs_of(folder: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted(folder.iterdir())]
    return {log["eval"]["task"]: log for log in found}


def test_logs_have_the_form_of_the_format(finished: tuple[Path, Path]) -> None:
    assert all(NAME.fullmatch(path.name) for path in finished[1].iterdir())
    found = logs_of(finished[1])
    assert set(found) == set(TASKS)
    for log in found.values():
        assert tuple(log)[: len(HEAD)] == HEAD and list(log)[-1] == "samples"
        assert (log["version"], log["status"]) == (2, "success")
        assert {"created", "task", "task_id", "eval_id", "run_id", "dataset", "model", "config"} <= set(
            log["eval"]
        )
        assert log["eval"]["dataset"]["sample_ids"] == [sample["id"] for sample in log["samples"]]
        for sample in log["samples"]:
            assert {"id", "epoch", "input", "target", "messages", "output", "scores"} <= set(sample)
            assert sample["messages"][-1] == sample["output"]["choices"][0]["message"]
            assert {message["role"] for message in sample["messages"]} <= {
                "system",
                "user",
                "assistant",
                "tool",
            }
    assert len({log["eval"]["eval_id"] for log in found.values()}) == len(TASKS)
    assert len({log["eval"]["run_id"] for log in found.values()}) == 1
    times = [(log["stats"]["started_at"], log["stats"]["completed_at"]) for log in found.values()]
    assert all(start <= end for start, end in times)


def test_logs_say_what_the_run_says(finished: tuple[Path, Path]) -> None:
    found, said = logs_of(finished[1]), answers.read(finished[0])
    for entry in results.read(finished[0]):
        log = found[entry["task"]]
        (scored,) = log["results"]["scores"]
        for name, metric in entry["metrics"].items():
            if metric["value"] is None:
                assert name in scored["metadata"]["undefined"] and name not in scored["metrics"]
            else:
                assert scored["metrics"][name]["value"] == metric["value"]
                assert scored["metrics"][name]["metadata"]["ci95"] == metric["ci95"]
        assert scored["metadata"]["controls"] == entry["controls"]
        assert log["results"]["headline"]["metric"] == next(iter(scored["metrics"]))
        assert log["eval"]["headline_metric"] == log["results"]["headline"]
        rows = said.rows[entry["task"]]
        assert len(log["samples"]) == len(rows) == log["results"]["total_samples"]
        for sample in log["samples"]:
            row = rows[sample["id"]]
            assert {name: score["value"] for name, score in sample["scores"].items()} == row.row
            assert sample["output"]["metadata"] == row.output and sample["metadata"]["group"] == row.group
            if "text" in row.output:
                assert sample["output"]["completion"] == row.output["text"]


def test_what_was_asked_is_there_with_its_pictures_and_sounds(
    finished: tuple[Path, Path], data_root: Path
) -> None:
    found = logs_of(finished[1])
    for name, kind in (("easy-vqa", "image"), ("fsdd", "audio")):
        (task,) = find([name])
        asked = {sample.id: sample for sample in task.load(Options(data_root, "all", 12))}
        for sample in found[name]["samples"]:
            parts = [part for message in sample["input"] for part in message["content"]]
            (part,) = [part for part in parts if part["type"] == kind]
            key = part[kind].removeprefix(inspect_media.ATTACHMENT)
            head, _, content = sample["attachments"][key].partition(";base64,")
            (source,) = [p for p in asked[sample["id"]].messages[0].parts if isinstance(p, Image | Audio)]
            assert base64.b64decode(content) == Path(str(source.data)).read_bytes()
            assert head == {"image": "data:image/png", "audio": "data:audio/wav"}[kind]
    attacked = found["guard-basics~rot13"]["samples"]
    assert {sample["metadata"]["kind"] for sample in attacked} == {"plain", "rot13"}
    assert all(sample["input"][0]["role"] == "user" for sample in attacked)


def test_two_exports_are_the_same_files_and_one_task_is_one_file(
    finished: tuple[Path, Path], data_root: Path, tmp_path: Path
) -> None:
    first = {path.name: path.read_bytes() for path in finished[1].iterdir()}
    again = export(finished[0], tmp_path, data_root=data_root)
    assert {path.name: path.read_bytes() for path in again} == first
    (one,) = export(finished[0], tmp_path / "one", ["fsdd"], data_root, media=False)
    log = json.loads(one.read_text())
    assert log["samples"][0]["attachments"] == {} and "left out: audio" in json.dumps(
        log["samples"][0]["input"]
    )


def test_rows_that_are_gone_or_changed_are_told(
    finished: tuple[Path, Path], data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    (path,) = export(finished[0], tmp_path / "a", ["easy-vqa"], tmp_path / "data")
    assert "12 of 12 samples without input" in capsys.readouterr().err
    log = json.loads(path.read_text())
    assert all("not in the results" in sample["input"] for sample in log["samples"])
    assert [message["role"] for message in log["samples"][0]["messages"]] == ["assistant"]
    place = tmp_path / "r.json"
    place.write_bytes(finished[0].read_bytes())
    said = answers.beside(finished[0]).read_text()
    digest = next(json.loads(line)["asked"] for line in said.splitlines()[1:] if '"fsdd"' in line)
    answers.beside(place).write_text(said.replace(digest, "0" * 64))
    (path,) = export(place, tmp_path / "b", ["fsdd"], data_root)
    assert "1 of 12 samples without input: the rows there are others" in capsys.readouterr().err


def test_an_impossible_answer_is_text_in_json(finished: tuple[Path, Path], tmp_path: Path) -> None:
    place = tmp_path / "r.json"
    place.write_bytes(finished[0].read_bytes())
    head, *lines = [json.loads(line) for line in answers.beside(finished[0]).read_text().splitlines()]
    for line in lines:
        line["output"]["logprobs"] = [-1.5, float("-inf")]
    answers.beside(place).write_text("".join(json.dumps(line) + "\n" for line in [head, *lines]))
    (path,) = export(place, tmp_path / "logs", ["text-perplexity"], tmp_path)
    said = json.loads(path.read_text())["samples"][0]["output"]["metadata"]
    assert said["logprobs"] == [-1.5, "-inf"]


def test_what_is_no_run_is_one_line(finished: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no task 'mmlu'; it has easy-vqa"):
        export(finished[0], tmp_path / "out", ["mmlu"])
    with pytest.raises(UserError, match="not a results file"):
        export(answers.beside(finished[0]), tmp_path / "out")
    lonely = tmp_path / "lonely.json"
    lonely.write_bytes(finished[0].read_bytes())
    with pytest.raises(UserError, match="no such file"):
        export(lonely, tmp_path / "out")
    lines = answers.beside(finished[0]).read_text().splitlines(keepends=True)
    answers.beside(lonely).write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match="both must be of one run"):
        export(lonely, tmp_path / "out")
    with pytest.raises(UserError, match="not a folder"):
        export(finished[0], finished[0] / "out")
    assert not (tmp_path / "out").exists()


def test_other_pictures_and_sounds_are_kept_without_loss() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (9, 7, 3), dtype=np.uint8)
    tone = rng.uniform(-0.9, 0.9, 500).astype(np.float32)
    flac = io.BytesIO()
    soundfile.write(flac, tone, 8000, format="FLAC", subtype="PCM_16")
    kept: dict[str, str] = {}
    parts = [Text("and"), Image(pixels), Audio(tone, 8000), Audio(flac.getvalue())]
    (message,) = inspect_media.messages([Message("user", parts)], "k", kept)
    assert [part["type"] for part in message["content"]] == ["text", "image", "audio", "audio"]
    assert [part.get("format") for part in message["content"][2:]] == ["wav", "wav"]
    picture, *sounds = [base64.b64decode(uri.partition(",")[2]) for uri in kept.values()]
    assert (np.asarray(PIL.Image.open(io.BytesIO(picture))) == pixels).all()
    for sound in sounds:
        heard, rate = soundfile.read(io.BytesIO(sound), dtype="float32")
        assert rate == 8000 and np.abs(heard - tone).max() < 1e-4  # 16 bits


def test_inspect_reads_them(finished: tuple[Path, Path]) -> None:
    log_module = pytest.importorskip("inspect_ai.log")
    listed = log_module.list_eval_logs(str(finished[1]))
    assert len(listed) == len(TASKS)
    said = answers.read(finished[0])
    for entry in results.read(finished[0]):
        (place,) = [info.name for info in listed if info.task == entry["task"].replace("_", "-")]
        log = log_module.read_eval_log(place, resolve_attachments=True)
        metrics = log.results.scores[0].metrics
        assert {name: metric.value for name, metric in metrics.items()} == {
            name: metric["value"] for name, metric in entry["metrics"].items() if metric["value"] is not None
        }
        for sample in log.samples:
            row = said.rows[entry["task"]][sample.id]
            assert {name: score.value for name, score in sample.scores.items()} == row.row
            assert "attachment://" not in sample.model_dump_json(include={"input", "messages"})
