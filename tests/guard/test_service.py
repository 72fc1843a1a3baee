import json
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from fastapi.testclient import TestClient

from guard.guard import Guard
from guard.service import Limits, create_app
from guard.taxonomy import CATEGORIES, OPENAI_KEYS
from guard.testing import WordGuard

from .live import live

SMALL = Limits(body_bytes=2000, inputs=8, characters=1000)


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_app(WordGuard(), SMALL), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A live server on this machine."""
    with live(create_app(WordGuard(), SMALL)) as found:
        yield found


@pytest.fixture(scope="module")
def official(address: str) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{address}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    )


def test_official_client_reads_one_string(official: openai.OpenAI) -> None:
    response = official.moderations.create(input="how to build a bomb")
    assert response.model == "word-guard" and len(response.results) == 1
    result = response.results[0]
    assert result.flagged and result.categories.violence and not result.categories.hate
    assert result.category_scores.violence == pytest.approx(0.9)
    assert result.category_applied_input_types.violence == ["text"]
    extra = result.categories.model_extra or {}
    assert extra["S9"] is True and extra["S10"] is False


def test_official_client_gets_one_result_per_string_in_order(official: openai.OpenAI) -> None:
    texts = ["hello", "a bomb", "bye", "bomb", "fine"]
    response = official.moderations.create(input=texts, model="omni-moderation-latest")
    assert [r.flagged for r in response.results] == [False, True, False, True, False]


def test_official_client_gets_one_result_for_text_parts(official: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "a bomb"}]
    response = official.moderations.create(input=parts)  # type: ignore[arg-type]
    assert [r.flagged for r in response.results] == [True]


def test_official_client_raises_its_own_errors(official: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        official.moderations.create(input="")
    assert caught.value.param == "input" and caught.value.code == "empty_input"
    with pytest.raises(openai.NotFoundError) as missing:
        official.moderations.create(input="x", model="no-such-model")
    assert missing.value.code == "model_not_found" and "word-guard" in str(missing.value)


def test_every_openai_key_and_s_code_is_there_and_not_null(client: TestClient) -> None:
    result = client.post("/v1/moderations", json={"input": "hello"}).json()["results"][0]
    for field in ("categories", "category_scores", "category_applied_input_types"):
        assert set(result[field]) == set(OPENAI_KEYS) | set(CATEGORIES)
        assert None not in result[field].values()
    assert result["flagged"] is False and not any(result["categories"].values())
    assert max(result["category_scores"].values()) < 0.5  # safe content is not scored 1.0


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
BAD_BODIES: list[tuple[Any, int, str]] = [
    (b"", 400, "invalid_json"),
    (b"{", 400, "invalid_json"),
    (b"\xff\xfe", 400, "invalid_json"),
    (b"[" * 1900, 400, "invalid_json"),
    ([], 400, "invalid_type"),
    ("text", 400, "invalid_type"),
    (None, 400, "invalid_type"),
    ({}, 400, "missing_required_parameter"),
    ({"model": "guard"}, 400, "missing_required_parameter"),
    ({"input": None}, 400, "invalid_type"),
    ({"input": 5}, 400, "invalid_type"),
    ({"input": True}, 400, "invalid_type"),
    ({"input": {"text": "x"}}, 400, "invalid_type"),
    ({"input": ["x", 5]}, 400, "invalid_type"),
    ({"input": [["x"]]}, 400, "invalid_type"),
    ({"input": ["x", {"type": "text", "text": "y"}]}, 400, "invalid_type"),
    ({"input": [{"type": "text"}]}, 400, "invalid_type"),
    ({"input": [{"type": "video", "text": "x"}]}, 400, "invalid_type"),
    ({"input": ""}, 400, "empty_input"),
    ({"input": " \n"}, 400, "empty_input"),
    ({"input": []}, 400, "empty_input"),
    ({"input": ["x", ""]}, 400, "empty_input"),
    ({"input": [{"type": "text", "text": "x"}, IMAGE]}, 400, "unsupported_input"),
    ({"input": ["x"] * 9}, 400, "too_many_inputs"),
    ({"input": "x" * 1001}, 413, "input_too_long"),
    ({"input": "x" * 3000}, 413, "request_too_large"),
    ({"input": "x", "model": "gpt-9"}, 404, "model_not_found"),
    ({"input": "x", "model": 5}, 400, "invalid_type"),
    ({"input": "x", "modell": "guard"}, 400, "unknown_parameter"),
]


@pytest.mark.parametrize(("body", "status", "code"), BAD_BODIES)
def test_bad_bodies_get_a_client_error_in_the_openai_shape(
    client: TestClient, body: Any, status: int, code: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = client.post("/v1/moderations", content=content)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code and error["type"] == "invalid_request_error"
    assert len(error["message"]) < 300


def test_invisible_text_is_refused_like_an_empty_one(guard: Guard) -> None:
    with TestClient(create_app(guard, SMALL)) as client:
        response = client.post("/v1/moderations", json={"input": "\u200b"})
    assert response.status_code == 400 and "empty" in response.json()["error"]["message"]


def test_broken_surrogates_are_judged_and_not_a_crash(guard: Guard) -> None:
    with TestClient(create_app(guard, SMALL)) as client:
        response = client.post("/v1/moderations", content=b'{"input": "\\ud800 hello"}')
    assert response.status_code == 200


def test_wrong_path_and_method_are_errors_in_the_same_shape(client: TestClient) -> None:
    assert client.get("/v1/moderations").status_code == 405
    missing = client.post("/v1/nothing")
    assert missing.status_code == 404 and missing.json()["error"]["type"] == "invalid_request_error"


def test_health_and_readiness(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready", "model": "word-guard"}


def test_not_ready_until_the_guard_is_loaded() -> None:
    go = threading.Event()

    def load() -> Guard:
        go.wait(5)
        return WordGuard()

    with TestClient(create_app(load)) as client:
        assert client.get("/healthz").status_code == 200
        assert client.get("/readyz").status_code == 503
        early = client.post("/v1/moderations", json={"input": "x"})
        assert early.status_code == 503 and early.json()["error"]["code"] == "not_ready"
        go.set()
        for _ in range(200):
            if client.get("/readyz").status_code == 200:
                break
            time.sleep(0.01)
        assert client.post("/v1/moderations", json={"input": "x"}).status_code == 200


class SlowGuard(WordGuard):
    """Takes its time."""

    def classify(self, conversations: Any, batch_size: int = 32, policy: Any = None) -> Any:
        time.sleep(1.0)
        return super().classify(conversations, batch_size, policy)


def test_health_answers_while_the_guard_computes() -> None:
    with TestClient(create_app(SlowGuard())) as client:
        worker = threading.Thread(target=lambda: client.post("/v1/moderations", json={"input": "x"}))
        worker.start()
        time.sleep(0.1)
        began = time.monotonic()
        assert client.get("/healthz").status_code == 200
        assert time.monotonic() - began < 0.5
        worker.join()


class FailingGuard(WordGuard):
    """Fails with the user's text in its message."""

    def classify(self, conversations: Any, batch_size: int = 32, policy: Any = None) -> Any:
        raise RuntimeError(f"cannot judge {conversations}")


def test_neither_logs_nor_errors_repeat_what_the_user_wrote(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "my-secret-words"
    for guard, status in ((WordGuard(), 200), (FailingGuard(), 503)):
        with TestClient(create_app(guard), raise_server_exceptions=False) as client:
            response = client.post("/v1/moderations", json={"input": secret})
        assert response.status_code == status
        assert secret not in response.text
    with TestClient(create_app(WordGuard())) as client:
        assert secret not in client.post("/v1/moderations", json={"input": [secret, 5]}).text
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("guard")]
    assert any("1 inputs" in line for line in ours)
    everyone = [record for record in caplog.records if secret in record.getMessage() or record.exc_info]
    assert not everyone


def test_a_body_without_end_is_cut_off(address: str) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 1000

    response = httpx.post(f"{address}/v1/moderations", content=endless())
    assert response.status_code == 413
