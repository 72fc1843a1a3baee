"""The OpenAPI document: valid, with examples that work, and nothing in it leads to a server error."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, settings
from schemathesis import SerializationContext

from guard.service import Limits, Settings, create_app
from guard.testing import WordEngine

from .live import live


@schemathesis.serializer("application/x-ndjson")
def lines(_: SerializationContext, value: Any) -> bytes:
    """A text as it is, anything else as one line of JSON."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text.encode("utf-8", "surrogatepass")


def app() -> FastAPI:
    return create_app(WordEngine(sees=True), Settings(Limits(images=2), wait_ms=0, queue=10_000))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with live(app()) as found:
        yield found


schema = schemathesis.openapi.from_dict(app().openapi())


@schema.parametrize()
@settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
def test_no_request_that_fits_or_misses_the_document_is_a_server_error(
    case: schemathesis.Case, address: str
) -> None:
    response = case.call(base_url=address)
    assert response.status_code < 500, response.status_code
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", ["/v1/moderations", "/v1/chat/completions", "/v1/moderations/stream"])
def test_every_example_of_the_document_is_answered(path: str) -> None:
    with TestClient(create_app(WordEngine(sees=True))) as client:
        post = client.get("/openapi.json").json()["paths"][path]["post"]
        for kind, content in post["requestBody"]["content"].items():
            examples = [e["value"] for e in content.get("examples", {}).values()] or [content["example"]]
            for example in examples:
                sent = {"content": example} if isinstance(example, str) else {"json": example}
                assert client.post(path, headers={"content-type": kind}, **sent).status_code == 200
