"""`core-llm` as a user runs it."""

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize("trouble", ["a file in place of a folder", "a folder in place of a file"])
def test_files_and_folders_in_each_others_place_are_one_line(
    trouble: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")

    def command() -> None:
        if trouble.startswith("a file"):
            (tmp_path / "file" / "state").mkdir(parents=True, exist_ok=True)
        (tmp_path).write_text("x")

    with pytest.raises(SystemExit) as stopped:
        run("core-llm", "test", command, [])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert str(tmp_path) in err


def generates(*args: str) -> None:
    run("core-llm", "t", {"generate": generate, "o": generate}, ["generate", *args])


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "core"
    save_core(folder, *tiny_core())
    return str(folder)


def test_generate_streams_an_answer(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    generates("hi", "--model", model, "--verbose", "True")
    shown = capsys.readouterr()
    assert shown.out.strip()
    assert re.fullmatch(
        r"prefill \d+ tokens in [\d.]+ s \([\d.]+ tokens/s\), decode \d+ .*\n", shown.err.splitlines(True)[-1]
    )


def test_a_prompt_from_standard_input_equals_one_from_the_arguments(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generates("a red circle", "--model", model, "--max-new-tokens", "9", "--raw", "True")
    argument = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("a red circle"))
    generates("-", "--model", model, "--max-new-tokens", "9", "--raw", "True")
    assert capsys.readouterr().out == argument
    generates("a red circle", "--model", model, "--max-new-tokens", "9")
    assert capsys.readouterr().out != argument  # the chat format makes a difference


def test_several_prompts_give_json_lines_with_logprobs(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    generates("one", "two words", "--model", model, "--max-new-tokens", "4", "--logprobs", "2")
    first, second = records(capsys.readouterr().out)
    assert (first["prompt"], second["prompt"]) == ("one", "two words")
    content = first["logprobs"]["content"]
    assert len(content) == 4 and first["finish_reason"] == "length"
    for entry in content:
        assert entry["id"] == entry["top_logprobs"][0]["id"]  # greedy takes the most probable
        assert entry["logprob"] >= entry["top_logprobs"][1]["logprob"]
    usage = first["usage"]
    assert usage["completion_tokens"] == 4 and usage["total_tokens"] == usage["prompt_tokens"] + 4


def test_system_message_and_stop_string_are_heard(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    generates("hi", "--model", model, "--max-new-tokens", "20")
    plain = capsys.readouterr().out[:-1]
    generates("hi", "--model", model, "--max-new-tokens", "20", "--stop", plain[5:8])
    assert capsys.readouterr().out[:-1] == plain[: plain.index(plain[5:8])]
    generates("hi", "--model", model, "--max-new-tokens", "20", "--system", "Answer in red.")
    assert capsys.readouterr().out[:-1] != plain


def test_an_interrupted_file_is_completed_and_a_foreign_one_refused(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, Any]] = [{"id": i, "prompt": f"number {i}"} for i in range(11)]
    asked.append({"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "x"}]})
    source, out = tmp_path / "in.jsonl", tmp_path / "deep" / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, asked)) + "\n\n")
    options = ["--model", model, "--input", str(source), "--max-new-tokens", "3", "--out", str(out)]
    options += ["--temperature", "1", "--seed", "5"]
    generates(*options)
    whole = out.read_bytes()
    found = records(whole.decode())
    assert [r["index"] for r in found] == list(range(12)) and [r["id"] for r in found[:11]] == list(range(11))
    lines = whole.splitlines(True)
    # A batch was under way: two lines are missing, one is torn.
    out.write_bytes(b"".join(lines[:9]) + lines[9][:20])
    generates(*options)
    assert out.read_bytes() == whole
    generates(*options)
    assert out.read_bytes() == whole
    capsys.readouterr()
    assert "another input, model or setting" in fails(capsys, *options[:-1], "6")
    out.write_text("notes\n")
    assert "line 1: not an answer" in fails(capsys, *options)
    assert out.read_text() == "notes\n"


def test_bad_lines_of_an_input_file_are_named(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    for line, message in [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: not a JSON object"),
        ('{"prompt": "a", "temperature": 1}', "line 2: unknown field 'temperature'"),
        ('{"id": 3}', "line 2: give either"),
        ('{"prompt": 3}', "line 2: 'prompt' must be a string"),
        ('{"prompt": " "}', "line 2: the prompt is empty"),
        ('{"messages": [{"role": "user"}]}', "line 2: 'messages' must be"),
        ('{"messages": [{"role": "judge", "content": "x"}]}', "line 2: unknown role"),
        (json.dumps({"prompt": "word " * 600}), "context holds 512"),
    ]:
        source.write_text('{"prompt": "fine"}\n' + line + "\n")
        assert message in fails(capsys, "--model", model, "--input", str(source))
    source.write_text("\n")
    assert "holds no prompts" in fails(capsys, "--model", model, "--input", str(source))
    assert "not readable" in fails(capsys, "--model", model, "--input", str(tmp_path / "absent"))


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "known: nano" in fails(capsys, "hello", "--model", "nowhere")
    assert "config.json is missing" in fails(capsys, "hello", "--model", str(tmp_path))
    core, tokenizer = tiny_core()
    save_core(tmp_path / "core", core, tokenizer)
    model = str(tmp_path / "core")
    assert "prompt is empty" in fails(capsys, " ", "--model", model)
    long = fails(capsys, "word " * 2000, "--model", model)
    assert re.search(r"\d{4} tokens long, the model's context holds 512", long)
    assert "no prompt" in fails(capsys, "--model", model)
    assert "logprobs must be" in fails(capsys, "hi", "--logprobs", "-1", "--model", model)
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
