"""Keys, rates, queue, audit log, metrics, policy, images, and the engine in its own process."""

import base64
import io
import os
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from fastapi.testclient import TestClient

from core_llm.chat import Message
from core_llm.errors import UserError
from guard.engine import EngineError
from guard.policy import Policy, PolicyStore
from guard.service import Limits, Settings, create_app
from guard.service.audit import AuditLog
from guard.service.auth import KeyRing, new_key
from guard.service.images import download, public
from guard.service.process import ProcessEngine
from guard.service.rates import Rates
from guard.testing import WordEngine


def post(client: TestClient, text: Any = "hello", **headers: str) -> Any:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.post("/v1/moderations", json={"input": text}, headers=named)


def test_only_a_known_key_gets_in_and_no_key_is_kept(tmp_path: Path) -> None:
    key, line = new_key("alice")
    (tmp_path / "keys").write_text(f"# who may ask\n{line}\n")
    ring = KeyRing.read(tmp_path / "keys")
    assert key not in line and key not in repr(vars(ring))
    with TestClient(create_app(WordEngine(), Settings(keys=ring))) as client:
        assert post(client, authorization=f"Bearer {key}").status_code == 200
        for wrong in (
            "",
            "Bearer",
            "Bearer ",
            f"Basic {key}",
            f"Bearer {key}x",
            "Bearer \u00e9".encode("latin-1"),
        ):
            refused = client.post("/v1/moderations", json={"input": "x"}, headers={"authorization": wrong})
            assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/healthz").status_code == client.get("/metrics").status_code == 200


def test_key_files_are_read_strictly_and_never_quoted(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("alice: my-plain-key\n")
    with pytest.raises(UserError, match="line 1") as caught:
        KeyRing.read(tmp_path / "keys")
    assert "my-plain-key" not in str(caught.value)
    with pytest.raises(UserError, match="shorter"):
        KeyRing.of("short")
    assert KeyRing.of("bob=" + "k" * 30).name_of("Bearer " + "k" * 30) == "bob"


def test_rates_refill_and_lists_count_by_their_length() -> None:
    now = [0.0]
    rates = Rates(60, burst=2, clock=lambda: now[0])
    assert [rates.take("a"), rates.take("a")] == [0, 0]
    assert rates.take("a") == pytest.approx(1.0) and rates.take("b") == 0
    now[0] = 1.0
    assert rates.take("a") == 0
    rates.charge("a", 5)
    assert rates.take("a") == pytest.approx(6.0)


def test_too_many_requests_are_429_with_retry_after() -> None:
    with TestClient(create_app(WordEngine(), Settings(rate=1, burst=1))) as client:
        assert post(client).status_code == 200
        refused = post(client)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 30
        assert client.get("/readyz").status_code == 200


def test_a_full_queue_and_a_late_verdict_are_503_and_never_safe() -> None:
    settings = Settings(batch=1, queue=1, wait_ms=0, timeout=0.2)
    with TestClient(create_app(WordEngine(delay=0.5), settings)) as client:
        found: list[Any] = []
        threads = [threading.Thread(target=lambda: found.append(post(client))) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {r.status_code for r in found} == {503}
        assert {r.json()["error"]["code"] for r in found} == {"timeout", "overloaded"}
        assert all("retry-after" in r.headers for r in found)


def test_request_ids_are_echoed_and_bad_ones_replaced() -> None:
    with TestClient(create_app(WordEngine())) as client:
        good = post(client, x_request_id="abc-1")
        assert good.headers["x-request-id"] == good.json()["request_id"] == "abc-1"
        assert post(client, x_request_id="a b\x7f").headers["x-request-id"].startswith("req-")


def test_the_audit_log_holds_hashes_scores_and_policy_but_no_text(tmp_path: Path) -> None:
    path = tmp_path / "audit.db"
    log = AuditLog(path, secret="s")
    with TestClient(create_app(WordEngine(), Settings(audit=log))) as client:
        post(client, ["my secret bomb", "hello"], x_request_id="r1")
    rows = (
        sqlite3.connect(path)
        .execute("SELECT request, item, flagged, policy_digest, named, hash, text FROM audit ORDER BY item")
        .fetchall()
    )
    assert [row[:3] for row in rows] == [("r1", 0, 1), ("r1", 1, 0)]
    assert rows[0][3] == Policy().digest and rows[0][4] == "S9" and rows[0][6] is None
    assert rows[0][5] == log.fingerprint(b"my secret bomb")
    assert b"my secret" not in b"".join(p.read_bytes() for p in tmp_path.iterdir())


def test_a_text_is_stored_where_it_was_asked_for(tmp_path: Path) -> None:
    with TestClient(create_app(WordEngine(), Settings(audit=AuditLog(tmp_path / "a", keep_text=True)))) as c:
        post(c, "plain words")
    assert sqlite3.connect(tmp_path / "a").execute("SELECT text FROM audit").fetchall() == [("plain words",)]


@pytest.mark.parametrize("required", [True, False])
def test_a_locked_audit_log_withholds_the_verdict_or_is_counted(tmp_path: Path, required: bool) -> None:
    log = AuditLog(tmp_path / "audit.db")
    lock = sqlite3.connect(tmp_path / "audit.db", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    with TestClient(create_app(WordEngine(), Settings(audit=log, audit_required=required))) as client:
        answer = post(client)
        assert answer.status_code == (503 if required else 200)
        assert "guard_audit_failures_total 1.0" in client.get("/metrics").text
        lock.execute("ROLLBACK")
        assert post(client).status_code == 200  # it heals by itself


def test_a_full_disk_withholds_the_verdict(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.db", keep_text=True)
    connect = log._connect

    def small() -> sqlite3.Connection:
        connection = connect()
        connection.execute("PRAGMA max_page_count=8")  # SQLite's own way to run out of room
        return connection

    log._connect = small  # type: ignore[method-assign]
    with TestClient(create_app(WordEngine(), Settings(audit=log))) as client:
        found = [post(client, "x" * 20_000) for _ in range(4)]
        assert found[-1].status_code == 503 and found[-1].json()["error"]["code"] == "audit_unavailable"


def test_metrics_count_and_show_the_policy() -> None:
    with TestClient(create_app(WordEngine())) as client:
        post(client, ["a bomb", "hello"])
        client.get("/no/such/path")
        text = client.get("/metrics").text
    assert 'guard_verdicts_total{verdict="unsafe"} 1.0' in text and Policy().digest in text
    assert 'endpoint="other",status="404"' in text and "guard_ready 1.0" in text


def test_the_policy_file_is_followed_and_an_invalid_one_is_refused_whole(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    Policy(version="1").write(path)
    engine = WordEngine()
    store = PolicyStore(path, engine.check)
    app = create_app(engine, Settings(policies=store))
    with TestClient(app) as client:
        assert post(client, "a bomb").json()["results"][0]["flagged"]
        Policy(version="2", threshold=0.9999).write(path)
        app.state.service.reload_policy()
        second = post(client, "a bomb").json()
        assert second["policy_version"] == "2" and not second["results"][0]["flagged"]
        path.write_text("categories: nonsense\n")
        app.state.service.reload_policy()
        assert post(client).json()["policy_version"] == "2"
        assert 'guard_policy_reloads_total{result="refused"} 1.0' in client.get("/metrics").text


def png(size: int = 4) -> str:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (size, size), (200, 0, 0)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def test_images_are_judged_where_the_guard_has_eyes_and_checked_first() -> None:
    limits = Limits(image_bytes=2000, image_pixels=10_000, images=2)
    with TestClient(create_app(WordEngine(sees=True), Settings(limits))) as client:
        seen = post(client, [{"type": "text", "text": "a bomb"}, part(png())]).json()["results"][0]
        assert seen["flagged"] and seen["category_applied_input_types"]["violence"] == ["text", "image"]
        assert seen["category_applied_input_types"]["hate"] == ["text"]
        assert post(client, [part(png())]).status_code == 200
        for url, status, code in (
            ("data:image/png;base64,AAAA", 400, "invalid_image"),
            ("data:image/png;base64,*", 400, "invalid_image"),
            ("data:text/html,x", 400, "invalid_image"),
            (png(200), 413, "image_too_large"),
            ("data:image/png;base64," + "A" * 4000, 413, "image_too_large"),
            ("http://example.com/a.png", 400, "unsupported_input"),
        ):
            bad = post(client, [part(url)])
            assert (bad.status_code, bad.json()["error"]["code"]) == (status, code), url[:40]
        assert post(client, [part(png())] * 3).status_code == 400


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
        "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "::ffff:10.0.0.1",
        "64:ff9b::7f00:1", "2002:7f00:1::", "ff02::1", "fec0::1", "nonsense",
    ],
)  # fmt: skip
def test_private_addresses_are_not_public(address: str) -> None:
    assert not public(address)


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("http://localhost/x", ["127.0.0.1"]),
        ("http://mixed.example/x", ["93.184.216.34", "10.0.0.1"]),
        ("http://user@host.example/x", ["93.184.216.34"]),
        ("http://host.example:8080/x", ["93.184.216.34"]),
        ("file:///etc/passwd", ["93.184.216.34"]),
        ("http://no.example/", []),
    ],
)
@pytest.mark.anyio
async def test_an_address_inside_is_never_connected_to(url: str, found: list[str]) -> None:
    from guard.service.errors import Refused

    async def resolve(host: str, port: int) -> list[str]:
        return found

    assert public("93.184.216.34")
    with pytest.raises(Refused):
        await download(url, Limits(), resolve)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def said(text: str) -> Sequence[Message]:
    return [Message("user", text)]


def test_an_engine_process_that_is_killed_fails_closed_and_comes_back() -> None:
    engine = ProcessEngine(partial(WordEngine, 0.3))
    try:
        assert engine.judge([said("a bomb")])[0].unsafe and engine.policy == Policy()
        with pytest.raises(UserError):
            engine.judge([said(" ")])
        threading.Timer(0.1, os.kill, (engine.pid, signal.SIGKILL)).start()
        with pytest.raises(EngineError):
            engine.judge([said("hello")])
        assert not engine.ready
        settings = replace(Settings(), wait_ms=0)
        with TestClient(create_app(engine, settings)) as client:
            assert client.get("/readyz").status_code == 503
            early = post(client)
            assert early.status_code == 503 and "retry-after" in early.headers
            until = time.monotonic() + 60
            while client.get("/readyz").status_code != 200 and time.monotonic() < until:
                time.sleep(0.1)
            assert post(client, "a bomb").json()["results"][0]["flagged"]
            assert "guard_engine_restarts 1.0" in client.get("/metrics").text
    finally:
        engine.close()


def test_traces_hold_facts_and_no_text() -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from guard.service.telemetry import Tracing

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with TestClient(create_app(WordEngine(), tracing=Tracing(provider))) as client:
        key = {"authorization": "Bearer secret", "x-request-id": "r1"}
        client.post(
            "/v1/moderations", json={"input": ["secret bomb", "x"]}, headers=key | {"traceparent": parent}
        )
        client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "secret"}]})
        lines = b'{"messages": [{"role": "user", "content": "secret"}], "text": "secret"}\n'
        client.post("/v1/moderations/stream", content=lines)
        client.post("/v1/moderations", json={"input": 5, "secret": "secret"})
        client.post("/v1/secret?secret=secret", json={})
        client.request("SECRET", "/v1/moderations")
        for probe in ("/healthz", "/readyz", "/metrics"):
            client.get(probe)
    spans = exporter.get_finished_spans()
    tops = [span for span in spans if span.name != "judge"]
    assert [span.name for span in tops] == [
        "POST /v1/moderations", "POST /v1/chat/completions", "POST /v1/moderations/stream",
        "POST /v1/moderations", "POST other", "other /v1/moderations",
    ]  # fmt: skip
    assert dict(tops[0].attributes or {}) == {
        "guard.request_id": "r1", "guard.inputs": 2, "guard.flagged": 1, "http.response.status_code": 200,
    }  # fmt: skip
    assert format(tops[0].context.trace_id, "032x") == parent.split("-")[1]
    assert [(s.attributes or {})["http.response.status_code"] for s in tops[3:]] == [400, 404, 405]
    judged = [span.parent.span_id for span in spans if span.name == "judge" and span.parent is not None]
    assert judged == [span.context.span_id for span in tops[:3]]
    assert "secret" not in "".join(span.to_json() for span in spans).lower()


def test_spans_reach_a_collector_over_http() -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    from guard.service.telemetry import to_collector

    found: list[tuple[str, str]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            sent = ExportTraceServiceRequest.FromString(body)
            spans = [s for r in sent.resource_spans for scope in r.scope_spans for s in scope.spans]
            found.extend((self.path, span.name) for span in spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        tracing = to_collector(f"http://127.0.0.1:{server.server_port}/v1/traces")
        with TestClient(create_app(WordEngine(), tracing=tracing)) as client:
            assert post(client).status_code == 200
        server.shutdown()
    assert found == [("/v1/traces", "judge"), ("/v1/traces", "POST /v1/moderations")]
    for wrong in ("localhost:4318", "http://", "ftp://localhost/v1/traces"):
        with pytest.raises(UserError, match="--otlp must be"):
            to_collector(wrong)


def test_readers_of_ones_own_give_the_service_eyes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from guard.cli_serve import with_readers

    (tmp_path / "my_readers.py").write_text(
        "from core_llm.chat import Image\n"
        "from guard.multimodal import Reading\n\n\n"
        "class Size:\n"
        "    def read(self, parts):\n"
        "        return [Reading('a bomb', sure=len(part.data) > 100) for part in parts]\n\n\n"
        "def readers():\n"
        "    return {Image: Size()}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    with TestClient(create_app(with_readers(WordEngine(), "my_readers:readers"))) as client:
        for side, unread in ((64, []), (1, ["image 1 of message 1"])):
            stream = io.BytesIO()
            PIL.Image.effect_noise((side, side), 50).save(stream, "PNG")
            url = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
            answer = post(client, [{"type": "image_url", "image_url": {"url": url}}])
            assert answer.status_code == 200
            result = answer.json()["results"][0]
            assert result["flagged"] and result["unread"] == unread
    for wrong in ("my_readers", "my_readers:nothing", "no_such_module:readers", "my_readers:Size"):
        with pytest.raises(UserError, match="--readers"):
            with_readers(WordEngine(), wrong)
