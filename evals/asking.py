"""Asking a model for what is not known yet: batches of like cost, split over processes.

The batches follow from all samples, not from those that are left: a run that was stopped goes on with the
same batches, and so with the same bits.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from core_llm import processes
from core_llm.chat import Audio, Image, Text
from core_llm.digests import conversation_digest
from core_llm.errors import UserError
from evals import records
from evals.models import Model, Subject
from evals.tasks.base import Output, Sample, Task

# Characters of a batch, padding included: bounds the memory of long conversations.
_BATCH_CHARACTERS = 1 << 18


class Asker:
    """Asks the model for what the store does not have yet.

    reused: samples that were answered before. seconds: spent inside the model.
    """

    def __init__(self, task: Task, subject: Model, store: records.RecordStore) -> None:
        self.task, self.subject, self.store = task, subject, store
        needs = ("core", "image", "audio") if task.ask == "bit-equal" else task.needs
        self.checkpoint = subject.fingerprint(needs)
        self.reused = 0
        self.seconds = 0.0

    def answers(self, samples: Sequence[Sample], title: str, digests: Sequence[str] = ()) -> list[Output]:
        """One output per sample, from the store or the model. digests: of the conversations, where known."""
        from tqdm import tqdm

        digests = digests or [conversation_digest(sample.messages) for sample in samples]
        keys = [
            records.record_key(self.task, sample, self.checkpoint, digest)
            for sample, digest in zip(samples, digests, strict=True)
        ]
        rows = dict(zip(keys, samples, strict=True))
        known = self.store.known
        self.reused += sum(key in known for key in rows)
        mine = batches(rows, self.task.batch_size)[processes.rank() :: processes.count()]
        done = sum(key in known for batch in mine for key in batch)
        with tqdm(
            total=sum(map(len, mine)), initial=done, desc=_title(title), unit="row", dynamic_ncols=True,
            disable=not processes.is_writer(),
        ) as bar:  # fmt: skip
            for batch in mine:
                left = [key for key in batch if key not in known]
                if left:
                    asked = [rows[key] for key in left]
                    self.store.add(left, asked, self._timed(asked))
                    bar.update(len(left))
        self.store.merge(keys)
        return [known[key] for key in keys]

    def _timed(self, samples: Sequence[Sample]) -> list[Output]:
        started = time.perf_counter()
        outputs = ask(self.task, self.subject, samples)
        self.seconds += time.perf_counter() - started
        return outputs


def _title(title: str) -> str:
    return title if processes.count() == 1 else f"{title} (first of {processes.count()} processes)"


def batches(rows: dict[str, Sample], size: int) -> list[list[str]]:
    """The keys of samples of like cost together, at most `size`, fewer where they are long.

    Longest first: memory runs out at once or never, and the time left is not underestimated.
    """
    costs = {key: _size(sample) for key, sample in rows.items()}
    found: list[list[str]] = []
    limit = 0
    for key in sorted(rows, key=lambda key: (costs[key], key), reverse=True):
        if not found or len(found[-1]) >= limit:
            found.append([])
            limit = max(1, min(size, _BATCH_CHARACTERS // max(1, _characters(rows[key]))))
        found[-1].append(key)
    return found


def _size(sample: Sample) -> tuple[int, str, str]:
    """Sort key: rows of like cost together, and questions on one image in one batch."""
    has_image = any(isinstance(part, Image) for message in sample.messages for part in message.parts)
    return (0 if has_image else _characters(sample), sample.group, sample.id)


def _characters(sample: Sample) -> int:
    """Length of a sample, a second of sound counted as 50 characters."""
    length = len(sample.target)
    for message in sample.messages:
        for part in message.parts:
            if isinstance(part, Text):
                length += len(part.text)
            elif isinstance(part, Audio):
                length += _seconds(part) * 50
    return length


def _seconds(part: Audio) -> int:
    """Rough duration: the exact one is not worth decoding a file twice."""
    import numpy as np

    if isinstance(part.data, np.ndarray):
        return int(len(part.data) / (part.rate or 16_000))
    size = len(part.data) if isinstance(part.data, bytes) else Path(part.data).stat().st_size
    return size // 16_000


def ask(task: Task, subject: Model, samples: Sequence[Sample]) -> list[Output]:
    """One batch through the model."""
    if task.ask == "own":
        assert task.asks is not None, f"task '{task.name}' has no way of asking"
        return task.asks(subject, samples)
    return _WAYS[task.ask](task, subject, samples)


def _generate(task: Task, subject: Model, samples: Sequence[Sample]) -> list[Output]:
    conversations = [sample.messages for sample in samples]
    return [{"text": text} for text in subject.generate(conversations, task.max_new_tokens)]


def _loglikelihood(task: Task, subject: Model, samples: Sequence[Sample]) -> list[Output]:
    found = subject.loglikelihood([s.messages for s in samples], [s.target for s in samples])
    return [{"logprob": logprob, "tokens": tokens} for logprob, tokens in found]


def _choices(task: Task, subject: Model, samples: Sequence[Sample]) -> list[Output]:
    """The choices of one sample lie side by side, so that a batch holds whole samples."""
    for sample in samples:
        if len(sample.choices) < 2:
            raise UserError(f"task '{task.name}': sample {sample.id} has fewer than two choices")
    found = subject.loglikelihood(
        [sample.messages for sample in samples for _ in sample.choices],
        [choice for sample in samples for choice in sample.choices],
    )
    outputs: list[Output] = []
    at = 0
    for sample in samples:
        own = found[at : at + len(sample.choices)]
        at += len(own)
        outputs.append({"logprobs": [logprob for logprob, _ in own], "tokens": [n for _, n in own]})
    return outputs


def _score(task: Task, subject: Model, samples: Sequence[Sample]) -> list[Output]:
    return [
        {
            "probability": float(verdict.probability),
            "unsafe": bool(verdict.unsafe),
            "categories": {name: round(float(p), 4) for name, p in verdict.categories.items()},
        }
        for verdict in subject.score([sample.messages for sample in samples])
    ]


def _bit_equal(task: Task, subject: Model, samples: Sequence[Sample]) -> list[Output]:
    """Logits of the bare core against those with adapters, on the very same batch shape.

    The shape matters: matrix products of other sizes may sum in another order, with or without
    adapters. The bare core therefore gets the token ids of the whole batch, placeholders included.
    """
    import torch

    from core_llm.generate import Request, hidden_states
    from evals.tasks.regression import companions

    if not isinstance(subject, Subject):
        raise UserError(f"model '{subject.name}' has no bare core to compare with; leave out {task.name}")

    outputs: dict[int, Output] = {}
    kinds = [adapter.part for adapter in subject.assistant.adapters]
    core, untouched = subject.assistant.core, subject.bare.core  # two, where an adapter updates its own
    for mixed in (False, True):
        index = [i for i, sample in enumerate(samples) if (sample.kind == "mixed batch") == mixed]
        if not index:
            continue
        rows = [samples[i].messages for i in index]
        rows += companions(kinds, seed=0) if mixed and kinds else []
        with torch.inference_mode():
            request = subject.assistant.prepare(rows)
            plain = Request(
                request.targets,
                None,
                request.lengths,
                request.targets,
                request.loss_mask,
                request.answer_starts,
            )
            ours = core.logits(hidden_states(core, request))
            bare = untouched.logits(hidden_states(untouched, plain))
        for row, i in enumerate(index):
            n = int(request.lengths[row])
            a, b = ours[row, :n], bare[row, :n]
            outputs[i] = {"equal": bool(torch.equal(a, b)), "max_difference": float((a - b).abs().max())}
    return [outputs[i] for i in range(len(samples))]


_WAYS: dict[str, Callable[[Task, Model, Sequence[Sample]], list[Output]]] = {
    "generate": _generate,
    "loglikelihood": _loglikelihood,
    "choices": _choices,
    "score": _score,
    "bit-equal": _bit_equal,
}
