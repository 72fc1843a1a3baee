"""`core-llm` as a user runs it."""

from pathlib import Path

import pytest

from core_llm.checkpoint import save_core
from core_llm.cli import generate
from core_llm.cli_tools import run
from core_llm.errors import UserError
from core_llm.testing import tiny_core


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        run("core-llm", "test", {"generate": generate, "other": generate}, ["generate", *args])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def test_generate_streams_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    core, tokenizer = tiny_core()
    save_core(tmp_path / "core", core, tokenizer)
    run(
        "core-llm",
        "t",
        {"generate": generate, "o": generate},
        ["generate", "hi", "--model", str(tmp_path / "core")],
    )
    assert capsys.readouterr().out.strip()


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "known: nano" in fails(capsys, "hello", "--model", "nowhere")
    assert "config.json is missing" in fails(capsys, "hello", "--model", str(tmp_path))
    core, tokenizer = tiny_core()
    save_core(tmp_path / "core", core, tokenizer)
    model = str(tmp_path / "core")
    assert "prompt is empty" in fails(capsys, " ", "--model", model)
    assert "the model has 512" in fails(capsys, "word " * 2000, "--model", model)
    weights = tmp_path / "core" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "truncated" in fails(capsys, "hello", "--model", model)


def test_unexpected_errors_keep_their_traceback() -> None:
    def broken() -> None:
        """Fail."""
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run("x", "t", {"broken": broken, "other": broken}, ["broken"])
    assert issubclass(UserError, Exception)
