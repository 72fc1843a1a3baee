"""A real model with random weights: core and both adapters, through the harness."""

import shutil
from pathlib import Path

import pytest
import torch

from core_llm.errors import CheckpointError, MediaError, UserError
from evals import run, runner
from evals.models import Subject, folders, load_assistant
from evals.tasks import Options, find, registry

torch.set_num_threads(2)


def test_text_logits_are_bit_equal_with_adapters_attached(tiny_model: Path, tmp_path: Path) -> None:
    task = registry()["text-regression"]
    done = runner.evaluate(task, Subject(tiny_model), Options(limit=16), tmp_path)
    assert {sample.kind for sample in done.samples} == {"text-only batch", "mixed batch"}
    assert done.scored.estimates["exact_match"].value == 1.0


def test_regression_task_sees_an_adapter_that_touches_text_rows(tiny_model: Path, tmp_path: Path) -> None:
    subject = Subject(tiny_model)
    vision = subject.assistant.adapters[0]
    plain = vision.interleave

    def leaking(memory, spans):  # type: ignore[no-untyped-def]
        return {
            layer: lambda hidden, call=call: call(hidden) + 1e-6
            for layer, call in plain(memory, spans).items()
        }

    vision.interleave = leaking  # type: ignore[method-assign]
    done = runner.evaluate(registry()["text-regression"], subject, Options(limit=16), tmp_path)
    wrong = [s.kind for s, row in zip(done.samples, done.rows, strict=True) if not row["correct"]]
    assert set(wrong) == {"mixed batch"}


def test_bundled_tasks_run_end_to_end(tiny_model: Path, tmp_path: Path) -> None:
    tasks = find(["text-qa", "scenes", "spoken-digits", "spoken-scenes"])
    page = run.run_tasks(tasks, str(tiny_model), Options(limit=4), tmp_path / "records", None, tmp_path)
    assert page is not None
    assert "data:audio/ogg" in page.read_text()


def test_model_without_an_adapter_is_refused_before_any_work(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model / "core", tmp_path / "model" / "core")
    with pytest.raises(UserError, match=r"no vision adapter.*scenes"):
        run.run_tasks(find(["text-qa", "scenes"]), str(tmp_path / "model"), Options(limit=2), tmp_path / "r")
    with pytest.raises(UserError, match="no guard"):
        run.run_tasks(find(["guard-basics"]), str(tmp_path / "model"), Options(limit=2), tmp_path / "r")
    assert not (tmp_path / "r").exists()
    assert len(load_assistant(tmp_path / "model").adapters) == 0


def test_folder_without_a_model_says_what_it_should_hold(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="core/, vision_adapter/, speech_adapter/, guard/"):
        folders(tmp_path)


def test_truncated_weights_are_one_clear_error(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    weights = tmp_path / "model" / "core" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        run.run_tasks(find(["text-qa"]), str(tmp_path / "model"), Options(limit=2), tmp_path / "r")


def test_fingerprint_follows_the_weights(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    assert Subject(tmp_path / "model").fingerprint(("core",)) == Subject(tiny_model).fingerprint(("core",))
    (tmp_path / "model" / "core" / "config.json").write_text("{}")
    assert Subject(tmp_path / "model").fingerprint(("core",)) != Subject(tiny_model).fingerprint(("core",))


def test_corrupt_image_in_the_dataset_is_named(tiny_model: Path, data_root: Path, tmp_path: Path) -> None:
    shutil.copytree(data_root / "easy_vqa", tmp_path / "data" / "easy_vqa")
    (tmp_path / "data" / "easy_vqa" / "images" / "3.png").write_bytes(b"not an image")
    options = Options(tmp_path / "data", "all")
    output = tmp_path / "results.json"
    with pytest.raises(MediaError, match=r"3\.png"):
        run.run_tasks(find(["easy-vqa"]), str(tiny_model), options, tmp_path / "records", output)
    assert not output.exists()
