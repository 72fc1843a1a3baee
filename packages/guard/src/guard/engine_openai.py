"""An engine whose model runs elsewhere: a vLLM server, or another that speaks the completions API of OpenAI.

The prompts are the same token ids as in this process, so the server's own chat template plays no part. Per
prompt two completions of one token are asked for: one at the verdict position, one behind the forced
`unsafe\\nS`; the second repeats the first's prompt, which a server with prefix caching reads from its cache.
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from core_llm.chat import Message
from core_llm.errors import UserError
from guard.engine import EngineError
from guard.policy import Policy
from guard.prompt import Row
from guard.prompter import Prompter
from guard.verdict import Reading, Verdict, worse

# What vLLM gives at most unless it is started with another --max-logprobs.
TOP = 20
# Answers that say: not now.
_BUSY = (429, 502, 503, 504)


class OpenAICompatibleEngine:
    """Sends prompts to `url`/completions and reads verdicts from the log-probabilities that come back.

    url: of the API, such as http://localhost:8000/v1. prompter: how the guard that runs there is asked, see
    `connect`. model: its name there, by default the first that the server lists. timeout: seconds per
    request. retries: how often a busy or silent server is asked again. Safe to use from several threads.
    """

    def __init__(
        self, url: str, prompter: Prompter, model: str | None = None, *, api_key: str | None = None,
        timeout: float = 30.0, retries: int = 2, batch_size: int = 32, top: int = TOP,
    ) -> None:  # fmt: skip
        import httpx2

        if not url.startswith(("http://", "https://")):
            raise UserError(f"the engine's address must begin with http:// or https://, got '{url}'")
        if batch_size < 1 or timeout <= 0 or retries < 0 or top < 2:
            raise UserError("a batch holds at least one message, and a request must have time")
        self.prompter, self.batch_size, self.retries, self.top = prompter, batch_size, retries, top
        self.url = url.rstrip("/")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            self._client: httpx2.Client = httpx2.Client(timeout=timeout, headers=headers)
        except (ValueError, httpx2.InvalidURL) as error:
            raise UserError(f"the engine's address or key cannot be used ({type(error).__name__})") from error
        self._closed = False
        self.name = model or self._first_model()
        tokens = prompter.reading().tokens
        self._names = {prompter.tokenizer.decode([i]): i for i in (tokens.safe, tokens.unsafe)}

    @classmethod
    def connect(cls, url: str, folder: str | Path, model: str | None = None, **more: Any) -> (
        "OpenAICompatibleEngine"
    ):  # fmt: skip
        """The engine for the guard in `folder`, of which everything but the weights is read."""
        from guard.guard import find_guard

        return cls(url, Prompter.of_folder(find_guard(folder)), model, **more)

    @property
    def policy(self) -> Policy:
        """What the guard judges by of itself."""
        return self.prompter.policy

    def check(self, policy: Policy) -> None:
        """Raise `UserError` where the guard cannot judge by `policy`."""
        self.prompter.reading(policy)

    def judge(
        self, conversations: Sequence[Sequence[Message]], policy: Policy | None = None
    ) -> list[Verdict]:
        """One verdict per conversation, in order; see `engine.Engine.judge`."""
        if self._closed:
            raise EngineError("the engine is closed")
        reading = self.prompter.reading(policy)
        rows: list[Row] = []
        owners: list[int] = []
        for owner, messages in enumerate(conversations):
            windows = self.prompter.rows(messages, reading)
            rows += windows
            owners += [owner] * len(windows)
        if any(row.parts for row in rows):
            raise UserError("this engine judges text only: leave images and audio out")
        verdicts: list[Verdict | None] = [None] * len(conversations)
        for start in range(0, len(rows), self.batch_size):
            part = slice(start, start + self.batch_size)
            for owner, verdict in zip(owners[part], self._judge_rows(rows[part], reading), strict=True):
                verdicts[owner] = worse(verdicts[owner], verdict)
        return [verdict for verdict in verdicts if verdict is not None]

    def close(self) -> None:
        """Close its connections."""
        self._closed = True
        self._client.close()

    def _judge_rows(self, rows: Sequence[Row], reading: Reading) -> list[Verdict]:
        forced = list(reading.tokens.forced)
        prompts = [ids for row in rows for ids in (row.ids, row.ids + forced)]
        body = {
            "model": self.name,
            "prompt": prompts,
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": self.top,
            "return_tokens_as_token_ids": True,
        }
        found = _choices(self._ask("POST", "/completions", body), len(prompts))
        names = self._names | {
            self.prompter.tokenizer.decode([token]): token for token in reading.tokens.codes.values()
        }
        tops = [_top_tokens(choice, names) for choice in found]
        words = (reading.tokens.safe, reading.tokens.unsafe)
        pairs = [_pair(top, *words) for top in tops[::2]]
        codes = [_shares(top, list(reading.tokens.codes.values())) for top in tops[1::2]]
        return reading.verdicts(torch.tensor(pairs), torch.tensor(codes))

    def _first_model(self) -> str:
        listed = self._ask("GET", "/models")
        try:
            return str(listed["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise EngineError(f"{self.url}: the server lists no model; name one") from None

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON of an answer; raises `EngineError` that names the server and never quotes a text."""
        import httpx2

        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(0.2 * 2 ** (attempt - 1))
            try:
                answer = self._client.request(method, self.url + path, json=body)
            except (httpx2.HTTPError, httpx2.InvalidURL, OSError, RuntimeError) as error:
                problem = f"cannot be reached ({type(error).__name__})"
                continue
            if answer.status_code == 200:
                try:
                    return answer.json()
                except ValueError:
                    raise EngineError(f"{self.url}: the answer is not JSON") from None
            problem = f"answered with status {answer.status_code}"
            if answer.status_code not in _BUSY:
                break
        raise EngineError(f"{self.url}: the server {problem}")


def _choices(answer: Any, count: int) -> list[Mapping[str, Any]]:
    """One choice per prompt, in the order of the prompts."""
    try:
        by_index = {int(choice["index"]): choice for choice in answer["choices"]}
        if len(answer["choices"]) != count or set(by_index) != set(range(count)):
            raise EngineError(f"the server gave {len(answer['choices'])} answers to {count} prompts")
    except (KeyError, TypeError, ValueError, AttributeError):
        raise EngineError("the server's answer holds no choices") from None
    return [by_index[index] for index in range(count)]


def _top_tokens(choice: Mapping[str, Any], names: Mapping[str, int]) -> dict[int, float]:
    """Log-probabilities by token id at the one position of a choice.

    A server that knows `return_tokens_as_token_ids` names tokens `token_id:N`, others by their text.
    """
    try:
        position = choice["logprobs"]["top_logprobs"][0]
        items = list(position.items())
    except (KeyError, IndexError, TypeError, AttributeError):
        raise EngineError("the server gave no log-probabilities; allow at least 20 of them") from None
    found: dict[int, float] = {}
    for name, value in items:
        number = name.removeprefix("token_id:")
        token = int(number) if number != name and number.isdecimal() else names.get(name)
        usable = isinstance(value, int | float) and not isinstance(value, bool)
        # What is no number poisons its verdict, which is then read as unsafe.
        found[-1 - len(found) if token is None else token] = float(value) if usable else math.nan
    return found


def _pair(top: Mapping[int, float], safe: int, unsafe: int) -> list[float]:
    """Log-probabilities of both words. One that is not among the top: `safe` has no mass; `unsafe` has as
    much as the last of the top, which is the most that it can have.
    """
    if any(math.isnan(value) or value > 1e-3 for value in top.values()):
        return [math.nan, math.nan]
    nothing = -math.inf
    if safe not in top:
        return [nothing, top.get(unsafe, nothing)]
    return [top[safe], top.get(unsafe, min(top.values()))]


def _shares(top: Mapping[int, float], codes: Sequence[int]) -> list[float]:
    """Log-probabilities of the codes; all alike where none is among the top."""
    if not any(code in top for code in codes):
        return [0.0] * len(codes)
    return [top.get(code, -math.inf) for code in codes]
