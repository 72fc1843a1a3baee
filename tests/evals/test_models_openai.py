"""A server that speaks the OpenAI protocol, asked through the official client; at times it fails."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import soundfile

from core_llm.chat import Audio, Image, Message, Text
from core_llm.errors import UserError
from evals import models_openai, run, runner
from evals.models import open_model
from evals.tasks import Options, find


class Server(ThreadingHTTPServer):
    """Answers with the words of the last message; `fails` statuses are given out first."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []
        self.fails: list[int] = []
        self.models = ["tiny"]
        self.refuses = ""
        self.guard = threading.Lock()

    @property
    def spec(self) -> str:
        return f"openai:http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.reply(
            200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.server.models]}
        )

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.guard:
            self.server.requests.append(asked)
            fails = self.server.fails.pop(0) if self.server.fails else 0
        if fails:
            return self.reply(fails, {"error": {"message": "not now"}}, {"retry-after-ms": "1"})
        if self.server.refuses and self.server.refuses in json.dumps(asked):
            return self.reply(400, {"error": {"message": f"{self.server.refuses} is not supported"}})
        content = asked["messages"][-1]["content"]
        text = content if isinstance(content, str) else "+".join(part["type"] for part in content)
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": f" you said {text} "},
        }
        self.reply(
            200, {"id": "1", "object": "chat.completion", "created": 0, "model": "tiny", "choices": [choice]}
        )

    def reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_answers_come_in_order_and_failures_are_tried_again(server: Server) -> None:
    model = open_model(server.spec)
    server.fails = [429, 500, 503]
    asked = [[Message("system", "be short"), Message("user", f"number {i}")] for i in range(20)]
    assert model.generate(asked, 7) == [f"you said number {i}" for i in range(20)]
    assert len(server.requests) == 23
    one = server.requests[-1]
    assert (one["model"], one["max_tokens"], one["temperature"]) == ("tiny", 7, 0.0)
    assert one["messages"][0] == {"role": "system", "content": "be short"}


def test_pictures_and_sounds_travel_whole(server: Server) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (4, 6, 3)).astype(np.uint8)
    wave = np.sin(np.arange(8_000) * 0.05).astype(np.float32)
    said = open_model(server.spec).generate(
        [[Message("user", (Image(pixels), Audio(wave, 16_000), Text("?")))]], 4
    )
    assert said == ["you said image_url+input_audio+text"]
    picture, sound, _ = server.requests[-1]["messages"][-1]["content"]
    kind, data = picture["image_url"]["url"].split(",")
    assert kind == "data:image/png;base64"
    assert (np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data)))) == pixels).all()
    heard, rate = soundfile.read(io.BytesIO(base64.b64decode(sound["input_audio"]["data"])))
    assert rate == 16_000 and np.abs(heard - wave).max() < 1e-4


def test_newer_servers_get_the_limit_under_its_new_name(server: Server) -> None:
    server.refuses = "max_tokens"

    def reply(self: Handler, status: int, body: Any, headers: Any = None) -> None:
        if status == 400:
            body = {"error": {"message": "use max_completion_tokens instead"}}
        plain(self, status, body, headers)

    plain = Handler.reply
    Handler.reply = reply  # type: ignore[method-assign]
    try:
        assert open_model(server.spec).generate([[Message("user", "hello")]], 3) == ["you said hello"]
    finally:
        Handler.reply = plain  # type: ignore[method-assign]
    assert server.requests[-1]["max_completion_tokens"] == 3


def test_a_task_runs_through_the_server_and_goes_on_after_a_failure(
    server: Server, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models_openai, "RETRIES", 1)
    task, options = find(["easy-vqa"])[0], Options(data_root, "all", limit=6)
    whole = runner.evaluate(task, open_model(server.spec), options, tmp_path)
    assert whole.outputs[0]["text"].startswith("you said")
    count = len(server.requests)
    again = runner.evaluate(task, open_model(server.spec), options, tmp_path)
    assert again.outputs == whole.outputs and len(server.requests) == count
    server.fails = [500] * 99
    with pytest.raises(UserError, match=r"status 500 after 1 retries.*goes on where it stopped"):
        runner.evaluate(task, open_model(f"{server.spec}#other"), options, tmp_path)


def test_a_server_behind_a_guard_refuses_what_is_unsafe(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from guard import Guard
    from guard.guarded import REFUSAL
    from guard.verdict import Verdict

    class Watch:
        def classify(self, conversations: Any, **more: Any) -> list[Verdict]:
            return [Verdict("bomb" in c[-1].text, 0.5, 1.0, {}) for c in conversations]

    monkeypatch.setattr(Guard, "load", classmethod(lambda cls, where, *more: Watch()))
    asked = [[Message("user", "hello")], [Message("user", "a bomb")]]
    both = open_model(server.spec, guard="nano", guard_on=("input",))
    assert both.generate(asked, 4) == ["you said hello", REFUSAL]
    assert len(server.requests) == 1
    after = open_model(server.spec, guard="nano", guard_on=("output",))
    assert after.generate(asked, 4) == ["you said hello", REFUSAL]
    assert len(server.requests) == 3
    assert (
        both.fingerprint(("core",))
        != after.fingerprint(("core",))
        != open_model(server.spec).fingerprint(("core",))
    )
    assert [v.unsafe for v in both.score(asked)] == [False, True]
    both.require(("core", "guard"), "guard-basics")


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("openai:localhost:8000", "give the server's address"),
        ("openai:http://127.0.0.1:9/v1#m", "is the server running"),
    ],
)
def test_wrong_addresses_are_one_line(
    spec: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models_openai, "RETRIES", 0)
    with pytest.raises(UserError, match=why):
        run.run_tasks(find(["scenes"]), spec, Options(limit=1), tmp_path / "records")
    assert not (tmp_path / "records").exists()


def test_what_the_server_cannot_do_is_refused_before_any_work(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.refuses = "image_url"
    with pytest.raises(UserError, match=r"image_url is not supported.*scenes"):
        run.run_tasks(find(["scenes"]), server.spec, Options(limit=1), tmp_path / "records")
    with pytest.raises(UserError, match="no guard.*--guard nano"):
        run.run_tasks(find(["guard-basics"]), server.spec, Options(limit=1), tmp_path / "records")
    assert not (tmp_path / "records").exists()
    with pytest.raises(UserError, match="tells no log-likelihoods"):
        open_model(server.spec).loglikelihood([[Message("user", "a")]], ["b"])
    server.models = ["one", "two"]
    with pytest.raises(UserError, match="name one of its models behind #: one, two"):
        open_model(server.spec).generate([[Message("user", "a")]], 1)
    with pytest.raises(UserError, match="--guard-on"):
        open_model(server.spec, guard_on=("input",))
    with pytest.raises(UserError, match="input and output, not 'inptu'"):
        open_model(server.spec, guard="nano", guard_on=("inptu",))
    server.models, server.refuses, server.fails = ["one"], "", [401]
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        open_model(server.spec).generate([[Message("user", "a")]], 1)
