import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile

from core_llm.checkpoint import save_core
from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer
from speech_adapter import cli
from speech_adapter.adapter import SpeechAdapter
from speech_adapter.testing import chirp


def call(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["speech-adapter", *args])
    cli.main()


@pytest.fixture
def folders(
    tmp_path: Path, adapter: SpeechAdapter, core_and_tokenizer: tuple[Llama, Tokenizer]
) -> tuple[str, str]:
    save_core(tmp_path / "core", *core_and_tokenizer)
    adapter.save(tmp_path / "speech", core_and_tokenizer[0])
    return str(tmp_path / "core"), str(tmp_path / "speech")


def test_transcribe_writes_one_line_per_file_and_reports_bad_ones(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    folders: tuple[str, str],
) -> None:
    good, bad = tmp_path / "good.wav", tmp_path / "bad.wav"
    soundfile.write(good, chirp(0.5), 16_000)
    bad.write_bytes(b"nothing")
    core, speech = folders
    with pytest.raises(SystemExit) as exit:
        call(
            monkeypatch,
            "transcribe",
            str(bad),
            str(good),
            "--core",
            core,
            "--adapter",
            speech,
            "--max-new-tokens",
            "4",
        )
    out, err = capsys.readouterr()
    assert exit.value.code == 2
    assert out.startswith(f"{good}:") and f"error: {bad}:" in err and "Traceback" not in err


@pytest.mark.parametrize(
    "args, word",
    [
        (("transcribe", "x.wav", "--core", "nowhere"), "nowhere"),
        (("train", "--core", "nowhere", "--data-root", "."), "nowhere"),
        (("train", "--steps", "0"), "--steps"),
    ],
)
def test_user_mistakes_are_one_line_and_exit_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], word: str
) -> None:
    with pytest.raises(SystemExit) as exit:
        call(monkeypatch, *args)
    err = capsys.readouterr().err
    assert exit.value.code == 2 and word in err and len(err.strip().splitlines()) == 1


def test_help_starts_without_torch() -> None:
    code = "import sys, speech_adapter.cli; assert 'torch' not in sys.modules and 'soxr' not in sys.modules"
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert time.monotonic() - began < 5
