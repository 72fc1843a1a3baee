"""`guard`: train a guard, judge texts, serve the moderation API."""

from typing import TYPE_CHECKING, Literal

import tyro

from core_llm import cli_tools
from guard.cli_evaluate import evaluate
from guard.cli_train import prune, train

if TYPE_CHECKING:
    from core_llm.chat import Message
    from guard.guard import Verdict


def classify(
    texts: tyro.conf.Positional[tuple[str, ...]] = (),
    model: str = "nano",
    input: Literal["text", "jsonl"] = "text",
    format: Literal["table", "json"] = "table",
    batch_size: int = 32,
) -> None:
    """Judge messages; without TEXTS, what comes from standard input.

    Args:
        texts: Messages of a user, judged one by one.
        model: The guard: nano, or a folder with a checkpoint.
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
    from guard.guard import Guard

    if batch_size < 1:
        raise UserError("--batch-size must be at least 1")
    conversations = [[Message("user", text)] for text in texts]
    if not texts:
        source = sys.stdin.read()
        conversations = read_jsonl(source) if input == "jsonl" else [[Message("user", source)]]
    if not conversations:
        raise UserError("nothing to judge: give texts, or lines on standard input")
    for number, messages in enumerate(conversations, start=1):
        if not messages or not messages[-1].text.strip():
            raise UserError(f"message {number} is empty: give some text")
    verdicts = Guard.load(model).classify(conversations, batch_size)
    if format == "json":
        for verdict in verdicts:
            print(json.dumps({**asdict(verdict), "named": verdict.named}))
    else:
        _print_table(conversations, verdicts)


def _print_table(conversations: "list[list[Message]]", verdicts: "list[Verdict]") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from guard.taxonomy import CATEGORIES

    table = Table("verdict", "P(unsafe)", "categories", "message")
    for messages, verdict in zip(conversations, verdicts, strict=True):
        named = ", ".join(f"{code} {CATEGORIES.get(code, '')}".strip() for code in verdict.named)
        # Text, not str: square brackets in a message are no markup.
        shown = Text(" ".join(messages[-1].text.split())[:80])
        table.add_row("unsafe" if verdict.unsafe else "safe", f"{verdict.probability:.3f}", named, shown)
    Console().print(table)


def serve(
    model: str = "nano",
    host: str = "127.0.0.1",
    port: int = 8000,
    max_body_bytes: int = 262_144,
) -> None:
    """Serve POST /v1/moderations, /healthz and /readyz until interrupted.

    Args:
        model: The guard: nano, or a folder with a checkpoint.
        host: Address to listen on.
        port: Port to listen on.
        max_body_bytes: Longer request bodies are refused with status 413.
    """
    import logging

    import uvicorn

    from core_llm.errors import UserError
    from guard.guard import Guard
    from guard.service import Limits, create_app

    if not 0 <= port <= 65_535:
        raise UserError(f"--port must be between 0 and 65535, got {port}")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    # Loaded before listening: a bad checkpoint is one line and an exit status, not a service never ready.
    app = create_app(Guard.load(model), Limits(body_bytes=max_body_bytes))
    uvicorn.run(app, host=host, port=port, log_level="info")


def main() -> None:
    """Entry point of the console script."""
    cli_tools.run(
        "guard",
        "A safety guard on a Llama core: train it, judge texts, serve the moderation API.",
        {"train": train, "prune": prune, "classify": classify, "evaluate": evaluate, "serve": serve},
    )
