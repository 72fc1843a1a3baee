"""Does the moderation service keep every promise under load, and how long do answers take?

Starts the service with its engine in a process of its own and asks it from 1, 16, 64 and 256 clients at
once, each request with an id of its own and a text whose verdict is told apart from every other one. Every
request must get exactly its own verdict, or an explicit 429 or 503, and the service must have counted as
many as were sent. Then the same while the policy file changes, while the engine's process is killed, and
while the service is told to stop; and with a rate limit.

    python benchmarks/guard_load.py                    # the bundled nano guard
    python benchmarks/guard_load.py --engine word      # no model: the service alone
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx2

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import reporting  # noqa: E402

# A file beside this one has the name of the package `guard`: from here on it must not be found first.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != HERE]

CLIENTS = (1, 16, 64, 256)
TOLERANCE = 1e-4  # of P(unsafe): a batch rounds otherwise than a single text


@dataclass
class Tally:
    """What became of the requests of one run; seconds of those that got a verdict."""

    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    versions: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)

    def row(self, clients: int, disturbance: str, took: float) -> dict[str, Any]:
        """One line of the table; wrong and lost must be 0."""
        times = sorted(self.seconds)
        at = {
            p: times[min(len(times) - 1, len(times) * p // 100)] * 1000 if times else None
            for p in (50, 95, 99)
        }
        return {
            "clients": clients,
            "meanwhile": disturbance,
            "requests": sum(self.outcomes.values()),
            "verdicts": self.outcomes["verdict"],
            "refused": self.outcomes["refused"],
            "wrong": self.outcomes["wrong"],
            "lost": self.outcomes["lost"],
            **{f"p{p}_ms": "-" if ms is None else round(ms, 1) for p, ms in at.items()},
            "per_second": round(self.outcomes["verdict"] / took, 1),
        }


class Server:
    """The service in a process of its own."""

    def __init__(
        self, engine: str, folder: Path, queue: int = 512, delay: float = 0.0, rate: float | None = None
    ) -> None:
        from guard.policy import Policy

        self.policy = folder / "policy.yaml"
        self.version = 1
        self.told = False
        Policy(version="1").write(self.policy)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        asked: dict[str, Any] = {"engine": engine, "port": port, "policy": str(self.policy)}
        asked |= {"queue": queue, "delay": delay, "rate": rate}
        self._log = (folder / "service.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "guard_load.py"), "--serve", json.dumps(asked)],
            stdout=self._log,
            stderr=self._log,
        )

    def wait(self, seconds: float = 180) -> None:
        """Until it is ready."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.poll() is None:
            try:
                if httpx2.get(f"{self.address}/readyz", trust_env=False).status_code == 200:
                    return
            except httpx2.HTTPError:
                pass  # it does not listen yet
            time.sleep(0.1)
        raise RuntimeError(f"the service did not start:\n{Path(self._log.name).read_text()[-2000:]}")

    def change_policy(self) -> None:
        """Another version of the policy, as an operator would bring it."""
        from guard.policy import Policy

        self.version += 1
        Policy(version=str(self.version)).write(self.policy)
        self.process.send_signal(signal.SIGHUP)

    def answered(self) -> int:
        """Moderation requests that the service says it has answered."""
        from prometheus_client.parser import text_string_to_metric_families

        text = httpx2.get(f"{self.address}/metrics", trust_env=False).text
        return sum(
            int(sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == "guard_requests_total" and sample.labels["endpoint"] == "/v1/moderations"
        )

    def kill_engine(self) -> None:
        """End the engine's process without warning."""
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    os.kill(int(child), signal.SIGKILL)

    def tell(self) -> None:
        """Tell it to stop, once: a second signal would end it at once."""
        if not self.told and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.told = True

    def stop(self) -> int:
        """Its exit status after it was told to stop."""
        self.tell()
        try:
            return self.process.wait(60)
        finally:
            if self.process.poll() is None:
                self.process.kill()
            self._log.close()


def serve(engine: str, port: int, policy: str, queue: int, delay: float, rate: float | None) -> None:
    """The service under test."""
    from guard.cli_serve import load_engine
    from guard.policy import PolicyStore
    from guard.service import Settings, create_app
    from guard.service.process import ProcessEngine
    from guard.service.server import run
    from guard.testing import WordEngine

    made = ProcessEngine(partial(WordEngine, delay) if engine == "word" else partial(load_engine, engine, 32))
    settings = Settings(queue=queue, rate=rate, policies=PolicyStore(policy, made.check))
    run(create_app(made, settings), "127.0.0.1", port, notice=1.0, drain=60.0)


def texts_for(engine: str, candidates: int = 512) -> dict[str, float]:
    """Texts with the P(unsafe) that each must get, whoever asks and whatever else is judged then.

    Two of them differ by more than the error that is allowed, so that a verdict in the wrong place is seen.
    """
    from core_llm.chat import Message
    from core_llm.data.phrases import sample_texts
    from guard.guard import Guard

    texts = list(dict.fromkeys(sample_texts(seed=1, n=candidates)))
    verdicts = Guard.load(engine).classify([[Message("user", text)] for text in texts], batch_size=1)
    known: dict[str, float] = {}
    last = -1.0
    for probability, text in sorted((v.probability, t) for t, v in zip(texts, verdicts, strict=True)):
        if probability - last > 3 * TOLERANCE and abs(probability - 0.5) > TOLERANCE:
            known[text] = last = probability
    if len(known) < 16:
        raise SystemExit(f"{engine}: only {len(known)} texts with verdicts of their own")
    return known


def expectation(engine: str) -> Callable[[str, int], tuple[str, float]]:
    """Request id and number → text, P(unsafe)."""
    if engine == "word":
        from guard.testing import word_probability

        def of_words(request: str, number: int) -> tuple[str, float]:
            text = f"{request} {'bomb' if number % 3 == 0 else 'bread'}"
            return text, word_probability(text)

        return of_words
    known = list(texts_for(engine).items())
    return lambda request, number: known[number % len(known)]


async def one(
    client: httpx2.AsyncClient, address: str, request: str, text: str, expected: float, tally: Tally
) -> bool:
    """One request, judged strictly; false where the service says that it is stopping."""
    began = time.monotonic()
    try:
        answer = await client.post(
            f"{address}/v1/moderations", json={"input": text}, headers={"x-request-id": request}
        )
    except httpx2.HTTPError as error:
        tally.outcomes["lost"] += 1
        tally.wrong.append(f"{request}: {type(error).__name__}")
        return True
    if answer.headers.get("x-request-id") != request:
        tally.outcomes["wrong"] += 1
        tally.wrong.append(f"{request}: answered as {answer.headers.get('x-request-id')}")
        return True
    body = answer.json()
    if answer.status_code in (429, 503) and "retry-after" in answer.headers:
        tally.outcomes["refused"] += 1
        return bool(body["error"]["code"] != "stopping")
    results = body.get("results", [])
    found = sum(v for k, v in results[0]["category_scores"].items() if k[1:].isdigit()) if results else -1.0
    right = answer.status_code == 200 and body["request_id"] == request and len(results) == 1
    if right and abs(found - expected) < TOLERANCE and results[0]["flagged"] == (expected >= 0.5):
        tally.outcomes["verdict"] += 1
        tally.seconds.append(time.monotonic() - began)
        tally.versions.add(body["policy_version"])
    else:
        tally.outcomes["wrong"] += 1
        tally.wrong.append(f"{request}: status {answer.status_code}, {found} instead of {expected}")
    return True


async def load(
    server: Server,
    clients: int,
    each: int,
    expect: Callable[[str, int], tuple[str, float]],
    meanwhile: Callable[[], Awaitable[None]] | None = None,
) -> tuple[Tally, float]:
    """`clients` at once, each with `each` requests one after the other."""
    tally = Tally()
    limits = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients)

    async def ask(number: int, client: httpx2.AsyncClient) -> None:
        for i in range(each):
            request = f"c{number}-r{i}-{time.monotonic_ns()}"
            text, expected = expect(request, number * each + i)
            if not await one(client, server.address, request, text, expected, tally):
                return

    began = time.monotonic()
    async with httpx2.AsyncClient(limits=limits, timeout=120, trust_env=False) as client:
        await asyncio.gather(
            *(ask(number, client) for number in range(clients)), *([meanwhile()] if meanwhile else [])
        )
    return tally, time.monotonic() - began


def disturbed(server: Server, what: str, after: float) -> Callable[[], Awaitable[None]]:
    """Something that happens `after` seconds into a run."""

    async def happen() -> None:
        await asyncio.sleep(after)
        for _ in range(5 if what == "policy" else 1):
            if what == "policy":
                server.change_policy()
                await asyncio.sleep(after)
            elif what == "kill":
                server.kill_engine()
            else:
                server.tell()

    return happen


def main() -> None:
    """Measure, print, save; the exit status is 1 where a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engine", default="nano", help="nano, a guard's folder, or word (no model)")
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS))
    parser.add_argument("--requests", type=int, default=4096, help="per number of clients")
    parser.add_argument("--save", type=Path, help="CSV file for the results; a table beside it as .md")
    parser.add_argument("--note", default="", help="written into the results, such as what ran beside")
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(**options.serve)
        return
    expect = expectation(options.engine)
    with tempfile.TemporaryDirectory() as folder:
        table, broken = measure(options, expect, Path(folder))
    reporting.show(table)
    if options.save is not None:
        source = reporting.provenance(("torch", "fastapi", "uvicorn"))
        reporting.save(options.save, table, source)
        source |= {"guard": options.engine, "note": options.note}
        source["command"] = f"python benchmarks/guard_load.py --requests {options.requests}"
        title = "The moderation service under load"
        reporting.save_markdown(options.save.with_suffix(".md"), title, [table], source)
    if broken:
        raise SystemExit(f"broken promises: {broken[:5]}")


def measure(
    options: argparse.Namespace, expect: Callable[[str, int], tuple[str, float]], folder: Path
) -> tuple[list[dict[str, Any]], list[str]]:
    """The table, and what was wrong: nothing may be."""
    table, broken = [], []

    def run(server: Server, clients: int, what: str) -> None:
        # What happens meanwhile must find requests before and after it.
        each = max(1 if what == "nothing" else 4, options.requests // clients)
        meanwhile = disturbed(server, what, 0.5) if what in ("policy", "kill", "stop") else None
        before = server.answered()
        tally, took = asyncio.run(load(server, clients, each, expect, meanwhile))
        table.append(tally.row(clients, what, took))
        broken.extend(tally.wrong)
        sent = sum(tally.outcomes.values())
        if what != "stop" and not sent == clients * each == server.answered() - before:
            broken.append(f"{clients} clients, {what}: {sent} sent, {server.answered() - before} answered")
        print(table[-1], flush=True)

    server = Server(options.engine, folder)
    server.wait()
    for clients in options.clients:
        run(server, clients, "nothing")
    for what in ("policy", "kill", "stop"):
        run(server, max(options.clients), what)
        if what == "kill":
            server.wait()
    broken += [f"exit status {server.process.returncode}"] if server.stop() else []
    limited = Server(options.engine, folder, rate=60.0)
    limited.wait()
    run(limited, max(options.clients), "a rate limit")
    broken += [f"exit status {limited.process.returncode}"] if limited.stop() else []
    return table, broken


if __name__ == "__main__":
    main()
