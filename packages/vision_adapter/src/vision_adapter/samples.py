"""Training samples: pictures with questions, drawn or from easy-VQA, packed for one pass of the core.

Axes: B pictures, T text positions.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from core_llm.chat import Image, Message, Text, render
from core_llm.data import sources
from core_llm.data.levels import level_question, sample_level_scene
from core_llm.data.phrases import DESCRIBE_PROMPT
from core_llm.data.scenes import COLORS, COLUMNS, NUMBERS, ROWS, SHAPES, Scene, article
from core_llm.tokenizer import Tokenizer
from vision_adapter.images import decode, tile
from vision_adapter.pointing import ANSWER, MENTION, pointers
from vision_adapter.scenes import Layout, draw_layout, layout

Turn = tuple[str, str]  # question, answer


@dataclass(frozen=True, eq=False)
class Sample:
    """A picture as a tile [3, size, size] and dialogues about it, each of one or more turns.

    plan: where everything lies, of a drawn picture.
    """

    tile: Tensor
    dialogues: list[list[Turn]]
    plan: Layout | None = None


@dataclass(frozen=True, eq=False)
class Packed:
    """B pictures, each with its dialogues in one row behind a shared prefix that ends in the image rows.

    tiles [B, 3, size, size]; tokens, positions, documents [B, T]; image [B, T] bool: where the adapter's rows
    go; loss_mask [B, T] bool: the answers; starts [B]: first image position. Document 0 is the prefix.
    present [B, T]: 1 or 0 on the colour or shape whose presence is asked for, as it is there or not; else -1.
    pointers [B, T], regions [B, T, S]: kind of pointer (see `pointing`) or 0, and the patches it points at.
    """

    tiles: Tensor
    tokens: Tensor
    positions: Tensor
    documents: Tensor
    image: Tensor
    loss_mask: Tensor
    present: Tensor
    pointers: Tensor
    regions: Tensor
    starts: Tensor


def easy_vqa(data_root: Path, split: str, size: int, limit: int | None = None) -> list[Sample]:
    """easy-VQA as samples, one per picture; each question is a dialogue. Raises `DataError` without it."""
    dialogues: dict[str, list[list[Turn]]] = {}
    pictures: dict[str, Path | bytes] = {}
    for row in sources.load("easy_vqa", data_root, split):
        if row.group not in pictures and limit is not None and len(pictures) >= limit:
            continue
        pictures.setdefault(row.group, row.fields["image"])
        dialogues.setdefault(row.group, []).append([(row.fields["question"], row.fields["answer"])])
    return [Sample(tile(decode(picture), size), dialogues[group]) for group, picture in pictures.items()]


def ordered_description(scene: Scene) -> str:
    """The scene in the wording of `core_llm.data.scenes.describe`: reading order, bars from the left.

    From a picture an order cannot be guessed, so a fixed one is what an answer can learn.
    """
    if scene.word is not None:
        return f"the {'words' if ' ' in scene.word else 'word'} {scene.word}."
    if scene.bars:
        bars = [f"{article(bar.color)} bar of {NUMBERS[bar.height]}" for bar in scene.bars]
        return ", ".join(bars) + "."
    items = sorted(scene.items, key=lambda item: (ROWS.index(item.row), COLUMNS.index(item.column)))
    parts = [article(f"{item.size} {item.name}") + f" at the {item.place}" for item in items]
    return (" and ".join(parts) if len(parts) <= 2 else ", ".join(parts)) + "."


def negated(question: str) -> bool:
    """Whether a question asks for absence ("is there not a circle?")."""
    return bool({"no", "not"} & set(question.split()))


@dataclass(frozen=True)
class Kind:
    """A kind of drawn picture: its level, the skills asked for with their weights, how many questions."""

    level: int
    skills: Mapping[str, float]
    questions: int = 5


KINDS = {
    "one": Kind(1, {"presence": 3, "color": 1, "shape": 1, "position": 2}),
    "several": Kind(2, {"count": 3, "relation": 4, "position": 3, "color": 1, "shape": 1, "presence": 2}),
    "word": Kind(2, {"word": 1}, 2),
    "chart": Kind(2, {"chart": 1}, 4),
    "crowded": Kind(3, {"count": 3, "relation": 3, "position": 2, "color": 1, "shape": 1, "presence": 1}),
    "words": Kind(3, {"word": 1}, 2),
    "heights": Kind(3, {"chart": 1}, 4),
}


def scene_sample(
    kind: Kind, rng: random.Random, size: int, describe_share: float = 0.0, negated_share: float = 1.0
) -> Sample:
    """A drawn scene with questions; sometimes the core is asked to describe it.

    negated_share: how many of the negated questions are kept, the others being drawn again.
    """
    skills, weights = list(kind.skills), list(kind.skills.values())
    first = rng.choices(skills, weights)[0]
    scene = sample_level_scene(rng, kind.level, first)
    plan = layout(scene, rng)
    picture = tile(draw_layout(plan, rng, size), size)
    turns: list[Turn] = []
    while len(turns) < kind.questions:
        skill = rng.choices(skills, weights)[0]
        question = level_question(scene, rng, kind.level, skill)
        if question and (not negated(question.text) or rng.random() < negated_share):
            turns.append((question.text, question.answer))
    dialogues = [[turn] for turn in turns]
    if len(turns) > 2 and rng.random() < 0.25:  # follow-up questions of one conversation
        dialogues = [turns[:2], *[[turn] for turn in turns[2:]]]
    if rng.random() < describe_share:
        dialogues[-1] = [(DESCRIBE_PROMPT, ordered_description(scene))]
    return Sample(picture, dialogues, plan)


def vary(sample: Sample, rng: random.Random, n_dialogues: int, negated_share: float = 1.0) -> Sample:
    """At most n of the dialogues, their first question with or without a leading space.

    Typed after an image it has none; the core's own text, and what speech stands for, has one.
    negated_share: how many of the dialogues that begin with a negated question are kept.
    """
    dialogues = [
        turns for turns in sample.dialogues if not negated(turns[0][0]) or rng.random() < negated_share
    ]
    dialogues = dialogues or sample.dialogues
    kept = rng.sample(dialogues, min(n_dialogues, len(dialogues)))
    spaced = [
        [(f" {turns[0][0]}", turns[0][1]), *turns[1:]] if rng.random() < 0.5 else turns for turns in kept
    ]
    return replace(sample, dialogues=spaced)


def conversation(turns: Sequence[Turn], picture: Image) -> list[Message]:
    """A dialogue as messages: the picture first, then its question."""
    messages: list[Message] = []
    for n, (question, answer) in enumerate(turns):
        content = (picture, Text(question)) if n == 0 else (Text(question),)
        messages += [Message("user", content), Message("assistant", answer)]
    return messages


def pack(samples: Sequence[Sample], tokenizer: Tokenizer, token_rows: int) -> Packed:
    """One row per picture: what all its dialogues begin with, then each dialogue as a document of its own."""
    rows = [_pack_row(sample, tokenizer, token_rows) for sample in samples]
    width = max(len(row.tokens) for row in rows)

    def column(name: str, filler: int | bool) -> Tensor:
        values = [getattr(row, name) for row in rows]
        return torch.tensor([list(value) + [filler] * (width - len(value)) for value in values])

    image = column("image", False)
    tiles = torch.stack([sample.tile for sample in samples])
    pointers = torch.zeros(len(rows), width, dtype=torch.long)
    regions = torch.zeros(len(rows), width, (tiles.shape[-1] // 8) ** 2, dtype=torch.bool)
    for n, row in enumerate(rows):
        for position, patches, kind in row.pointers:
            pointers[n, position], regions[n, position] = kind, patches
    return Packed(
        tiles=tiles,
        tokens=column("tokens", tokenizer.pad_id),
        positions=column("positions", 0),
        documents=column("documents", -1),
        image=image,
        loss_mask=column("loss_mask", False),
        present=column("present", -1),
        pointers=pointers,
        regions=regions,
        starts=image.int().argmax(dim=1),
    )


@dataclass(eq=False)
class _Row:
    """One row of `Packed` while it grows; pointers: position, patches, kind."""

    tokens: list[int]
    positions: list[int]
    documents: list[int]
    loss_mask: list[bool]
    present: list[int]
    image: list[bool]
    pointers: list[tuple[int, Tensor, int]]


def _pack_row(sample: Sample, tokenizer: Tokenizer, token_rows: int) -> _Row:
    row = _Row([], [], [], [], [], [], [])
    patches = sample.tile.shape[-1] // 8
    n_prefix = 0
    for number, turns in enumerate(sample.dialogues, start=1):
        rendered = render(conversation(turns, Image(b"")), tokenizer, generation_prompt=False)
        split = rendered.parts[0][0]  # the prefix ends with the image
        if not row.tokens:
            row.tokens = rendered.ids[:split] + [tokenizer.image_id] * token_rows
            n_prefix = len(row.tokens)
            row.positions = list(range(n_prefix))
            row.documents, row.loss_mask, row.present = [0] * n_prefix, [False] * n_prefix, [-1] * n_prefix
        start, rest = len(row.tokens), rendered.ids[split + 1 :]
        said = rendered.loss_mask[split + 1 :]
        if sample.plan is not None:
            for pointer in pointers(*turns[0], sample.plan, patches):
                if pointer.end is None:
                    row.pointers.append((start + said.index(True) - 1, pointer.patches, ANSWER))
                else:
                    last = len(tokenizer.encode(turns[0][0][: pointer.end])) - 1
                    row.pointers.append((start + last, pointer.patches, MENTION))
        row.tokens += rest
        row.positions += range(n_prefix, n_prefix + len(rest))
        row.documents += [number] * len(rest)
        row.loss_mask += said
        row.present += _asked_presence(turns[0], tokenizer, len(rest))
    row.image = [n_prefix - token_rows <= i < n_prefix for i in range(len(row.tokens))]
    return row


def _asked_presence(turn: Turn, tokenizer: Tokenizer, length: int) -> list[int]:
    """`Packed.present` of a dialogue of that many tokens, which begins with the question."""
    labels = [-1] * length
    question, answer = turn
    asked = [word for word in question.rstrip("?").split() if word in (*COLORS, *SHAPES)]
    if answer in ("yes", "no") and len(asked) == 1:
        end = question.index(asked[0]) + len(asked[0])
        labels[len(tokenizer.encode(question[:end])) - 1] = int((answer == "yes") != negated(question))
    return labels
