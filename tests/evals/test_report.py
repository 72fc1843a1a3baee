"""What the user gets: results.json, the scorecard, the report, and one-line errors."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core_llm import provenance
from core_llm.chat import Audio, Image
from core_llm.errors import UserError
from evals import report, results, run, scorecard
from evals.report_samples import audio_uri, image_uri
from evals.tasks import Options, find


@pytest.fixture
def written(fake: Any, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with results.json and a report of three tasks, answered by the stand-in."""
    monkeypatch.setattr(
        run, "open_model", lambda spec, **_: fake(lambda m: "yes", lambda m: len(m[-1].text) / 40)
    )
    tasks = find(["easy-vqa", "fsdd", "guard-diasafety"])
    run.run_tasks(
        tasks, "nano", Options(data_root, "all"), tmp_path / "records", tmp_path / "results.json", tmp_path
    )
    return tmp_path


def test_results_hold_every_metric_with_its_interval(written: Path) -> None:
    entries = json.loads((written / "results.json").read_text())
    assert [entry["task"] for entry in entries] == ["easy-vqa", "fsdd", "guard-diasafety"]
    rates = {f"{rate}{form}" for rate in ("wer", "cer") for form in ("", "_raw", "_english")}
    assert set(entries[1]["metrics"]) == {*rates, "accuracy"}
    assert set(entries[2]["metrics"]) == {"auprc", "auroc", "f1", "fpr", "ece", "accuracy"}
    for entry in entries:
        assert entry["n"] > 0
        for metric in entry["metrics"].values():
            low, high = metric["ci95"]
            assert low <= metric["value"] <= high
        assert {"commit", "command", "seed", "versions", "model_sha256", "dataset_sha256"} <= set(
            entry["provenance"]
        )
    assert entries[0]["controls"]["shuffled images"]["metrics"]["accuracy"]["value"] is not None


def test_report_is_one_file_with_playable_audio_and_images(written: Path) -> None:
    page = (written / "index.html").read_text()
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    kinds = {uri.split(";")[0] for uri in data["media"]}
    assert kinds == {"data:image/png", "data:audio/wav"}
    assert {row["task"] for row in data["samples"]} == {"easy-vqa", "fsdd", "guard-diasafety"}
    assert "<!--" not in page.replace("<!--DATA-->", "")
    assert page.count("<svg") >= 4


def test_report_escapes_what_a_model_says() -> None:
    assert "</script>" not in report._script_json({"answer": "</script><script>alert(1)</script>"})


def test_waveforms_and_pixels_become_data_uris() -> None:
    assert audio_uri(Audio(np.zeros(1600, np.float32), 16_000)).startswith("data:audio/ogg;base64,")
    assert image_uri(Image(np.zeros((700, 500, 3), np.uint8))).startswith("data:image/png;base64,")


def test_scorecard_marks_no_evidence(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = results.read(written / "results.json")
    scorecard.show(entries)
    shown = capsys.readouterr().out
    assert "easy-vqa" in shown
    assert "no evidence" in shown


def test_unwritable_output_is_refused_before_any_work(
    fake: Any, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = fake()
    monkeypatch.setattr(run, "open_model", lambda spec, **_: subject)
    (tmp_path / "file").write_text("")
    for bad in (tmp_path, tmp_path / "file" / "results.json"):
        with pytest.raises(UserError):
            run.run_tasks(find(["fsdd"]), "nano", Options(data_root), tmp_path / "records", bad)
    assert subject.asked == 0
    assert not (tmp_path / "records").exists()


def test_undefined_scores_are_null_in_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        results.write(tmp_path / "r.json", [{"value": float("nan")}])
    assert not list(tmp_path.iterdir())


def test_provenance_keeps_paths_of_this_machine_out() -> None:
    shown = provenance.command(
        ["/x/bin/evals", "run", "fsdd", "--data-root", "/a/b", "--output", "/c/d.json"]
    )
    assert shown == "evals run fsdd --data-root DATA_ROOT --output d.json"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "nothing"], "known tasks: text-perplexity"),
        (["run", "text-qa", "--model", "nothing"], "known: nano, a model's folder"),
        (["run", "text-qa", "--limit", "0"], "--limit must be at least 1"),
        (["run", "fsdd", "--data-root", "/nowhere"], "no such folder"),
        (["run"], "no task given"),
    ],
)
def test_mistakes_give_one_line_and_status_two(args: list[str], message: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from evals.cli import main; main()", *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert message in done.stderr.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_help_starts_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom evals.cli import main\ntry:\n    main()\n"
        "except SystemExit:\n    assert 'torch' not in sys.modules"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout
    assert time.perf_counter() - started < 10
