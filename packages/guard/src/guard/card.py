"""The model card that a training run writes beside its weights."""

from collections.abc import Mapping

from core_llm.data.sources import SOURCES
from guard.examples import MIXTURE
from guard.taxonomy import CATEGORIES

_TEXT = """# Guard

A Llama core, fine-tuned to judge the last message of a conversation: `safe`, or `unsafe` and the codes of the
hazards. The score is P(unsafe) / (P(safe) + P(unsafe)) at the first token of the answer.

## Made by

    {command}

First next-token prediction on the conversations, then verdicts with targets between the label and the
out-of-fold opinion of a TF-IDF regression; the saved weights are a moving average.

## Scores on held-out rows

Area under the precision-recall curve. TF-IDF is a logistic regression on words and word pairs of the same
training rows; the base rate is what a coin would get.

| set | rows | base rate | TF-IDF | guard |
|---|---|---|---|---|
{scores}

## Categories

{categories}

## Trained on

| set | licence | source |
|---|---|---|
{sources}

And requests that the project generates: the same sentences around harmless and harmful aims.

## Limits

It has learnt which words and turns of phrase people marked as unsafe in these English sets; it has little
knowledge of the world, reads no images, and is no protection by itself. The rules are not in its prompt:
other categories than these need a training run.
"""


def write(command: str, figures: Mapping[str, float]) -> str:
    """The card as Markdown; figures are those of `train.train`."""
    names = [key.removeprefix("auprc_") for key in figures if key.startswith("auprc_")]
    scores = "\n".join(
        f"| {name} | {figures[f'rows_{name}']:.0f} | {figures[f'base_rate_{name}']:.3f} "
        f"| {figures[f'tfidf_{name}']:.3f} | {figures[f'auprc_{name}']:.3f} |"
        for name in names
    )
    sources = "\n".join(
        f"| {SOURCES[name].title} | {SOURCES[name].licence} | {SOURCES[name].homepage} |" for name in MIXTURE
    )
    categories = "\n".join(f"- {code}: {name}" for code, name in CATEGORIES.items())
    return _TEXT.format(command=command, scores=scores, sources=sources, categories=categories)
