"""Images by their address: what a stranger's server or name may try, with a real server on this machine."""

import base64
import contextlib
import gzip
import io
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import anyio
import PIL.Image
import pytest
from fastapi.testclient import TestClient

from guard.service import Limits, Settings, create_app, images
from guard.service.errors import Refused
from guard.testing import WordEngine

LIMITS = Limits(image_bytes=200_000)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def png() -> bytes:
    stream = io.BytesIO()
    PIL.Image.new("RGB", (4, 4), (200, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


class Site(ThreadingHTTPServer):
    """A server that behaves as badly as its paths say. asked: (path, Host) of each request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str]] = []
        self.sent = 0


class Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["host"]))
        with contextlib.suppress(OSError):  # the client leaves, as it should
            getattr(self, self.path.strip("/"))()

    def begin(self, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def good(self) -> None:
        self.begin(content_type="image/png")
        self.wfile.write(png())

    def moved(self) -> None:
        self.begin(302, location=f"http://127.0.0.1:{self.server.server_port}/good")

    def page(self) -> None:
        self.begin(content_type="image/png")
        self.wfile.write(b"<html>metadata of an instance</html>")

    def packed(self) -> None:
        self.begin(content_type="image/png", content_encoding="gzip")
        self.wfile.write(gzip.compress(png() + bytes(50_000_000)))

    def endless(self) -> None:
        self.begin(content_type="image/png")
        while self.server.sent < 100_000_000:
            self.server.sent += self.wfile.write(bytes(65_536))

    def drip(self) -> None:
        self.begin(content_type="image/png")
        for _ in range(100):
            self.wfile.write(b"x")
            time.sleep(0.05)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """The server; for the test its address counts as public, and no other does."""
    server = Site()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(images, "PORTS", (server.server_port,))
    monkeypatch.setattr(images, "public", lambda address: address == "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


def at(site: Site, path: str) -> str:
    return f"http://pictures.example:{site.server_port}/{path}"


async def here(host: str, port: int) -> list[str]:
    return ["127.0.0.1"]


@pytest.mark.anyio
async def test_the_connection_goes_to_the_address_that_was_checked(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    answers = [["127.0.0.1"], ["127.0.0.2"]]  # a name that answers differently the second time
    names: list[str] = []

    async def rebinding(host: str, port: int) -> list[str]:
        names.append(host)
        return answers[len(names) - 1]

    assert await images.load(at(site, "good"), LIMITS, True, rebinding) == png()
    assert names == ["pictures.example"]
    assert site.asked == [("/good", f"pictures.example:{site.server_port}")]


@pytest.mark.anyio
async def test_one_private_address_among_several_is_enough_to_refuse(site: Site) -> None:
    async def mixed(host: str, port: int) -> list[str]:
        return ["127.0.0.1", "10.0.0.1"]

    with pytest.raises(Refused, match="not reachable"):
        await images.load(at(site, "good"), LIMITS, True, mixed)
    assert not site.asked


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("moved", 400, "image_unreachable"),
        ("page", 400, "invalid_image"),
        ("packed", 400, "invalid_image"),
        ("endless", 413, "image_too_large"),
        ("drip", 400, "image_unreachable"),
    ],
)
@pytest.mark.anyio
async def test_a_server_that_misbehaves_is_refused_in_time(
    site: Site, monkeypatch: pytest.MonkeyPatch, path: str, status: int, code: str
) -> None:
    monkeypatch.setattr(images, "FETCH_SECONDS", 0.4 if path == "drip" else 10.0)
    began = time.monotonic()
    with pytest.raises(Refused) as caught:
        await images.load(at(site, path), LIMITS, True, here)
    assert (caught.value.status, caught.value.code) == (status, code)
    assert "example" not in str(caught.value) and "metadata" not in str(caught.value)
    assert len(site.asked) == 1  # a redirect is not followed
    assert time.monotonic() - began < 3 and site.sent < 50_000_000


@pytest.mark.anyio
async def test_a_name_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "FETCH_SECONDS", 0.1)

    async def never(host: str, port: int) -> list[str]:
        await anyio.sleep(60)
        return []

    with anyio.fail_after(5), pytest.raises(Refused, match="did not arrive"):
        await images.load("http://slow.example/x.png", LIMITS, True, never)


@pytest.mark.parametrize(
    "host",
    [
        "localhost", "localhost.", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0", "0.0.0.0",
        "169.254.169.254", "2852039166", "[::1]", "[::]", "[::127.0.0.1]", "[::ffff:127.0.0.1]",
        "[::ffff:a9fe:a9fe]", "[::ffff:0:127.0.0.1]", "[64:ff9b::a9fe:a9fe]", "[64:ff9b:1::7f00:1]",
        "[2002:7f00:1::]", "[fd00:ec2::254]", "[fe80::1]", "\u2460\u2461\u2466.0.0.1",
    ],
)  # fmt: skip
@pytest.mark.anyio
async def test_no_spelling_of_a_private_host_is_connected_to(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    connected: list[str] = []

    async def connect(parts: Any, host: str, port: int, address: str, limits: Limits) -> bytes:
        connected.append(address)
        return png()

    monkeypatch.setattr(images, "_get", connect)
    with pytest.raises(Refused):  # through the system's own resolver
        await images.load(f"http://{host}/latest/meta-data", LIMITS, True)
    assert not connected
    assert await images.load("http://8.8.8.8/x.png", LIMITS, True) == png() and connected == ["8.8.8.8"]


@pytest.mark.parametrize(
    "url",
    [
        "http://pictures.example@127.0.0.1/x", "http://127.0.0.1\\@pictures.example/x", "gopher://x.example/",
        "file:///etc/passwd", "http://x.example:22/", "http://x.example/\r\nHost: y", "http://x.example/a b",
        "http:///x", "//x.example/x", "http://[::1/x", "http://x.example:99999/",
    ],
)  # fmt: skip
@pytest.mark.anyio
async def test_addresses_that_parsers_disagree_on_are_not_even_looked_up(url: str) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        pytest.fail(f"looked up {host}")

    with pytest.raises(Refused):
        await images.load(url, LIMITS, True, resolve)


def test_the_service_fetches_only_where_it_is_allowed_and_logs_no_address(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(images, "lookup", here)
    body = {"input": [{"type": "image_url", "image_url": {"url": at(site, "good")}}]}
    with TestClient(create_app(WordEngine(sees=True))) as client:
        refused = client.post("/v1/moderations", json=body)
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "unsupported_input"
    assert not site.asked
    with TestClient(create_app(WordEngine(sees=True), Settings(image_urls=True))) as client:
        assert client.post("/v1/moderations", json=body).status_code == 200
        monkeypatch.setattr(images, "public", lambda address: False)
        inside = client.post("/v1/moderations", json=body)
        assert inside.json()["error"]["code"] == "image_unreachable" and "example" not in inside.text
    assert len(site.asked) == 1
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("guard")]
    assert ours and "pictures.example" not in " ".join(ours)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
@pytest.mark.anyio
async def test_images_whose_other_pictures_nobody_would_see_are_refused(form: str) -> None:
    stream = io.BytesIO()
    first, second = (PIL.Image.new("RGB", (8, 8), colour) for colour in ("white", "black"))
    first.save(stream, form, save_all=True, append_images=[second])
    url = f"data:image/{form.lower()};base64," + base64.b64encode(stream.getvalue()).decode()
    with pytest.raises(Refused, match="one picture"):
        await images.load(url, LIMITS, False)
    still = io.BytesIO()
    first.save(still, form)
    url = f"data:image/{form.lower()};base64," + base64.b64encode(still.getvalue()).decode()
    assert await images.load(url, LIMITS, False) == still.getvalue()
