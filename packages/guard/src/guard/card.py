"""The model card that a training run writes beside its weights."""

from collections.abc import Mapping, Sequence

from guard.data_card import SetCard
from guard.policy import Policy

_TEXT = """# Guard

A Llama core, fine-tuned to judge the last message of a conversation: `safe`, or `unsafe` and the codes of the
hazards. The score is P(unsafe) / (P(safe) + P(unsafe)) at the first token of the answer.

## Made by

    {command}

{method}

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

What was left out of them and how many rows of each category there were: [data.md](data.md).

## Limits

It has learnt which words and turns of phrase people marked as unsafe in these English sets; it has little
knowledge of the world, reads no images, and is no protection by itself. {rules}
"""

_LABELS = """First next-token prediction on the conversations, then verdicts with targets between the label
and the out-of-fold opinion of a TF-IDF regression; the saved weights are a moving average."""
_RULES = """Verdicts under rules that change from one showing to the next: categories left out, codes
exchanged and renumbered, names reworded, custom categories added. Only the answer is in the loss."""
_TAUGHT = (
    """Distilled: P(unsafe) and the probabilities of the categories of a larger guard, not the labels."""
)
_FIXED = """The rules are not in its prompt:
other categories than these need a training run."""
_READ = """It reads its rules, but
has seen few besides these: measure other categories before you rely on them."""


def write(
    command: str, figures: Mapping[str, float], cards: Sequence[SetCard], policy: Policy, taught: bool = False
) -> str:
    """The card as Markdown; figures are those of `train.fine_tune` and `train.all_baselines`."""
    names = [key.removeprefix("auprc_") for key in figures if key.startswith("auprc_")]
    scores = "\n".join(
        f"| {name} | {figures[f'rows_{name}']:.0f} | {figures[f'base_rate_{name}']:.3f} "
        f"| {figures[f'tfidf_{name}']:.3f} | {figures[f'auprc_{name}']:.3f} |"
        for name in names
        if f"rows_{name}" in figures
    )
    return _TEXT.format(
        command=command,
        method=_TAUGHT if taught else _LABELS if policy.brief else _RULES,
        rules=_FIXED if policy.brief else _READ,
        scores=scores,
        sources="\n".join(f"| {card.title} | {card.licence} | {card.source} |" for card in cards),
        categories="\n".join(f"- {code}: {rule.name}" for code, rule in policy.categories.items()),
    )
