import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from core_llm.errors import UserError
from guard.cli import main, read_jsonl
from guard.testing import tiny_guard


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("guard") / "tiny"
    tiny_guard().save(where)
    return where


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process: a new one would load torch for every case."""

    def call(*args: str, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "argv", ["guard", *args])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Done(code, *capsys.readouterr())

    return call


def test_help_is_there_before_torch_could_be() -> None:
    command = [sys.executable, "-c", "from guard.cli import main; main()", "--help"]
    began = time.monotonic()
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0 and "classify" in shown.stdout
    assert time.monotonic() - began < 2.0
    code = "import sys, guard, guard.cli; sys.exit('torch' in sys.modules or 'fastapi' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_json_lines_come_in_and_go_out_in_order(run: Run, folder: Path) -> None:
    lines = [
        '"just a string"',
        json.dumps({"text": "a text"}),
        json.dumps({"context": "hello", "response": "hi"}),
        json.dumps({"messages": [{"role": "user", "content": "one"}]}),
    ]
    flags = ("--model", str(folder), "--input", "jsonl", "--format", "json")
    done = run("classify", *flags, stdin="\n".join(lines))
    assert done.returncode == 0, done.stderr
    verdicts = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(verdicts) == 4
    assert set(verdicts[0]) == {"unsafe", "probability", "mass", "categories", "named"}


def test_table_shows_brackets_of_a_message_as_they_are(run: Run, folder: Path) -> None:
    done = run("classify", "[red]hello", "--model", str(folder))
    assert done.returncode == 0, done.stderr
    assert "unsafe" in done.stdout and "[red]" in done.stdout.replace("\n", "")


@pytest.mark.parametrize(
    ("args", "stdin", "says"),
    [
        (("classify",), "", "message 1 is empty"),
        (("classify", "hello", " "), "", "message 2 is empty"),
        (("classify", "--input", "jsonl"), "", "nothing to judge"),
        (("classify", "--input", "jsonl"), '"fine"\n{bad', "line 2 is not"),
        (("classify", "x", "--model", "no-such"), "", "known: nano"),
        (("classify", "x", "--batch-size", "0"), "", "at least 1"),
        (("serve", "--model", "no-such"), "", "known: nano"),
        (("serve", "--port", "99999"), "", "between 0 and 65535"),
        (("train", "--out", "OUT", "--core", "no-such"), "", "known: nano"),
    ],
)
def test_mistakes_are_one_clear_line(
    run: Run, tmp_path: Path, args: tuple[str, ...], stdin: str, says: str
) -> None:
    done = run(*(arg.replace("OUT", str(tmp_path / "out")) for arg in args), stdin=stdin)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and says in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_bad_json_line_is_named() -> None:
    for bad in ("5", "[]", '{"text": 5}', '{"messages": [{"role": "user"}]}', '{"messages": 1}'):
        with pytest.raises(UserError, match="line 2"):
            read_jsonl(f'"fine"\n{bad}')


def test_unicode_line_separators_stay_inside_a_message() -> None:
    assert read_jsonl('"a\u2028b"')[0][0].text == "a\u2028b"
