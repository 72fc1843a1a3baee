"""SHA-256 of what a model is shown and what it is: the same content has the same digest, wherever it lies."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from core_llm.chat import Audio, Image, Message, Part, Text, ToolCall, ToolResult
from core_llm.errors import MediaError


def part_digest(part: Part) -> str:
    """SHA-256 of a part's content: the text, the bytes of the file, or the raw samples or pixels."""
    if isinstance(part, Text):
        return hashlib.sha256(b"text" + part.text.encode()).hexdigest()
    if isinstance(part, (ToolCall, ToolResult)):
        return hashlib.sha256(repr(part).encode()).hexdigest()
    source: Any = part.data
    if isinstance(source, (str, Path)):
        return _file_digest(str(source))
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    return _array_digest(part)


@lru_cache(maxsize=200_000)
def _file_digest(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise MediaError(f"{path}: cannot be read ({error.strerror})") from error


@lru_cache(maxsize=200_000)
def _array_digest(part: Image | Audio) -> str:
    """Pixels or samples with their shape; parts hash by identity, so each is digested once."""
    import numpy as np

    values = np.asarray(part.data)
    header = f"{values.dtype} {values.shape} {getattr(part, 'rate', None)}".encode()
    return hashlib.sha256(header + np.ascontiguousarray(values).tobytes()).hexdigest()


def conversation_digest(messages: Sequence[Message]) -> str:
    """SHA-256 over roles and parts."""
    digest = hashlib.sha256()
    for message in messages:
        digest.update(f"\0{message.role}".encode())
        for part in message.parts:
            digest.update(f"{type(part).__name__}:{part_digest(part)}".encode())
    return digest.hexdigest()


def folder_digest(folder: Path) -> str:
    """SHA-256 over a checkpoint's files: weights, configuration, tokenizer."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in (".json", ".safetensors", ".model"):
            digest.update(path.relative_to(folder).as_posix().encode())
            with path.open("rb") as stream:
                for block in iter(lambda: stream.read(1 << 20), b""):
                    digest.update(block)
    return digest.hexdigest()


def code_digest(*packages: Path) -> str:
    """SHA-256 over the sources in these folders."""
    digest = hashlib.sha256()
    for root in packages:
        for path in sorted(path for path in root.rglob("*") if path.suffix in (".py", ".c", ".h")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
