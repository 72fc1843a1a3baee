"""Chat completions and watched streams: what the official client and a plain HTTP client get."""

import json
import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient

from guard.service import Settings, create_app
from guard.testing import WordEngine, word_probability

from .live import live

BOMB = [{"role": "user", "content": "build a bomb"}]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_app(WordEngine(), Settings(every=20, hold_back=5, wait_ms=0))) as client:
        yield client


@pytest.fixture(scope="module")
def official() -> Iterator[openai.OpenAI]:
    """The official client, strict, over a socket."""
    with (
        live(create_app(WordEngine(), Settings(wait_ms=0))) as address,
        openai.OpenAI(
            base_url=f"{address}/v1", api_key="none", max_retries=0, _strict_response_validation=True
        ) as client,
    ):
        yield client


def test_the_verdict_is_the_answer_and_its_logprobs_are_the_guards(official: openai.OpenAI) -> None:
    answer = official.chat.completions.create(
        model="guard",
        messages=BOMB,  # type: ignore[arg-type]
        logprobs=True,
        top_logprobs=2,
        temperature=0,
    )
    choice = answer.choices[0]
    assert choice.message.content == "unsafe\nS9" and choice.finish_reason == "stop"
    assert choice.logprobs is not None and choice.logprobs.content is not None
    word, code = choice.logprobs.content
    assert word.token + code.token == choice.message.content
    assert math.exp(word.logprob) == pytest.approx(word_probability("build a bomb"))
    assert [other.token for other in word.top_logprobs] == ["unsafe", "safe"]
    assert sum(math.exp(other.logprob) for other in word.top_logprobs) == pytest.approx(1.0)
    assert math.exp(code.logprob) == pytest.approx(1.0)


def test_a_streamed_verdict_says_the_same(official: openai.OpenAI) -> None:
    events = list(
        official.chat.completions.create(model="guard", messages=BOMB, stream=True, logprobs=True)  # type: ignore[arg-type, call-overload]
    )
    said = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
    assert said == "unsafe\nS9" and events[-1].choices[0].finish_reason == "stop"


def test_parts_and_roles_of_a_conversation(official: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "system", "content": "a bomb of context"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "you"}]},
        {"role": "assistant", "content": "fine"},
    ]
    assert (
        official.chat.completions.create(model="guard", messages=messages).choices[0].message.content
        == "safe"
    )
    assert [model.id for model in official.models.list()] == ["word-engine"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"messages": []}, 400, "invalid_type"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "invalid_type"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "invalid_value"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "invalid_input"),
        ({"messages": BOMB, "n": 2}, 400, "invalid_type"),
        ({"messages": BOMB, "tools": []}, 400, "unknown_parameter"),
        ({"messages": BOMB, "top_logprobs": 2}, 400, "invalid_value"),
        ({"messages": BOMB, "model": "gpt-9"}, 404, "model_not_found"),
        ({}, 400, "missing_required_parameter"),
    ],
)
def test_bad_chat_requests(client: TestClient, body: Any, status: int, code: str) -> None:
    response = client.post("/v1/chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


def watch(client: TestClient, *lines: Any, **headers: str) -> list[dict[str, Any]]:
    body = "\n".join(json.dumps(line) for line in lines)
    response = client.post("/v1/moderations/stream", content=body, headers=headers)
    assert response.status_code == 200
    return [json.loads(line) for line in response.text.splitlines()]


def released(events: list[dict[str, Any]]) -> str:
    return "".join(event.get("text", "") for event in events if event["type"] == "release")


def test_a_safe_stream_is_released_whole_and_in_order(client: TestClient) -> None:
    text = "one two three four five six seven eight nine ten"
    events = watch(client, {"messages": []}, *({"text": c} for c in text))
    assert released(events) == text and events[-1] == {"type": "done", "characters": len(text)}
    judged = 0
    for event in events:  # nothing is released before a verdict covered it
        judged = event.get("checked", judged)
        if event["type"] == "release":
            assert len(event["text"]) <= judged


@pytest.mark.parametrize("at", [0, 7, 18, 19, 20, 33, 60])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_nothing_of_an_unsafe_word_is_ever_released(client: TestClient, at: int, size: int) -> None:
    filler = "abcdefgh " * 8
    text = filler[:at] + "bomb" + filler[at:]
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    events = watch(client, {"messages": []}, *({"text": piece} for piece in pieces))
    assert events[-1]["type"] == "blocked" and events[-1]["named"] == ["S9"]
    assert text.startswith(released(events)) and len(released(events)) <= at


def test_a_stream_that_goes_wrong_ends_with_an_error_and_releases_no_more(client: TestClient) -> None:
    events = watch(client, {"messages": []}, {"text": "short"}, {"wrong": 1})
    assert events[-1]["type"] == "error" and released(events) == ""
    assert client.post("/v1/moderations/stream", content=b"").status_code == 400
    assert client.post("/v1/moderations/stream", content=b"{}\n{").text.count('"error"') >= 1


def test_server_sent_events_on_request(client: TestClient) -> None:
    response = client.post(
        "/v1/moderations/stream", content=b'{"text": "hi"}', headers={"accept": "text/event-stream"}
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    assert "event: release\ndata: " in response.text


def test_blank_text_is_never_released_unjudged(client: TestClient) -> None:
    assert released(watch(client, {"text": "\u200b" * 30 + " "})) == ""
