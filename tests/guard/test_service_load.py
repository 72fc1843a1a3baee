"""The service under load, in short: what `benchmarks/guard_load.py` measures, with a few hundred requests."""

import asyncio
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("guard_load", ROOT / "benchmarks" / "guard_load.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["guard_load"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def server(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    found = bench.Server("word", tmp_path_factory.mktemp("load"), queue=24, delay=0.02)
    try:
        found.wait()
        yield found
    finally:
        found.process.kill()
        found.process.wait()


def test_every_request_gets_its_own_verdict_or_a_refusal(bench: Any, server: Any) -> None:
    for clients in (1, 16, 64):
        tally, _ = asyncio.run(bench.load(server, clients, max(4, 128 // clients), bench.expectation("word")))
        assert not tally.wrong
        assert tally.outcomes["verdict"] > 0
        assert tally.outcomes["refused"] == 0 or clients > 24


def test_a_policy_that_changes_meanwhile_mixes_nothing(bench: Any, server: Any) -> None:
    meanwhile = bench.disturbed(server, "policy", 0.05)
    tally, _ = asyncio.run(bench.load(server, 8, 25, bench.expectation("word"), meanwhile))
    assert not tally.wrong and len(tally.versions) > 1


def test_a_killed_engine_gives_503_and_never_a_verdict_that_was_not_made(bench: Any, server: Any) -> None:
    meanwhile = bench.disturbed(server, "kill", 0.1)
    tally, _ = asyncio.run(bench.load(server, 16, 12, bench.expectation("word"), meanwhile))
    assert not tally.wrong and tally.outcomes["refused"] > 0
    server.wait()
    again, _ = asyncio.run(bench.load(server, 4, 5, bench.expectation("word")))
    assert again.outcomes["verdict"] == 20


def test_sigterm_finishes_what_was_let_in_and_refuses_the_rest(bench: Any, server: Any) -> None:
    meanwhile = bench.disturbed(server, "stop", 0.2)
    tally, _ = asyncio.run(bench.load(server, 16, 1000, bench.expectation("word"), meanwhile))
    assert not tally.wrong and tally.outcomes["verdict"] > 0 and 0 < tally.outcomes["refused"] <= 16
    assert server.process.wait(30) == 0
