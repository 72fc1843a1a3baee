"""From the bytes of a body to conversations, each step bounded; what is wrong is named, never repeated."""

import json
from collections.abc import Sequence
from typing import TypeVar

import anyio
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from core_llm.chat import Image, Message, Part, Text
from guard.schemas import ChatMessage, ImagePart, ModerationRequest, TextPart
from guard.service import images
from guard.service.errors import Refused
from guard.service.settings import Limits
from guard.service.state import Service

# Names that OpenAI clients send; they all mean the guard that runs here.
ALIASES = frozenset(
    {
        "guard",
        "omni-moderation-latest",
        "omni-moderation-2024-09-26",
        "text-moderation-latest",
        "text-moderation-stable",
    }
)
_EXPECTED = {
    "input": "a string, a list of strings, or a list of {type: text | image_url} parts",
    "model": "a string",
    "messages": "a list of {role, content} with roles system, developer, user, assistant or tool",
    "n": "1",
    "top_logprobs": "a whole number from 0 to 20",
    "text": "a string",
}
Body = TypeVar("Body", bound=BaseModel)


async def read(request: Request, service: Service) -> bytes:
    """The body; raises `Refused` 413 beyond the limit, 408 where it does not come in time."""
    limit = service.settings.limits.body(service.sees)
    body = bytearray()
    with anyio.move_on_after(service.settings.read_timeout):
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise Refused(
                        f"the body is longer than {limit} bytes", code="request_too_large", status=413
                    )
        except ClientDisconnect:
            raise Refused("the client left", code="client_left", status=499) from None
        return bytes(body)
    raise Refused(
        f"the body did not come within {service.settings.read_timeout:g} s",
        code="request_timeout",
        status=408,
    )


def parse(body: bytes, schema: type[Body], needed: str | None = None) -> Body:
    """A body's JSON as `schema`; raises `Refused` with the place of the first mistake, never its text."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused("the body is not valid JSON", code="invalid_json") from None
    if not isinstance(values, dict):
        key = f" with the key '{needed}'" if needed else ""
        raise Refused(f"the body must be a JSON object{key}", code="invalid_type")
    if needed is not None and needed not in values:
        raise Refused(f"missing required parameter: '{needed}'", needed, "missing_required_parameter")
    unknown = sorted(set(values) - set(schema.model_fields))
    if unknown:
        shown = unknown[0][:64].encode("utf-8", "replace").decode()
        raise Refused(f"unknown parameter: '{shown}'", shown, "unknown_parameter")
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        place = str((error.errors(include_input=False)[0]["loc"] or ("body",))[0])
        raise Refused(f"'{place}' must be {_EXPECTED.get(place, 'valid')}", place, "invalid_type") from None


def check_model(model: str | None, service: Service) -> None:
    """Raise `Refused` 404 for a model that is not the one that runs here."""
    name = service.require().name
    if model is not None and model not in ALIASES | {name}:
        known = ", ".join([name, *sorted(ALIASES)])
        raise Refused(f"unknown model; known: {known}", "model", "model_not_found", status=404)


async def inputs_of(asked: ModerationRequest, service: Service) -> list[list[Message]]:
    """One conversation per result; raises `Refused` for what is empty, too much, or cannot be judged."""
    given = asked.input
    limits = service.settings.limits
    if isinstance(given, str):
        given = [given]
    if not given:
        raise Refused("'input' is empty: give at least one text", "input", "empty_input")
    if len(given) > limits.inputs:
        raise Refused(f"'input' has more than {limits.inputs} items", "input", "too_many_inputs")
    texts = [item for item in given if isinstance(item, str)]
    if texts:
        check_texts(texts, limits)
        if not all(text.strip() for text in texts):
            raise Refused("'input' holds an empty text", "input", "empty_input")
        return [[Message("user", text)] for text in texts]
    parts = await parts_of([p for p in given if not isinstance(p, str)], service)
    return [[Message("user", parts)]]


async def parts_of(given: Sequence[TextPart | ImagePart], service: Service) -> str | tuple[Part, ...]:
    """The content of a message: one string where it is all text, else its parts in order."""
    limits = service.settings.limits
    texts = [part.text for part in given if isinstance(part, TextPart)]
    pictures = [part for part in given if isinstance(part, ImagePart)]
    check_texts(texts, limits)
    if pictures and not service.sees:
        raise Refused("this guard reads text only: leave image parts out", "input", "unsupported_input")
    if not pictures:
        joined = "\n".join(texts)
        if not joined.strip():
            raise Refused("'input' holds an empty text", "input", "empty_input")
        return joined
    if len(pictures) > limits.images:
        raise Refused(f"more than {limits.images} images", "input", "too_many_inputs")
    found: list[Part] = []
    for part in given:
        if isinstance(part, TextPart):
            found.append(Text(part.text))
        else:
            fetch = service.settings.image_urls
            found.append(Image(await images.load(part.image_url.url, limits, fetch)))
    return tuple(found)


def check_texts(texts: Sequence[str], limits: Limits) -> None:
    """Raise `Refused` 413 for more characters than may come at once."""
    if sum(map(len, texts)) > limits.characters:
        message = f"'input' is longer than {limits.characters} characters"
        raise Refused(message, "input", "input_too_long", status=413)


async def conversation_of(messages: Sequence[ChatMessage], service: Service) -> list[Message]:
    """The conversation of a chat request, in the roles that guards know."""
    limits = service.settings.limits
    if len(messages) > limits.inputs:
        raise Refused(f"more than {limits.inputs} messages", "messages", "too_many_inputs")
    check_texts([text for message in messages for text in _texts(message)], limits)
    pictures = sum(
        isinstance(part, ImagePart) for m in messages if not isinstance(m.content, str) for part in m.content
    )
    if pictures > limits.images:
        raise Refused(f"more than {limits.images} images", "messages", "too_many_inputs")
    found = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        given = message.content
        content = given if isinstance(given, str) else await parts_of(given, service)
        found.append(Message(role, content))
    return found


def _texts(message: ChatMessage) -> list[str]:
    if isinstance(message.content, str):
        return [message.content]
    return [part.text for part in message.content if isinstance(part, TextPart)]


def last_is_judged(messages: Sequence[ChatMessage]) -> None:
    """Raise `Refused` where the last message is nobody's: instructions are context, not content."""
    if messages[-1].role in ("system", "developer"):
        raise Refused(
            "the last message is judged: it must be the user's, the assistant's or a tool's",
            "messages",
            "invalid_value",
        )
