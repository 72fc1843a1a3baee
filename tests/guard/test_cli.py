import io
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from core_llm.errors import UserError
from core_llm.files import lock
from guard.cli import main
from guard.conversations import read_jsonl
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
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert shown.returncode == 0 and "classify" in shown.stdout
    # Seconds of computing, not of waiting for a busy machine.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0
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
    assert set(verdicts[0]) == {
        "unsafe",
        "probability",
        "mass",
        "categories",
        "named",
        "flagged",
        "policy",
        "unread",
    }


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


def make_data(root: Path) -> None:
    """Generated rows in the layouts of all the sets that the guard trains on."""

    def write(path: str, text: str) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)

    def pair(i: int) -> str:
        return json.dumps(
            {
                "context": f"question {i}",
                "response": "red circle" if i % 2 else "blue circle",
                "category": "Biased Opinion",
                "label": "Unsafe" if i % 2 else "Safe",
            }
        )

    write("diasafety/train.jsonl", "\n".join(pair(i) for i in range(60)))
    write("diasafety/dev.jsonl", "\n".join(pair(i) for i in range(100, 120)))
    prompts = [{"prompt": f"{'red' if i % 2 else 'blue'} number {i}", "H": i % 2} for i in range(80)]
    write("openai_moderation/dev.jsonl", "\n".join(map(json.dumps, prompts)))
    tweets = "\n".join(f"{i % 3},tweet {i}" for i in range(30))
    write("hate_speech/labeled_data.csv", "class,tweet\n" + tweets)
    ailuminate = "\n".join(f"do thing {i},hte" for i in range(30))
    write("ailuminate/dev.csv", "prompt_text,hazard\n" + ailuminate)
    tests = "\n".join(f"ask {i},Child safety" for i in range(30))
    write("simple_safety_tests/test_cases.csv", "prompts_final,harm_area\n" + tests)
    write("mitre_frr/mitre_frr.json", json.dumps([{"mutated_prompt": f"scan {i}"} for i in range(30)]))
    maths = "\n".join(json.dumps({"question": f"add {i}", "answer": str(i)}) for i in range(30))
    write("gsm8k/train.jsonl", maths)
    write("gsm8k/test.jsonl", maths)


def test_train_writes_a_guard_that_classifies_and_a_card_with_its_scores(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    make_data(tmp_path / "data")
    out = tmp_path / "out"
    flags = ("--steps", "6", "--language-steps", "3", "--data-root", str(tmp_path / "data"))
    done = run("train", "--core", str(folder), "--out", str(out), *flags)
    assert done.returncode == 0, done.stderr
    assert "auprc_diasafety" in done.stdout and "tfidf_diasafety" in done.stdout
    card = (out / "README.md").read_text()
    assert "| diasafety | 20 | 0.500 |" in card and "--steps 6" in card and str(tmp_path) not in card
    judged = run("classify", "hello", "--model", str(out), "--format", "json")
    assert judged.returncode == 0 and "probability" in json.loads(judged.stdout)
    weights = (out / "model.safetensors").read_bytes()
    other = run("train", "--core", str(folder), "--out", str(out), *flags, "--lr", "2e-3")
    assert other.returncode == 2 and "the run there had --lr 0.001; give the same" in other.stderr
    with (out / "state" / "lock").open() as held:
        assert lock(held.fileno())
        second = run("train", "--core", str(folder), "--out", str(out), *flags)
        assert second.returncode == 2 and "another run is writing there" in second.stderr
    again = run("train", "--core", str(folder), "--out", str(out), *flags)
    assert again.returncode == 0 and (out / "model.safetensors").read_bytes() == weights


def test_train_without_a_dataset_says_which_one_and_leaves_nothing(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    out = tmp_path / "out"
    done = run("train", "--core", str(folder), "--data-root", str(tmp_path / "data"), "--out", str(out))
    assert done.returncode == 2 and "diasafety" in done.stderr and not out.exists()
