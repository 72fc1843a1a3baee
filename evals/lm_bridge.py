"""lm_eval's view of a model under test: the same requests, tokens and scores as its own models have.

Wants the optional dependency `lm-eval`. It does as lm_eval 0.4.13: a context and its continuation are encoded
together and cut where the context alone ends; what does not fit is cut off on the left; texts longer than the
context are scored in disjoint windows.
"""

import json
from collections.abc import Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from core_llm.chat import Message
from core_llm.errors import UserError
from evals.models import Model, Subject, TokenModel

BATCH = 32
_DEFAULT_NEW_TOKENS = 256  # where a task names no number: lm_eval's own default

# A request of `_loglikelihood_tokens`: (context, continuation) as text, and both as ids.
_Encoded = tuple[Any, Sequence[int], Sequence[int]]


class BridgeLM(TemplateLM):
    """A model under test as `lm_eval.api.model.LM`, to be given to `lm_eval.simple_evaluate(model=...)`.

    A model that runs here is asked by token ids. One behind a server generates from chat messages, and what
    needs log-likelihoods is refused. Decoding is greedy; a task that samples is refused.
    """

    backend = "causal"

    def __init__(self, model: Model, batch_size: int = BATCH) -> None:
        super().__init__()
        self.model = model
        self.batch_size = batch_size
        self._raw = model if isinstance(model, TokenModel) else None

    @property
    def raw(self) -> TokenModel:
        """The model by token ids. Raises `UserError` where it has none."""
        if self._raw is None:
            raise UserError(
                f"model '{self.model.name}' gives no log-likelihoods; take a task that generates, "
                "such as gsm8k, or a model that runs here"
            )
        return self._raw

    @property
    def _longest(self) -> int:
        """Tokens of a context with its continuation, whose last token is predicted and never read.

        lm_eval counts that one on top of the positions; the project's own core refuses a longer text.
        """
        return self.raw.context + (0 if isinstance(self.model, Subject) else 1)

    @property
    def eot_token_id(self) -> int:
        return self.raw.end

    @property
    def prefix_token_id(self) -> int:
        return self.raw.end if self.raw.begin is None else self.raw.begin

    @property
    def tokenizer_name(self) -> str:
        return self.model.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        ids = list(self.raw.encode(string))
        begin = self.raw.begin
        if begin is None or add_special_tokens is False or ids[:1] == [begin]:
            return ids
        return [begin, *ids]

    def _loglikelihood_tokens(self, requests: list[_Encoded], **kwargs: Any) -> list[tuple[float, bool]]:
        """(log p of the continuation in nats, whether greedy decoding gives it), longest texts first."""
        fitted = [self._fit(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(fitted)), key=lambda i: -len(fitted[i][0]) - len(fitted[i][1]))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(fitted)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            for row, answer in zip(rows, self.raw.continuations([fitted[i] for i in rows]), strict=True):
                found[row] = answer
        return found

    def _fit(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[list[int], list[int]]:
        """The end of both that the model takes."""
        keep = max(1, self._longest - len(continuation))
        return list(context)[-keep:], list(continuation)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts in nats, each token predicted once."""
        windows: list[_Encoded] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            cut = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._longest - 1,
                context_len=1,
            )
            for context, continuation in map(utils.make_disjoint_window, cut):
                windows.append((None, context, continuation))
                owners.append(i)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, cut before the first stop string."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            settings = request.args[1]
            if settings.get("do_sample"):
                raise UserError(
                    f"task '{request.task_name}' samples its answers; only greedy decoding is offered"
                )
            groups.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(i)
        texts = [""] * len(requests)
        for members in groups.values():
            stop, length = _limits(requests[members[0]].args[1])
            contexts = [requests[i].args[0] for i in members]
            for i, text in zip(members, self._generated(contexts, stop, length), strict=True):
                texts[i] = text
        return texts

    def _generated(self, contexts: Sequence[str], stop: list[str], length: int) -> list[str]:
        if self._raw is None:
            return [_cut(text, stop) for text in self.model.generate(_conversations(contexts), length)]
        length = min(length, self._raw.context // 2)  # a small context is shared by prompt and answer
        room = self._raw.context - length
        prompts = [self.tok_encode(context)[-room:] for context in contexts]
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        texts = [""] * len(prompts)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            answers = self._raw.complete([prompts[i] for i in rows], length, tuple(stop))
            for row, text in zip(rows, answers, strict=True):
                texts[row] = _cut(text, stop)
        return texts


def _limits(settings: dict[str, Any]) -> tuple[list[str], int]:
    """Stop strings and number of new tokens of lm_eval's generation settings."""
    until = settings.get("until") or []
    stop = [until] if isinstance(until, str) else list(until)
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    given = [settings[name] for name in names if settings.get(name) is not None]
    return [text for text in stop if text], int(given[0]) if given else _DEFAULT_NEW_TOKENS


def _cut(text: str, stop: Sequence[str]) -> str:
    for mark in stop:
        text = text.split(mark)[0]
    return text


def _conversations(contexts: Sequence[str]) -> list[tuple[Message, ...]]:
    """Each prompt, solved examples included, as one user message."""
    return [(Message("user", context),) for context in contexts]
