"""Conversations written as JSON: what `guard classify` and `guard evaluate` read."""

import json
from collections.abc import Iterator
from typing import Any

from core_llm.chat import Message
from core_llm.errors import UserError


def conversation(value: object) -> list[Message]:
    """Messages out of a string, {"text"}, {"context", "response"} or {"messages": [{"role", "content"}]}.

    Raises `KeyError` or `TypeError` for anything else.
    """
    if isinstance(value, str):
        return [Message("user", value)]
    if not isinstance(value, dict):
        raise TypeError("not an object")
    if "messages" in value:
        return [Message(_text(m["role"]), _text(m["content"])) for m in value["messages"]]
    if "response" in value:
        return [Message("user", _text(value["context"])), Message("assistant", _text(value["response"]))]
    return [Message("user", _text(value["text"]))]


def _text(item: object) -> str:
    if not isinstance(item, str):
        raise TypeError("not a string")
    return item


def read_jsonl(source: str) -> list[list[Message]]:
    """Conversations out of JSON lines; raises `UserError` that names the first bad line."""
    conversations = []
    for number, value in numbered_json(source):
        try:
            conversations.append(conversation(value))
        except (KeyError, TypeError):
            raise UserError(
                f"line {number} is not a string, an object with text, context and response, or messages"
            ) from None
    return conversations


def numbered_json(source: str) -> Iterator[tuple[int, Any]]:
    """Number and value of every line that is not empty; raises `UserError` that names the first bad one."""
    # Not splitlines: a line separator inside a JSON string ends no line.
    for number, line in enumerate(source.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                raise UserError(f"line {number} is not JSON") from None
