"""Messages of ours as Inspect writes them; pictures and sounds as data URIs among a sample's attachments."""

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core_llm.chat import Audio, Image, Message, Part, Text, ToolCall, ToolResult

# What Inspect's content types are called; a sound is wav or mp3 there.
ATTACHMENT = "attachment://"
LEFT_OUT = "(left out: {})"
_ROLES = {"ipython": "tool"}
# The first bytes of files that browsers show as they are.
_PICTURES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif"}


def messages(asked: Sequence[Message], key: str, attachments: dict[str, str] | None) -> list[dict[str, Any]]:
    """A conversation as Inspect's chat messages.

    key: begins the messages' ids. attachments: takes the media, data URIs by digest; None leaves them out and
    says so in their place.
    """
    return [
        {
            "id": f"{key}-{n}",
            "role": _ROLES.get(message.role, message.role),
            "content": _content(message.parts, attachments),
            "source": "input",
        }
        for n, message in enumerate(asked)
    ]


def _content(parts: Sequence[Part], attachments: dict[str, str] | None) -> str | list[dict[str, Any]]:
    if len(parts) == 1 and isinstance(parts[0], Text):
        return parts[0].text
    return [_part(part, attachments) for part in parts]


def _part(part: Part, attachments: dict[str, str] | None) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    if isinstance(part, ToolCall):
        return {"type": "text", "text": f"{part.name}({json.dumps(part.arguments, default=str)})"}
    if isinstance(part, ToolResult):
        return {"type": "text", "text": json.dumps(part.value, default=str)}
    if attachments is None or not isinstance(part, (Image, Audio)):
        return {"type": "text", "text": LEFT_OUT.format(type(part).__name__.lower())}
    if isinstance(part, Image):
        return {"type": "image", "image": _attach(_picture(part), attachments), "detail": "auto"}
    uri, form = _sound(part)
    return {"type": "audio", "audio": _attach(uri, attachments), "format": form}


def _attach(uri: str, attachments: dict[str, str]) -> str:
    key = hashlib.sha256(uri.encode()).hexdigest()[:32]
    attachments[key] = uri
    return ATTACHMENT + key


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _picture(part: Image) -> str:
    """A file that browsers show stays as it is; other pictures become PNG, pixel for pixel."""
    import PIL.Image

    data: Any = part.data
    if isinstance(data, (str, Path)):
        data = Path(data).read_bytes()
    if isinstance(data, bytes):
        for start, kind in _PICTURES.items():
            if data.startswith(start):
                return _uri(kind, data)
        data = PIL.Image.open(io.BytesIO(data))
    elif not isinstance(data, PIL.Image.Image):
        data = PIL.Image.fromarray(np.asarray(data))
    picture = data if data.mode in ("1", "L", "P", "RGB", "RGBA") else data.convert("RGB")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return _uri("image/png", buffer.getvalue())


def _sound(part: Audio) -> tuple[str, str]:
    """WAV and MP3 files stay as they are; other sounds become 16-bit WAV at their own rate."""
    import soundfile

    data: Any = part.data
    if isinstance(data, (str, Path)):
        data = Path(data).read_bytes()
    rate = part.rate
    if isinstance(data, bytes):
        if data[:4] == b"RIFF":
            return _uri("audio/wav", data), "wav"
        if data[:3] == b"ID3" or (data[:1] == b"\xff" and data[1:2] >= b"\xe0"):
            return _uri("audio/mpeg", data), "mp3"
        data, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    buffer = io.BytesIO()
    soundfile.write(buffer, data, rate or 16_000, format="WAV", subtype="PCM_16")
    return _uri("audio/wav", buffer.getvalue()), "wav"
