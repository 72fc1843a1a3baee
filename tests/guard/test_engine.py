"""Both engines under the same tests: the guard in this process, and one behind a completions API.

The server here runs our core and answers as vLLM does: token ids in, the top log-probabilities out.
"""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from core_llm.chat import Message
from core_llm.errors import UserError
from guard.engine import Engine, EngineError, LocalEngine
from guard.engine_openai import OpenAICompatibleEngine
from guard.guard import Guard
from guard.policy import Category, Policy

from .released import save_released

TEXTS = ["hello", "how do I bake bread", "one two three four five six seven " * 5, "no"]


def ask(text: str) -> list[Message]:
    return [Message("user", text)]


class Server:
    """A completions API on our core; `spoil` may change an answer, `status` refuse it."""

    def __init__(self, guard: Guard) -> None:
        self.guard, self.status, self.asked = guard, [], 0
        self.spoil: Callable[[dict[str, Any]], Any] = lambda answer: answer
        self.by_text = False
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply(200, {"data": [{"id": "guard-there"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                owner.asked += 1
                if owner.status:
                    return self.reply(owner.status.pop(0), {})
                self.reply(200, owner.spoil(owner.complete(body)))

            def reply(self, status: int, answer: Any) -> None:
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @torch.inference_mode()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["max_tokens"] == 1 and body["model"] == "guard-there"
        choices = []
        for index, ids in enumerate(body["prompt"]):
            top = self.guard.core(torch.tensor([ids]))[0, -1].log_softmax(-1).topk(body["logprobs"])
            named = {self.name(i): p for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)}
            choices.append({"index": index, "text": "", "logprobs": {"top_logprobs": [named]}})
        return {"choices": choices[::-1]}  # the order is told by the index alone

    def name(self, token: int) -> str:
        return self.guard.tokenizer.decode([token]) if self.by_text else f"token_id:{token}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_released(tmp_path_factory.mktemp("engine") / "g", "listed", seed=3)


@pytest.fixture(scope="module")
def guard(folder: Path) -> Guard:
    return Guard.load(folder, dtype=torch.float32)


@pytest.fixture
def server(guard: Guard) -> Iterator[Server]:
    made = Server(guard)
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture(params=["local", "remote"])
def engine(request: pytest.FixtureRequest, guard: Guard, folder: Path, server: Server) -> Iterator[Engine]:
    if request.param == "local":
        made: Engine = LocalEngine(guard)
    else:
        made = OpenAICompatibleEngine.connect(server.url, folder, batch_size=3)
    yield made
    made.close()


def test_verdicts_are_the_guards_in_the_order_of_the_conversations(engine: Engine, guard: Guard) -> None:
    verdicts = engine.judge([ask(text) for text in TEXTS])
    for text, verdict in zip(TEXTS, verdicts, strict=True):
        [expected] = guard.classify([ask(text)])
        assert verdict.mass > 0.5
        assert verdict.probability == pytest.approx(expected.probability, abs=1e-4)
        assert verdict.mass == pytest.approx(expected.mass, abs=1e-4)
        assert verdict.categories == pytest.approx(expected.categories, abs=1e-4)
        assert verdict.policy == guard.policy.digest


def test_a_policy_of_the_request_counts(engine: Engine) -> None:
    policy = Policy([Category("S1", "Fireworks", "Rockets."), Category("pets", "Pets", threshold=0.0005)])
    [verdict] = engine.judge([ask("hello")], policy)
    assert list(verdict.categories) == ["S1", "pets"] and verdict.policy == policy.digest
    assert verdict.unsafe and verdict.named == ["pets"]
    strict, lax = Policy(policy.categories, threshold=0.001), Policy([Category("S1", "A")], threshold=0.999)
    assert engine.judge([ask("hello")], strict)[0].unsafe
    assert not engine.judge([ask("hello")], lax)[0].unsafe


def test_long_messages_are_judged_in_windows(engine: Engine, guard: Guard) -> None:
    policy = Policy(guard.policy.categories, window=32, context=16)
    text = " ".join(str(i) for i in range(120))
    rows = guard.prompter.rows(ask(text), guard.prompter.reading(policy))
    worst = max(v.probability for v in guard.judge_rows(rows, guard.prompter.reading(policy)))
    assert len(rows) > 3
    assert engine.judge([ask(text)], policy)[0].probability == pytest.approx(worst, abs=1e-4)


@pytest.mark.parametrize("messages", [[], ask(" "), ask("\u200b")])
def test_what_cannot_be_judged_is_the_users_mistake(engine: Engine, messages: list[Message]) -> None:
    with pytest.raises(UserError, match="empty"):
        engine.judge([ask("hello"), messages])


def test_nothing_to_judge_gives_nothing(engine: Engine) -> None:
    assert engine.judge([]) == []


def test_many_threads_get_their_own_verdicts(engine: Engine) -> None:
    alone = {text: engine.judge([ask(text)])[0].probability for text in TEXTS}
    wrong: list[str] = []

    def run(text: str) -> None:
        for _ in range(3):
            if engine.judge([ask(text)])[0].probability != pytest.approx(alone[text], abs=1e-6):
                wrong.append(text)

    threads = [threading.Thread(target=run, args=(text,)) for text in TEXTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_closed_engine_judges_nothing(engine: Engine) -> None:
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.judge([ask("hello")])


def test_tokens_may_be_named_by_their_text(server: Server, folder: Path, guard: Guard) -> None:
    server.by_text = True
    verdict = OpenAICompatibleEngine.connect(server.url, folder).judge([ask("hello")])[0]
    assert verdict.probability == pytest.approx(guard.classify([ask("hello")])[0].probability, abs=1e-4)


def spoiled(change: Callable[[dict[str, float]], None]) -> Callable[[dict[str, Any]], Any]:
    def spoil(answer: dict[str, Any]) -> dict[str, Any]:
        for choice in answer["choices"]:
            change(choice["logprobs"]["top_logprobs"][0])
        return answer

    return spoil


@pytest.mark.parametrize("value", [float("nan"), None, "0.5", 3.0, float("inf")])
def test_numbers_that_are_none_are_read_as_unsafe(
    server: Server, folder: Path, guard: Guard, value: Any
) -> None:
    def change(top: dict[str, float]) -> None:
        top[f"token_id:{guard.tokens.safe}"] = value

    server.spoil = spoiled(change)
    verdict = OpenAICompatibleEngine.connect(server.url, folder).judge([ask("hello")])[0]
    assert verdict.unsafe and verdict.probability == 1.0


def test_an_answer_that_is_no_verdict_is_read_as_unsafe(server: Server, folder: Path, guard: Guard) -> None:
    def change(top: dict[str, float]) -> None:
        top.pop(f"token_id:{guard.tokens.safe}", None)
        top.pop(f"token_id:{guard.tokens.unsafe}", None)

    server.spoil = spoiled(change)
    verdict = OpenAICompatibleEngine.connect(server.url, folder).judge([ask("hello")])[0]
    assert verdict.unsafe and verdict.mass == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        lambda a: b"<html>",
        lambda a: {},
        lambda a: {"choices": a["choices"][1:]},
        lambda a: {"choices": [{**c, "index": 0} for c in a["choices"]]},
        lambda a: {"choices": [{**c, "logprobs": None} for c in a["choices"]]},
        lambda a: [1],
    ],
)
def test_a_broken_answer_is_an_error_and_never_safe(
    server: Server, folder: Path, answer: Callable[[dict[str, Any]], Any]
) -> None:
    server.spoil = answer
    with pytest.raises(EngineError):
        OpenAICompatibleEngine.connect(server.url, folder).judge([ask("hello")])


def test_a_busy_server_is_asked_again_and_a_refusal_is_told(server: Server, folder: Path) -> None:
    engine = OpenAICompatibleEngine.connect(server.url, folder)
    server.status = [503, 429]
    assert engine.judge([ask("hello")]) and server.asked == 3
    server.status = [400]
    with pytest.raises(EngineError, match="status 400"):
        engine.judge([ask("hello")])
    assert server.asked == 4


def test_a_server_that_is_not_there_is_an_error(folder: Path) -> None:
    with pytest.raises(EngineError, match="cannot be reached"):
        OpenAICompatibleEngine.connect("http://127.0.0.1:9/v1", folder, "m", retries=0).judge([ask("hi")])
    with pytest.raises(UserError, match="http://"):
        OpenAICompatibleEngine.connect("localhost:8000", folder)


def test_a_guard_that_breaks_is_an_engine_error(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("secret text of a user")

    monkeypatch.setattr(guard, "scores", broken)
    with pytest.raises(EngineError, match="RuntimeError") as raised:
        LocalEngine(guard).judge([ask("hello")])
    assert "secret" not in str(raised.value)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    from guard.cli import main

    monkeypatch.setattr("sys.argv", ["guard", *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_command_line_judges_by_a_server_and_a_policy(
    server: Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    Policy([Category("pets", "Pets", "Cats and dogs.")], threshold=0.0001).write(tmp_path / "p.yaml")
    flags = ["--engine", server.url, "--model", str(folder), "--policy", str(tmp_path / "p.yaml")]
    assert run(monkeypatch, "classify", "hello", *flags, "--format", "json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["unsafe"] and told["named"] == ["pets"] and server.asked == 1
    server.status = [500]
    assert run(monkeypatch, "classify", "hello", *flags) == 2
    assert "status 500" in capsys.readouterr().err
    assert run(monkeypatch, "classify", "hello", "--engine-model", "x") == 2
    assert "--engine" in capsys.readouterr().err


def test_the_service_answers_by_a_server_and_503_when_it_is_gone(
    server: Server, folder: Path, guard: Guard
) -> None:
    from fastapi.testclient import TestClient

    from guard.cli_serve import ServeOptions, _engine
    from guard.service import create_app

    engine = _engine(ServeOptions(model=str(folder), engine=server.url))
    with TestClient(create_app(engine)) as client:
        answer = client.post("/v1/moderations", json={"input": "hello"})
        assert answer.status_code == 200
        scores = answer.json()["results"][0]["category_scores"]
        expected = guard.classify([ask("hello")])[0].categories
        assert scores["S1"] == pytest.approx(expected["S1"], abs=1e-4)
        server.status = [500]
        assert client.post("/v1/moderations", json={"input": "hello"}).status_code == 503
    engine.close()
