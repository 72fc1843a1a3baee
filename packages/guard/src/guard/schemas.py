"""Bodies of the moderation API. Source: OpenAI API reference, POST /v1/moderations."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from guard.guard import Verdict
from guard.taxonomy import OPENAI_KEYS, openai_scores


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ImageURL(_Strict):
    """Where an image is found."""

    url: str


class TextPart(_Strict):
    """A piece of text of one input."""

    type: Literal["text"]
    text: str


class ImagePart(_Strict):
    """An image of one input; understood, but not judged by this guard."""

    type: Literal["image_url"]
    image_url: ImageURL


class ModerationRequest(_Strict):
    """What a client sends. A list of strings has one result each, a list of parts one in all."""

    input: str | list[str] | list[TextPart | ImagePart]
    model: str | None = None


class ModerationResult(BaseModel):
    """Judgement of one input, under the OpenAI keys and the S-codes beside them."""

    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[str]]

    @classmethod
    def of(cls, verdict: Verdict) -> "ModerationResult":
        """A verdict in the API's shape: no key missing, none null."""
        scores = {**openai_scores(verdict.categories), **verdict.categories}
        named = {code: 1.0 for code in verdict.named}
        raised = {**openai_scores(named), **{code: named.get(code, 0.0) for code in verdict.categories}}
        return cls(
            flagged=verdict.unsafe,
            categories={key: value > 0 for key, value in raised.items()},
            category_scores=scores,
            category_applied_input_types={
                key: [] if OPENAI_KEYS.get(key, True) == () else ["text"] for key in scores
            },
        )


class ModerationResponse(BaseModel):
    """What a client gets: results in the order of the inputs."""

    id: str
    model: str
    results: list[ModerationResult]


class ErrorDetail(BaseModel):
    """Why a request failed."""

    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The OpenAI error shape."""

    error: ErrorDetail = Field(...)


def error_body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    """An error as a JSON-ready dict."""
    return ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code)).model_dump()
