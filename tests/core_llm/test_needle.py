"""Haystacks that are what they say they are, and a task that can be learned from."""

import random
import re
from functools import cache
from pathlib import Path

import pytest
import torch

from core_llm.chat import render
from core_llm.checkpoint import NANO
from core_llm.config import LlamaConfig
from core_llm.data.needle import haystack, haystacks, lookup_conversation
from core_llm.data.scenes import SHAPES
from core_llm.errors import UserError
from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer
from core_llm.train.fit import FitConfig
from core_llm.train.needle import NeedleConfig, NeedleTask, train_needle

TOKENIZER = Tokenizer.load(NANO)


@cache
def count(text: str) -> int:
    return len(TOKENIZER.encode(text))


@pytest.mark.parametrize("tokens", [96, 300, 1000])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_haystack_fills_its_tokens_and_holds_the_needle_once_at_its_depth(tokens: int, depth: float) -> None:
    found = haystack(random.Random(tokens), tokens, depth, count)
    length = len(render(found.messages(), TOKENIZER).ids)
    assert tokens - 20 <= length <= tokens
    [needle] = [s for s in re.split(r"(?<=\.) ", found.text) if any(shape in s for shape in SHAPES)]
    assert re.fullmatch(rf"an? (small|large) {found.answer} \w+ at the [\w ]+\.", needle)
    before = found.text.index(needle) / (len(found.text) - len(needle))
    assert abs(before - depth) < 0.15  # a text of 96 tokens has few places
    assert found.messages()[0].text.endswith(". what color is the shape?")


def test_control_lacks_the_needle_and_nothing_else() -> None:
    for i in range(50):
        found = haystack(random.Random(i), 200, 0.5, count)
        whole, bare = (text.split(". ") for text in (found.text, found.bare))
        missing = [sentence for sentence in whole if sentence not in bare]
        assert len(missing) == 1 and f" {found.answer} " in missing[0]
        assert not any(shape in found.bare for shape in SHAPES) and found.messages(needle=False)[
            0
        ].text.startswith(found.bare)


def test_haystacks_are_the_same_every_time_and_different_for_another_seed() -> None:
    first, again, other = (haystacks((100, 150), (0.0, 1.0), 2, count, seed) for seed in (0, 0, 1))
    assert first == again and len(first) == 8
    assert not {h.text for _, h in first} & {h.text for _, h in other}


def test_haystack_too_short_for_its_facts_is_refused() -> None:
    with pytest.raises(UserError, match="30 tokens has no room"):
        haystack(random.Random(0), 30, 0.5, count)


def test_every_answer_of_a_lookup_is_told_by_the_text_alone() -> None:
    words = set()
    for i in range(150):
        turns = lookup_conversation(random.Random(i), 250, count)
        text = turns[0].text
        answers = {q.text.split(". ")[-1]: a.text for q, a in zip(turns[::2], turns[1::2], strict=True)}
        word = answers.pop("what does the sign say?")
        words.add(word)
        assert f"a sign with the word {word}." in text
        color = answers.pop("what color is the shape?")
        shape = answers.pop(f"what is the {color} shape?")
        place = answers.pop(f"where is the {color} {shape}?")
        assert f" {color} {shape} at the {place}." in text and not answers
        assert sum(text.count(name) for name in SHAPES) <= 2  # once told, once asked at most
    assert len(words) > 30


def test_texts_grow_in_stages_and_only_answers_are_targets() -> None:
    config = NeedleConfig(tokens=800, stages=((0.5, 120), (0.5, 400)))
    model = Llama(LlamaConfig(32, 1, 2, 1, 64, vocab_size=4096, max_positions=512))
    task = NeedleTask(model, TOKENIZER, config, steps=10)
    assert [task.length(step) for step in (0, 4, 5, 9)] == [120, 120, 400, 400]
    batch = task.batch(7)
    assert batch.tokens.shape[0] == 2 and 200 < batch.tokens.shape[1] <= 440
    row = batch.tokens[0][batch.said[0]].tolist()
    answers = TOKENIZER.decode(row, keep_special=True).split("<|eot_id|>")
    assert len(answers) == 5 and all(answers[:-1]) and answers[-1] == ""
    assert torch.equal(task.batch(7).tokens, batch.tokens) and not torch.equal(
        task.batch(8).tokens[:, :50], batch.tokens[:, :50]
    )


def test_training_lowers_the_loss_and_right_answers_are_counted_whole(tmp_path: Path) -> None:
    config = NeedleConfig(tokens=300, stages=((1.0, 100),), held_out=2)
    model = Llama(LlamaConfig(32, 1, 2, 1, 64, vocab_size=4096, max_positions=256)).initialise(0)
    task = NeedleTask(model, TOKENIZER, config, steps=12)
    with torch.no_grad():
        before = task.evaluate()
    settings = FitConfig(tmp_path, steps=12, lr=1e-2, warmup=2, autocast=False)
    after = train_needle(model, TOKENIZER, settings, config)
    assert after["held_out_loss"] < 0.8 * before["held_out_loss"]
    assert before["held_out_right"] == 0.0 <= after["held_out_right"] < 0.5  # a lucky guess at most
    assert not any(p.requires_grad for p in model.parameters())

    class Oracle(NeedleTask):
        def _answers(self, batch):  # type: ignore[no-untyped-def]
            rows, at = batch.said[:, 1:].nonzero(as_tuple=True)
            targets = batch.tokens[rows, at + 1]
            logits = torch.nn.functional.one_hot(targets, 4096).float()
            logits[0] = 0  # one wrong token makes the first answer wrong, however long it is
            return logits, targets

    right = Oracle(model, TOKENIZER, config, steps=1).loss(task.batch(0))[1]["right"]
    n = 4 * len(task.batch(0).tokens)
    assert right == pytest.approx((n - 1) / n)
