"""Does a model say its training text by heart? The next 50 tokens of a training text after its first 50.

Greedy decoding reproduces a continuation exactly if and only if each of its tokens is the likeliest one after
those before it, so one forward pass decides and nothing has to be generated. The length of 50 is that of the
Llama 3 paper (section 5.4), which reports verbatim memorisation of 50-grams.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from core_llm.chat import Message
from core_llm.errors import DataError, UserError
from evals.models import PLAIN_TEXT
from evals.tasks import data, scoring
from evals.tasks.base import Control, Options, Output, Sample, Task

if TYPE_CHECKING:
    from evals.models import Model

NGRAM = 50
PREFIX = "memorisation:"
# A word is at least one token: a text of so many words has a prefix and a continuation for every tokenizer.
_WORDS = 2 * NGRAM
ROWS = 400


def _asks(model: "Model", samples: Sequence[Sample]) -> list[Output]:
    """Log-likelihood of each continuation and whether greedy decoding would say it."""
    from evals.models import TokenModel

    if not isinstance(model, TokenModel):
        raise UserError(f"model '{model.name}' gives no log-likelihoods, which memorisation needs")
    pairs = []
    for sample in samples:
        prefix = model.encode(sample.messages[-1].text)[:NGRAM]
        continuation = model.encode(sample.target)[NGRAM : 2 * NGRAM]
        begin = [] if model.begin is None else [model.begin]
        pairs.append(([*begin, *prefix], continuation))
    found = model.continuations(pairs)
    return [
        {"logprob": logprob, "tokens": len(continuation), "greedy": bool(greedy)}
        for (logprob, greedy), (_, continuation) in zip(found, pairs, strict=True)
    ]


def _samples(texts: Sequence[tuple[str, str]], options: Options) -> list[Sample]:
    """Texts (id, text) that are long enough; a fixed choice of 400 of them unless a limit says less."""
    long = [(name, text) for name, text in texts if len(text.split()) >= _WORDS]
    chosen = Options(limit=min(ROWS, options.limit or ROWS), seed=options.seed)
    return [Sample(name, name, (Message("user", text),), text) for name, text in data.subset(long, chosen)]


def _maths(split: str) -> Callable[[Options], list[tuple[str, str]]]:
    def texts(options: Options) -> list[tuple[str, str]]:
        from core_llm.data import sources

        rows = sources.load("gsm8k", options.data_root, split)
        return [(row.id, f"{row.fields['question']} {row.fields['answer']}") for row in rows]

    return texts


def _unseen(samples: Sequence[Sample], options: Options) -> list[Sample]:
    """As many texts of the same kind that no trainer reads."""
    return _samples(_maths("dev")(options), options)


def _foreign_prefix(samples: Sequence[Sample], options: Options) -> list[Sample]:
    """Each continuation after the beginning of another text."""
    order = list(range(len(samples)))
    random.Random(options.seed).shuffle(order)
    donor = {order[i]: order[(i + 1) % len(order)] for i in range(len(order))}
    return [
        Sample(sample.id, sample.group, samples[donor[i]].messages, sample.target)
        for i, sample in enumerate(samples)
    ]


FOREIGN_PREFIX = Control("another text's beginning", "control", ask=_foreign_prefix)
UNSEEN = Control("text never trained on", "control", ask=_unseen)


def _task(
    name: str,
    title: str,
    source: tuple[str, str, str],
    load: Callable[[Options], list[Sample]],
    controls: tuple[Control, ...],
) -> Task:
    return Task(
        name=name,
        title=title,
        section="text",
        needs=("core", PLAIN_TEXT),
        source=source[0],
        licence=source[1],
        metrics=("memorised", "perplexity"),
        ask="own",
        load=load,
        judge=scoring.memorised,
        controls=controls,
        batch_size=32,
        citation=source[2],
        prompt_format="the first 50 tokens of {text}, without a chat format",
        asks=_asks,
    )


def _own_texts(path: Path) -> Callable[[Options], list[Sample]]:
    def load(options: Options) -> list[Sample]:
        from evals.contamination import texts_of

        texts = [(f"text-{i}", text) for i, text in enumerate(texts_of(str(path), None))]
        samples = _samples(texts, options)
        if not samples:
            raise DataError(f"{path}: holds no text of at least {_WORDS} words")
        return samples

    return load


TASKS = [
    _task(
        "memorisation",
        "Training text said by heart (50 tokens after 50)",
        ("GSM8K (openai/gsm8k), train part", "MIT", "Llama Team 2024, The Llama 3 Herd of Models"),
        lambda options: _samples(_maths("train")(options), options),
        (UNSEEN, FOREIGN_PREFIX),
    )
]


def of_file(name: str) -> Task | None:
    """The task "memorisation:FILE" over one's own training text (.jsonl or .txt); None for other names."""
    if not name.startswith(PREFIX):
        return None
    path = Path(name.removeprefix(PREFIX))
    source = (str(path), "see the file", "Llama Team 2024, The Llama 3 Herd of Models")
    return _task(
        name.replace("/", "_"), f"{path.name} said by heart", source, _own_texts(path), (FOREIGN_PREFIX,)
    )
