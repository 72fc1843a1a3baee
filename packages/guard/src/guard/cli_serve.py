"""`guard serve` and `guard key`: the moderation service and its API keys."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from core_llm.cli_tools import Positional

if TYPE_CHECKING:
    from collections.abc import Callable

    from guard.engine import Engine
    from guard.service.auth import KeyRing
    from guard.service.settings import Settings

KEYS_VARIABLE = "GUARD_API_KEYS"
AUDIT_VARIABLE = "GUARD_AUDIT_SECRET"


@dataclass(frozen=True)
class ServeOptions:
    """How `guard serve` runs.

    Args:
        model: The guard: nano, or a folder with a checkpoint.
        host: Address to listen on; 0.0.0.0 lets other machines in (give them --api-keys).
        port: Port to listen on.
        policy: YAML file with categories and thresholds; a change takes effect within a second or at
            SIGHUP, an invalid one is refused whole.
        api_keys: File with lines of `guard key NAME`; or give keys in the variable GUARD_API_KEYS. Without
            either everybody may ask.
        rate: Judged inputs per minute and key (per client address, where there are no keys).
        burst: Inputs that may come at once, by default a minute's worth.
        audit: SQLite file for every verdict with a hash of its input; GUARD_AUDIT_SECRET makes the hash
            an HMAC.
        audit_text: Store the texts too, in plain.
        audit_required: Answer 503 where a verdict cannot be recorded; False counts the failure in the
            metrics and answers.
        image_urls: Fetch images from public addresses; data: URLs are always read where the guard has eyes.
        max_body_bytes: Longer request bodies are refused with status 413.
        max_tokens: Requests with more tokens of text are refused with status 413.
        max_image_bytes: Longer images are refused with status 413.
        batch: Conversations judged together.
        queue: Conversations that may wait; more are refused with status 503.
        timeout: Seconds that a request may wait for its verdict; then status 503.
        notice: Seconds after SIGTERM for which new requests are answered 503 before the port is closed.
        drain: Seconds after SIGTERM for which requests that were let in are still answered.
        in_process: Run the model in the service's own process; otherwise in one of its own, which is started
            again if it dies.
        engine: local, or the address of a vLLM server that runs the guard, such as http://localhost:8000/v1;
            --model then only says how it is asked. Its key is read from the variable GUARD_ENGINE_KEY.
        engine_model: Name of the guard on that server, by default the first that it lists.
        readers: MODULE:FUNCTION that gives readers of images (see docs/guard.md); without one, images are
            refused unless the guard's own weights read them.
        otlp: OpenTelemetry collector for traces, such as http://localhost:4318/v1/traces (guard[otel]).
    """

    model: str = "nano"
    host: str = "127.0.0.1"
    port: int = 8000
    policy: Path | None = None
    api_keys: Path | None = None
    rate: float | None = None
    burst: int | None = None
    audit: Path | None = None
    audit_text: bool = False
    audit_required: bool = True
    image_urls: bool = False
    max_body_bytes: int = 262_144
    max_tokens: int | None = None
    max_image_bytes: int = 4_194_304
    batch: int = 32
    queue: int = 512
    timeout: float = 30.0
    notice: float = 0.0
    drain: float = 30.0
    in_process: bool = False
    engine: str = "local"
    engine_model: str | None = None
    readers: str | None = None
    otlp: str | None = None


def serve(options: ServeOptions = ServeOptions()) -> None:  # noqa: B008 (frozen)
    """Serve /v1/moderations, /v1/moderations/stream and /v1/chat/completions until SIGTERM."""
    import logging

    from core_llm.errors import UserError
    from guard.service import create_app
    from guard.service.server import run
    from guard.service.telemetry import Tracing, to_collector

    if not 0 <= options.port <= 65_535:
        raise UserError(f"--port must be between 0 and 65535, got {options.port}")
    if options.notice < 0 or options.drain < options.notice:
        raise UserError("--notice must not be negative, and --drain at least --notice")
    settings = _settings(options)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it would write the addresses of images
    count = _counter(options.model, options.max_tokens)
    tracing = to_collector(options.otlp) if options.otlp is not None else Tracing()
    # Loaded before listening: a bad checkpoint is one line and an exit status, not a service never ready.
    engine = _engine(options)
    try:
        settings = _with_files(options, settings, engine)
        app = create_app(engine, settings, tracing=tracing, count=count)
        run(app, options.host, options.port, options.notice, options.drain)
    finally:
        engine.close()


def _settings(options: ServeOptions) -> "Settings":
    """What needs no engine and touches no file but that of the keys."""
    from guard.service.settings import Limits, Settings

    limits = Limits(
        body_bytes=options.max_body_bytes, tokens=options.max_tokens, image_bytes=options.max_image_bytes
    )
    return Settings(
        limits,
        _keys(options.api_keys),
        options.rate,
        options.burst,
        options.batch,
        queue=options.queue,
        timeout=options.timeout,
        audit_required=options.audit_required,
        image_urls=options.image_urls,
    )


def _with_files(options: ServeOptions, settings: "Settings", engine: "Engine") -> "Settings":
    """The same with the policy's file and the audit log."""
    from guard.policy import PolicyStore
    from guard.service.audit import AuditLog

    if options.policy is not None:
        settings = replace(settings, policies=PolicyStore(options.policy, engine.check))
    if options.audit is not None:
        log = AuditLog(options.audit, options.audit_text, os.environ.get(AUDIT_VARIABLE))
        settings = replace(settings, audit=log)
    return settings


def key(name: Positional[str]) -> None:
    """Make an API key: the key for its owner, once, and the line for the file of `--api-keys`.

    Args:
        name: Who the key is for, as the audit log will say.
    """
    from guard.service.auth import new_key

    made, line = new_key(name)
    print(f"key:  {made}\nline: {line}")


def _keys(path: Path | None) -> "KeyRing | None":
    from core_llm.errors import UserError
    from guard.service.auth import KeyRing

    given = os.environ.get(KEYS_VARIABLE)
    if path is not None and given:
        raise UserError(f"keys are given by --api-keys and by {KEYS_VARIABLE}: leave one out")
    if path is not None:
        return KeyRing.read(path)
    return KeyRing.of(given) if given is not None else None


def _engine(options: ServeOptions) -> "Engine":
    from functools import partial

    from core_llm.errors import UserError
    from guard.cli_classify import remote_engine
    from guard.engine import EngineError
    from guard.service.process import ProcessEngine

    load = partial(load_engine, options.model, options.batch, options.readers)
    try:
        if options.engine != "local" or options.engine_model is not None:
            there = remote_engine(options.engine, options.model, options.engine_model, options.batch)
            return with_readers(there, options.readers)
        if options.in_process:
            return load()
        return ProcessEngine(load)
    except EngineError as error:
        raise UserError(str(error)) from error


def load_engine(model: str, batch: int, readers: str | None = None) -> "Engine":
    """The engine of a guard by name or folder; runs in the engine's process."""
    from guard.engine import LocalEngine
    from guard.guard import Guard

    return with_readers(LocalEngine(Guard.load(model), batch), readers)


def with_readers(engine: "Engine", where: str | None) -> "Engine":
    """The engine behind the readers that a function gives, "module:function"; None leaves it as it is.

    A module beside the place where the service is started is found too. Raises `UserError` for one that is
    not there or gives no readers.
    """
    if where is None:
        return engine
    import importlib
    import sys

    from core_llm.errors import UserError
    from guard.multimodal import ReadingEngine

    module, _, function = where.partition(":")
    if not module or not function:
        raise UserError(f"--readers must be MODULE:FUNCTION, got '{where}'")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: what is installed comes first
    try:
        found = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"--readers {where}: {error}") from error
    if not isinstance(found, dict) or not all(hasattr(reader, "read") for reader in found.values()):
        raise UserError(f"--readers {where}: gives no mapping from kinds of parts to readers")
    return ReadingEngine(engine, found)


def _counter(model: str, limit: int | None) -> "Callable[[str], int] | None":
    """Tokens of a text, where the checkpoint has its tokenizer beside it."""
    from core_llm.errors import CheckpointError, UserError
    from core_llm.hub import find_model
    from core_llm.tokenizer import Tokenizer
    from guard.guard import NANO

    try:
        tokenizer = Tokenizer.load(find_model(model, NANO))
    except CheckpointError:
        if limit is not None:
            raise UserError(f"--max-tokens: {model} has no tokenizer of its own to count with") from None
        return None
    return lambda text: len(tokenizer.encode(text))
