"""Models behind a server that speaks OpenAI's protocol: `openai:URL` or `openai:URL#NAME`."""

import base64
import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core_llm.chat import Audio, Image, Message, Text
from core_llm.errors import UserError
from evals.models import Speaks

if TYPE_CHECKING:
    from openai import OpenAI

OPENAI = "openai:"
AT_ONCE = 8  # requests in flight
RETRIES = 6  # of a request, with growing pauses: the client's own
TIMEOUT = 600.0  # s
SEED = 0
_PICTURES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif"}


class OpenAIModel(Speaks):
    """A server under test, asked through the official client. OPENAI_API_KEY holds the key, if it wants one.

    The protocol has no log-likelihood of a given answer, so only tasks that let it answer can be run. What
    weights a server holds it does not say: records know it by address and name alone.
    """

    def __init__(self, where: str, quantization: str | None = None) -> None:
        if quantization:
            raise UserError("--quantize is for the core of the project's own models; leave it out")
        self.name = where
        self.quantization: str | None = None
        self.url, _, self._asked_name = where.removeprefix(OPENAI).partition("#")
        if not self.url.startswith(("http://", "https://")):
            raise UserError(
                f"{where}: give the server's address, such as openai:http://localhost:8000/v1#NAME"
            )
        self._limit = "max_tokens"

    @cached_property
    def client(self) -> "OpenAI":
        """The official client, with its retries."""
        try:
            from openai import OpenAI
        except ImportError:
            raise UserError(
                'openai: models want the client; run `pip install "llama-herd[openai]"`'
            ) from None
        key = os.environ.get("OPENAI_API_KEY") or "none"
        return OpenAI(base_url=self.url, api_key=key, max_retries=RETRIES, timeout=TIMEOUT)

    @cached_property
    def served(self) -> str:
        """The model's name at the server; the only one where the user named none."""
        if self._asked_name:
            return self._asked_name
        names = [model.id for model in self._say(lambda: self.client.models.list())]
        if len(names) != 1:
            raise UserError(
                f"{self.name}: name one of its models behind #: {', '.join(names[:20]) or 'none there'}"
            )
        return str(names[0])

    @property
    def part_hashes(self) -> Mapping[str, str]:
        """Empty: a server does not show its weights."""
        return {}

    def require(self, needs: Sequence[str], task: str) -> None:
        """Raise `UserError` where the task needs a guard, or the server, asked once, refuses a sense."""
        if "guard" in needs:
            raise UserError(
                f"model '{self.name}' is no guard, which task '{task}' needs; add one with --guard nano"
            )
        parts: list[Any] = [Text("Say yes.")]
        if "image" in needs:
            parts.append(Image(_dot()))
        if "audio" in needs:
            parts.append(Audio(_tone(), 16_000))
        try:
            self._answer([Message("user", tuple(parts))], 1)
        except UserError as error:
            raise UserError(f"{error} (asked for task '{task}')") from error

    def fingerprint(self, needs: Sequence[str]) -> str:
        """SHA-256 over address, name, settings and this code."""
        code = Path(__file__).read_bytes()
        settings = f"{self.url}\0{self.served}\0temperature 0\0seed {SEED}\0"
        return hashlib.sha256(settings.encode() + code).hexdigest()

    def generate(self, conversations: Sequence[Sequence[Message]], max_new_tokens: int) -> list[str]:
        """Answers at temperature 0, several requests at a time."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(lambda messages: self._answer(messages, max_new_tokens), conversations))

    def _answer(self, messages: Sequence[Message], max_new_tokens: int) -> str:
        asked: Any = [_message(message) for message in messages]

        def call() -> Any:
            settings: Any = {self._limit: max_new_tokens}
            return self.client.chat.completions.create(
                model=self.served, messages=asked, temperature=0.0, seed=SEED, **settings
            )

        done = self._say(call)
        choices = getattr(done, "choices", None)
        if not choices:
            raise UserError(
                f"{self.name}: the server's answer is none of OpenAI's protocol; check the address"
            )
        return (choices[0].message.content or "").strip()

    def _say(self, call: Any) -> Any:
        """One request; what goes wrong becomes one line that says what to do."""
        import openai

        try:
            return call()
        except openai.BadRequestError as error:
            if "max_completion_tokens" in str(error) and self._limit == "max_tokens":
                self._limit = "max_completion_tokens"  # what newer models of OpenAI's want instead
                return self._say(call)
            raise UserError(f"{self.name}: the server refuses the request ({_reason(error)})") from error
        except openai.APIConnectionError as error:
            raise UserError(f"{self.name}: no answer from {self.url}; is the server running?") from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise UserError(f"{self.name}: the server wants a valid key; set OPENAI_API_KEY") from error
        except openai.NotFoundError as error:
            raise UserError(
                f"{self.name}: the server knows no such path or model ({_reason(error)}); the address often "
                "ends in /v1, and #NAME names the model"
            ) from error
        except openai.APIStatusError as error:
            raise UserError(
                f"{self.name}: the server fails with status {error.status_code} after {RETRIES} retries "
                f"({_reason(error)}); the same command goes on where it stopped"
            ) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _message(message: Message) -> dict[str, Any]:
    parts = message.parts
    if all(isinstance(part, Text) for part in parts):
        return {"role": message.role, "content": message.text}
    return {"role": message.role, "content": [_part(part) for part in parts]}


def _part(part: Any) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    if isinstance(part, Image):
        kind, data = _picture(part)
        return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{_base64(data)}"}}
    if isinstance(part, Audio):
        return {"type": "input_audio", "input_audio": {"data": _base64(_wav(part)), "format": "wav"}}
    raise UserError(
        f"a {type(part).__name__} part has no place in a request to a server; leave out such tasks"
    )


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _picture(part: Image) -> tuple[str, bytes]:
    """Format and bytes: the file's own where servers know its format, else PNG."""
    source = Path(part.data).read_bytes() if isinstance(part.data, (str, Path)) else part.data
    if isinstance(source, bytes):
        for begin, kind in _PICTURES.items():
            if source.startswith(begin):
                return kind, source
    from vision_adapter.images import decode, to_rgb

    stream = io.BytesIO()
    to_rgb(decode(part.data)).save(stream, "PNG")
    return "png", stream.getvalue()


def _wav(part: Audio) -> bytes:
    """16 kHz mono, 16 bits."""
    import soundfile

    from speech_adapter.audio import SAMPLE_RATE, decode

    stream = io.BytesIO()
    soundfile.write(stream, decode(part.data, part.rate), SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return stream.getvalue()


def _dot() -> Any:
    import numpy as np

    return np.full((64, 64, 3), 127, np.uint8)


def _tone() -> Any:
    import numpy as np

    return (0.1 * np.sin(np.arange(16_000) * 0.1)).astype(np.float32)
