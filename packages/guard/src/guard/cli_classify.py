"""`guard classify`: judge messages, here or by a server."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from core_llm.cli_tools import Positional

if TYPE_CHECKING:
    from core_llm.chat import Message
    from guard.engine import Engine
    from guard.policy import Policy
    from guard.verdict import Verdict

KEY_VARIABLE = "GUARD_ENGINE_KEY"


def classify(
    texts: Positional[tuple[str, ...]] = (),
    model: str = "nano",
    policy: Path | None = None,
    engine: str = "local",
    engine_model: str | None = None,
    input: Literal["text", "jsonl"] = "text",
    format: Literal["table", "json"] = "table",
    batch_size: int = 32,
) -> None:
    """Judge messages; without TEXTS, what comes from standard input.

    Args:
        texts: Messages of a user, judged one by one.
        model: The guard: nano, a folder with a checkpoint, or a hub id; a released Llama Guard too.
        policy: YAML file with categories and thresholds to judge by (see `guard policy show`).
        engine: local, or the address of a vLLM server that runs the guard, such as http://localhost:8000/v1;
            --model then only says how it is asked. Its key is read from the variable GUARD_ENGINE_KEY.
        engine_model: Name of the guard on that server, by default the first that it lists.
        input: Standard input is one message (text), or one JSON value per line (jsonl): a string,
            {"text": ...}, {"context": ..., "response": ...} or {"messages": [{"role", "content"}, ...]}.
        format: A table for people, or one JSON object per message.
        batch_size: Messages per forward pass.
    """
    import json
    import sys
    from dataclasses import asdict

    from core_llm.chat import Message
    from core_llm.errors import UserError
    from guard.conversations import read_jsonl
    from guard.engine import EngineError
    from guard.policy import Policy

    if batch_size < 1:
        raise UserError("--batch-size must be at least 1")
    read = Policy.read(policy) if policy is not None else None
    conversations = [[Message("user", text)] for text in texts]
    if not texts:
        source = sys.stdin.read()
        conversations = read_jsonl(source) if input == "jsonl" else [[Message("user", source)]]
    if not conversations:
        raise UserError("nothing to judge: give texts, or lines on standard input")
    for number, messages in enumerate(conversations, start=1):
        if not messages or not messages[-1].text.strip():
            raise UserError(f"message {number} is empty: give some text")
    try:
        judge = _engine(engine, model, engine_model, batch_size)
        verdicts = judge.judge(conversations, read)
    except EngineError as error:
        raise UserError(str(error)) from error
    if format == "json":
        for verdict in verdicts:
            print(json.dumps({**asdict(verdict), "named": verdict.named}))
    else:
        _print_table(conversations, verdicts, read or judge.policy)


def _engine(engine: str, model: str, engine_model: str | None, batch_size: int) -> "Engine":
    if engine != "local" or engine_model is not None:
        return remote_engine(engine, model, engine_model, batch_size)
    from guard.engine import LocalEngine
    from guard.guard import Guard

    return LocalEngine(Guard.load(model), batch_size)


def remote_engine(address: str, model: str, engine_model: str | None, batch_size: int) -> "Engine":
    """The engine at an address; `model` says how it is asked. Raises `UserError` for what is no address."""
    from core_llm.errors import UserError
    from guard.engine_openai import OpenAICompatibleEngine

    if address == "local":
        raise UserError("--engine-model names a guard on a server: give its address with --engine")
    key = os.environ.get(KEY_VARIABLE)
    return OpenAICompatibleEngine.connect(address, model, engine_model, api_key=key, batch_size=batch_size)


def _print_table(conversations: "list[list[Message]]", verdicts: "list[Verdict]", policy: "Policy") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    names = {code: category.name for code, category in policy.categories.items()}
    table = Table("verdict", "P(unsafe)", "categories", "message")
    for messages, verdict in zip(conversations, verdicts, strict=True):
        named = ", ".join(f"{code} {names.get(code, '')}".strip() for code in verdict.named)
        # Text, not str: square brackets in a message are no markup.
        shown = Text(" ".join(messages[-1].text.split())[:80])
        verdict_word = "unsafe" if verdict.unsafe else "safe"
        table.add_row(verdict_word, f"{verdict.probability:.3f}", Text(named), shown)
    Console().print(table)
