"""`POST /v1/moderations`: one text, each of a list of texts, or one input of several parts."""

import uuid

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from core_llm.chat import Image, Message, Text
from guard.schemas import ModerationRequest, ModerationResponse, ModerationResult
from guard.service import bodies, openapi
from guard.service.gate import asked_of
from guard.service.state import Service


def add(app: FastAPI, service: Service) -> None:
    """The route."""

    @app.post(
        "/v1/moderations",
        tags=["judge"],
        responses=openapi.answers(ModerationResponse, openapi.MODERATION_ANSWER),
        openapi_extra=openapi.body(ModerationRequest, openapi.MODERATION_BODIES),
    )
    async def moderations(request: Request) -> JSONResponse:
        """Judge one text, each of a list of texts, or one input of text and images."""
        service.require()
        asked = bodies.parse(await bodies.read(request, service), ModerationRequest, "input")
        bodies.check_model(asked.model, service)
        conversations = await bodies.inputs_of(asked, service)
        judged = await service.judge(asked_of(request), conversations)
        kinds = _kinds(conversations[0][-1]) if len(conversations) == 1 else frozenset({"text"})
        results = [ModerationResult.of(verdict, judged.policy, kinds) for verdict in judged.verdicts]
        response = ModerationResponse(
            id=f"modr-{uuid.uuid4().hex}",
            model=service.name,
            results=results,
            request_id=asked_of(request).request_id,
            policy=judged.policy.digest,
            policy_version=judged.policy.version,
        )
        return JSONResponse(response.model_dump())


def _kinds(message: Message) -> frozenset[str]:
    """What an input is made of."""
    found = {"image" for part in message.parts if isinstance(part, Image)}
    found |= {"text" for part in message.parts if isinstance(part, Text)}
    return frozenset(found)
