"""Bodies of the service. Source: OpenAI API reference, moderations and chat completions."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from guard.guard import Verdict
from guard.policy import Policy
from guard.taxonomy import OPENAI_KEYS, openai_scores

# The keys whose score an image may raise; of the others the API says that they read text only.
IMAGE_KEYS = frozenset(
    {
        "self-harm",
        "self-harm/instructions",
        "self-harm/intent",
        "sexual",
        "violence",
        "violence/graphic",
    }
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ImageURL(_Strict):
    """Where an image is found: a data: URL, or an address where the service may fetch."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class TextPart(_Strict):
    """A piece of text of one input."""

    type: Literal["text"]
    text: str


class ImagePart(_Strict):
    """An image of one input; judged where the guard has eyes, refused otherwise."""

    type: Literal["image_url"]
    image_url: ImageURL


Parts = list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class ModerationRequest(_Strict):
    """What a client sends. A list of strings has one result each, a list of parts one in all."""

    input: str | list[str] | Parts
    model: str | None = None


class ModerationResult(BaseModel):
    """Judgement of one input, under the OpenAI keys and the codes of the policy beside them.

    unread: images that nobody could read, where readers stand before the guard; such an input is flagged.
    """

    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[str]]
    unread: list[str] = Field(default_factory=list)

    @classmethod
    def of(
        cls, verdict: Verdict, policy: Policy | None = None, inputs: frozenset[str] = frozenset({"text"})
    ) -> "ModerationResult":
        """A verdict in the API's shape: no key missing, none null. inputs: "text", "image" or both."""
        policy = policy or Policy()
        named = {code: 1.0 for code in verdict.named}
        scores = {**openai_scores(policy.hazards(verdict.categories)), **verdict.categories}
        raised = {
            **openai_scores(policy.hazards(named)),
            **{code: named.get(code, 0.0) for code in verdict.categories},
        }
        return cls(
            flagged=verdict.unsafe,
            categories={key: value > 0 for key, value in raised.items()},
            category_scores=scores,
            category_applied_input_types={key: _applied(key, inputs) for key in scores},
            unread=list(verdict.unread),
        )


def _applied(key: str, inputs: frozenset[str]) -> list[str]:
    if OPENAI_KEYS.get(key, True) == ():
        return []  # nothing can raise it
    return sorted(kind for kind in inputs if kind == "text" or key in IMAGE_KEYS or key not in OPENAI_KEYS)[
        ::-1
    ]


class ModerationResponse(BaseModel):
    """What a client gets: results in the order of the inputs, then what OpenAI has no key for."""

    id: str
    model: str
    results: list[ModerationResult]
    request_id: str
    policy: str
    policy_version: str


class ChatMessage(_Strict):
    """One turn of the conversation whose last message is judged."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Parts
    name: str | None = None
    tool_call_id: str | None = None
    refusal: None = None


class StreamOptions(_Strict):
    """Of a streamed verdict."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatRequest(_Strict):
    """A conversation to judge. What steers sampling is accepted and changes nothing: a verdict is computed,
    not drawn, and never cut short.
    """

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: int | None = None
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None


class StreamHead(_Strict):
    """First line of a stream: the conversation that the text answers, and the windows.

    role: who speaks the text. every, hold_back: characters, see `windows.Window`; the service's own where
    left out. text: the first piece, or all of it.
    """

    messages: list[ChatMessage] = Field(default_factory=list)
    role: Literal["assistant", "user"] = "assistant"
    model: str | None = None
    every: Annotated[int, Field(ge=1, le=100_000)] | None = None
    hold_back: Annotated[int, Field(ge=0, le=4096)] | None = None
    text: str | None = None


class StreamPiece(_Strict):
    """A later line: the next piece of the text."""

    text: str


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
