"""`POST /v1/chat/completions`: the verdict as a chat model would say it, with its log-probabilities.

The content is `safe`, or `unsafe`, a line break and the codes with commas. Its entries under `logprobs` are
the word, whose alternatives are exactly the two words, and one entry for each category named: their tokens
make up the content. A verdict is ready before the first byte is sent: an error still has its status.
"""

import json
import math
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from guard.guard import Verdict
from guard.schemas import ChatRequest
from guard.service import bodies, openapi
from guard.service.errors import Refused
from guard.service.gate import asked_of
from guard.service.state import Judged, Service

_NEVER = -9999.0  # what the API writes for a log-probability of nothing


def add(app: FastAPI, service: Service) -> None:
    """The route."""

    @app.post(
        "/v1/chat/completions",
        tags=["judge"],
        response_model=None,
        responses=openapi.answers(openapi.ChatAnswer, openapi.CHAT_ANSWER),
        openapi_extra=openapi.body(ChatRequest, openapi.CHAT_BODIES),
    )
    async def completions(request: Request) -> Response:
        """Judge the last message of a conversation; the answer is the verdict in words."""
        service.require()
        asked = bodies.parse(await bodies.read(request, service), ChatRequest, "messages")
        bodies.check_model(asked.model, service)
        if asked.top_logprobs is not None and not asked.logprobs:
            raise Refused("'top_logprobs' needs 'logprobs': true", "top_logprobs", "invalid_value")
        if asked.stream_options is not None and not asked.stream:
            raise Refused("'stream_options' needs 'stream': true", "stream_options", "invalid_value")
        bodies.last_is_judged(asked.messages)
        conversation = await bodies.conversation_of(asked.messages, service)
        judged = await service.judge(asked_of(request), [conversation])
        answer = _Answer(asked, judged, service.name, asked_of(request).request_id)
        if asked.stream:
            return StreamingResponse(answer.events(), media_type="text/event-stream")
        return JSONResponse(answer.whole())


def entries(verdict: Verdict, top: int) -> list[dict[str, Any]]:
    """One entry per token of the verdict's text; top: alternatives shown of each."""
    unsafe = verdict.mass * verdict.probability
    words = {"safe": _log(verdict.mass - unsafe), "unsafe": _log(unsafe)}
    said = "unsafe" if verdict.unsafe else "safe"
    found = [_entry(said, words[said], words, top)]
    for place, code in enumerate(verdict.named):
        before = "," if place else "\n"
        share = {c: _log(p / verdict.probability if verdict.probability else 0.0) for c, p in _all(verdict)}
        shown = {before + c: value for c, value in share.items()}
        found.append(_entry(before + code, shown.get(before + code, _NEVER), shown, top))
    return found


def _all(verdict: Verdict) -> list[tuple[str, float]]:
    return list(verdict.categories.items())


def _log(probability: float) -> float:
    return min(0.0, math.log(probability)) if probability > 0 else _NEVER


def _entry(token: str, logprob: float, shown: dict[str, float], top: int) -> dict[str, Any]:
    best = sorted(shown.items(), key=lambda item: -item[1])[:top]
    return {**_one(token, logprob), "top_logprobs": [_one(*item) for item in best]}


def _one(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode("utf-8", "replace"))}


class _Answer:
    """A verdict as a whole completion, or as the events of a streamed one."""

    def __init__(self, asked: ChatRequest, judged: Judged, model: str, request_id: str) -> None:
        self._asked, self._verdict, self._judged = asked, judged.verdicts[0], judged
        self._entries = entries(self._verdict, asked.top_logprobs or 0)
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"policy-{judged.policy.digest[:16]}",
            "request_id": request_id,
        }

    @property
    def _guard(self) -> dict[str, Any]:
        """What the words cannot say."""
        verdict, policy = self._verdict, self._judged.policy
        return {
            "flagged": verdict.unsafe,
            "probability": verdict.probability,
            "mass": verdict.mass,
            "categories": verdict.categories,
            "unread": list(verdict.unread),
            "policy": policy.digest,
            "policy_version": policy.version,
        }

    @property
    def _usage(self) -> dict[str, int] | None:
        asked, said = self._judged.usage, len(self._entries)
        if asked is None:
            return None
        return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}

    def _logprobs(self, found: list[dict[str, Any]]) -> dict[str, Any] | None:
        return {"content": found, "refusal": None} if self._asked.logprobs else None

    def whole(self) -> dict[str, Any]:
        """The body of an answer in one piece."""
        message = {
            "role": "assistant",
            "content": "".join(entry["token"] for entry in self._entries),
            "refusal": None,
        }
        choice = {
            "index": 0,
            "message": message,
            "logprobs": self._logprobs(self._entries),
            "finish_reason": "stop",
        }
        usage = {"usage": self._usage} if self._usage is not None else {}
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "guard": self._guard,
            **usage,
        }

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events: role, one per entry, the end, and `[DONE]`."""
        yield self._event({"role": "assistant", "content": ""})
        for entry in self._entries:
            yield self._event({"content": entry["token"]}, self._logprobs([entry]))
        yield self._event({}, finish="stop", guard=self._guard)
        options = self._asked.stream_options
        if options is not None and options.include_usage:
            yield self._chunk([], usage=self._usage)
        yield "data: [DONE]\n\n"

    def _event(
        self, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None, **more: Any
    ) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._chunk([choice], **more)

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> str:
        body = {**self._head, "object": "chat.completion.chunk", "choices": choices, **more}
        return f"data: {json.dumps(body)}\n\n"
