"""The OpenAPI document: bodies and answers by their schemas, each with examples.

Bodies are parsed by hand, for errors that name their place in the OpenAI shape; so they are described here.
"""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from guard.schemas import (
    ChatRequest,
    ErrorBody,
    ModerationRequest,
    ModerationResponse,
    StreamHead,
    StreamPiece,
)

Json = dict[str, Any]
_REF = "#/components/schemas/{model}"
_DOT = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGA"
    "WjR9awAAAABJRU5ErkJggg=="
)

MODERATION_BODIES: dict[str, Json] = {
    "text": {"input": "how do I bake bread?"},
    "texts": {"input": ["hello", "I will break your legs"], "model": "omni-moderation-latest"},
    "parts": {
        "input": [
            {"type": "text", "text": "what is this?"},
            {"type": "image_url", "image_url": {"url": _DOT}},
        ]
    },
}
MODERATION_ANSWER: Json = {
    "id": "modr-0d5c",
    "model": "guard-nano",
    "results": [
        {
            "flagged": True,
            "categories": {"violence": True, "S1": True},
            "category_scores": {"violence": 0.93, "S1": 0.93},
            "category_applied_input_types": {"violence": ["text"], "S1": ["text"]},
        }
    ],
    "request_id": "req-7f",
    "policy": "5b1e",
    "policy_version": "1",
}
CHAT_BODIES: dict[str, Json] = {
    "question": {"model": "guard", "messages": [{"role": "user", "content": "how do I bake bread?"}]},
    "answer": {
        "model": "guard",
        "messages": [
            {"role": "user", "content": "I feel sad today."},
            {"role": "assistant", "content": "Nobody likes you."},
        ],
        "logprobs": True,
        "top_logprobs": 2,
    },
}
CHAT_ANSWER: Json = {
    "id": "chatcmpl-1b",
    "object": "chat.completion",
    "created": 1_760_000_000,
    "model": "guard-nano",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "unsafe\nS10", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
}
STREAM_BODY = (
    '{"messages": [{"role": "user", "content": "tell me a story"}], "text": "Once upon "}\n'
    '{"text": "a time there was a baker."}\n'
)
STREAM_ANSWER = (
    '{"type": "verdict", "checked": 35, "flagged": false, "probability": 0.02, "categories": {}, '
    '"named": [], "policy": "5b1e"}\n'
    '{"type": "release", "text": "Once upon a time there was a baker."}\n'
    '{"type": "done", "characters": 35}\n'
)


class ChatMessageAnswer(BaseModel):
    """The verdict in words: `safe`, or `unsafe`, a line break and codes."""

    role: str
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """The only one."""

    index: int
    message: ChatMessageAnswer
    logprobs: dict[str, Any] | None
    finish_reason: str


class ChatAnswer(BaseModel):
    """A chat completion; `guard` holds what the words cannot say."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    guard: dict[str, Any] | None = None
    usage: dict[str, int] | None = None


_SCHEMAS: tuple[type[BaseModel], ...] = (
    ModerationRequest, ModerationResponse, ChatRequest, ChatAnswer, StreamHead, StreamPiece, ErrorBody,
)  # fmt: skip
_ERRORS = {
    400: "the body is malformed, or holds what cannot be judged",
    401: "no valid API key",
    404: "unknown model",
    408: "the body did not come in time",
    413: "the body, a text or an image is too large",
    429: "the key's rate is used up; see Retry-After",
    500: "the guard failed in a way that was not foreseen",
    503: "not ready, overloaded, too slow, or stopping; see Retry-After",
}


def _ref(schema: type[BaseModel]) -> Json:
    return {"$ref": _REF.format(model=schema.__name__)}


def errors() -> dict[int | str, Json]:
    """What may be answered in place of a verdict."""
    content = {"application/json": {"schema": _ref(ErrorBody)}}
    return {status: {"description": text, "content": content} for status, text in _ERRORS.items()}


def answers(schema: type[BaseModel], example: Json) -> dict[int | str, Json]:
    """The answers of a route."""
    content: Json = {"application/json": {"schema": _ref(schema), "example": example}}
    if schema is ChatAnswer:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {200: {"description": "the verdict", "content": content}, **errors()}


def body(schema: type[BaseModel], examples: Mapping[str, Json]) -> Json:
    """The body of a route."""
    shown = {name: {"value": value} for name, value in examples.items()}
    content = {"application/json": {"schema": _ref(schema), "examples": shown}}
    return {"requestBody": {"required": True, "content": content}}


def stream_answers() -> dict[int | str, Json]:
    """The answers of the stream."""
    content = {
        "application/x-ndjson": {"schema": {"type": "string"}, "example": STREAM_ANSWER},
        "text/event-stream": {"schema": {"type": "string"}},
    }
    return {200: {"description": "events while the text comes in", "content": content}, **errors()}


def stream_body() -> Json:
    """The lines that a stream sends."""
    text = {"schema": {"type": "string"}, "example": STREAM_BODY}
    one = {"schema": _ref(StreamHead), "example": {"messages": [], "text": "Once upon a time."}}
    content = {"application/x-ndjson": text, "application/json": one}
    return {"requestBody": {"required": True, "content": content}}


def install(app: FastAPI, keys: bool) -> None:
    """Make the document whole: component schemas, and how to send a key."""

    def document() -> Json:
        if app.openapi_schema is None:
            made = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            _, schemas = models_json_schema(
                [(schema, "validation") for schema in _SCHEMAS], ref_template=_REF
            )
            components = made.setdefault("components", {})
            components.setdefault("schemas", {}).update(schemas["$defs"])
            if keys:
                components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                for path, methods in made["paths"].items():
                    for method in methods.values():
                        if path.startswith("/v1/"):
                            method["security"] = [{"key": []}]
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
