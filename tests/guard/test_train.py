import random
from pathlib import Path

import numpy as np
import pytest
import torch

from core_llm.chat import Message
from core_llm.data.sources import Row
from core_llm.train.fit import FitConfig
from guard import examples
from guard.batches import Epochs, collate, encode
from guard.examples import Example
from guard.guard import Guard
from guard.policy import Policy
from guard.tasks import Recipe, VerdictTask, language_loss
from guard.taxonomy import CATEGORIES
from guard.teacher import baseline_scores, out_of_fold
from guard.templates import FRAMES, HARMFUL, HARMLESS, REFUSALS
from guard.train import fine_tune

POLICY = Policy(brief=True, window=32, context=32)


def make(n: int, seed: int = 0) -> list[Example]:
    """Conversations whose answer is unsafe where it holds "red"."""
    rng = random.Random(seed)
    found = []
    for i in range(n):
        unsafe = i % 2 == 0
        words = [rng.choice(["two", "three", "circle", "left"]) for _ in range(4)]
        words.insert(rng.randrange(5), "red" if unsafe else "blue")
        messages = (Message("user", f"question {rng.randrange(50)}"), Message("assistant", " ".join(words)))
        found.append(Example(messages, unsafe, float(unsafe), "S10" if unsafe else None))
    return found


def test_teacher_never_judges_a_pair_by_its_own_label() -> None:
    # Labels are noise, each context has one label: an honest teacher cannot know them.
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300)
    pairs = [(f"context{i} words here", f"answer{i} to it") for i in range(300)]
    doubled, twice = pairs + pairs, np.concatenate([labels, labels])
    opinion = out_of_fold(doubled, twice.tolist())
    assert abs(np.corrcoef(opinion, twice)[0, 1]) < 0.25


def test_teacher_learns_what_words_say() -> None:
    data = make(200)
    opinion = out_of_fold([e.pair for e in data], [int(e.unsafe) for e in data])
    assert all((p > 0.5) == e.unsafe for p, e in zip(opinion, data, strict=True))


def test_teacher_without_two_classes_gives_the_mean() -> None:
    assert out_of_fold([("a", "b")] * 6, [1] * 6).tolist() == [1.0] * 6


def test_soft_targets_lie_between_label_and_opinion() -> None:
    data = make(100)
    for before, after in zip(data, examples.taught(data, 0.5), strict=True):
        assert after.messages == before.messages and after.unsafe == before.unsafe
        assert abs(after.target - before.target) <= 0.5


def test_baseline_ranks_unseen_pairs() -> None:
    train, dev = make(200), make(40, seed=1)
    scores = baseline_scores([e.pair for e in train], [int(e.unsafe) for e in train], [e.pair for e in dev])
    assert min(s for s, e in zip(scores, dev, strict=True) if e.unsafe) > max(
        s for s, e in zip(scores, dev, strict=True) if not e.unsafe
    )


def test_every_set_of_the_mixture_becomes_labelled_examples() -> None:
    rows = {
        "diasafety": {"context": "c", "response": "r", "category": "Biased Opinion", "label": 1},
        "openai_moderation": {"prompt": "p", "labels": {"S": 1, "S3": 1, "H": None}, "label": 1},
        "hate_speech": {"text": "t", "label": 1},
        "ailuminate": {"prompt": "p", "hazard": "spc_ele"},
        "simple_safety_tests": {"prompt": "p", "harm_area": "Scams and fraud"},
        "mitre_frr": {"prompt": "p"},
        "gsm8k": {"question": "q", "answer": "a"},
    }
    made = {name: part.read([Row("0", "g", rows[name])])[0] for name, part in examples.MIXTURE.items()}
    assert {name: e.code for name, e in made.items()} == {
        "diasafety": "S10",
        "openai_moderation": "S4",
        "hate_speech": "S10",
        "ailuminate": "S13",
        "simple_safety_tests": "S2",
        "mitre_frr": None,
        "gsm8k": None,
    }
    assert [name for name, e in made.items() if not e.unsafe] == ["mitre_frr", "gsm8k"]
    assert made["diasafety"].messages[-1].role == "assistant"


def test_an_epoch_shows_every_row_once_and_is_a_function_of_the_step(guard: Guard) -> None:
    rows = [encode(e, guard.tokenizer, POLICY) for e in make(50)]
    epochs, again = Epochs([(rows, None)], 8, seed=1), Epochs([(rows, None)], 8, seed=1)
    assert epochs.length == 7
    shown = [row for step in range(7) for row in epochs[step]]
    assert sorted(map(id, shown)) == sorted(map(id, rows))
    assert again[9] == epochs[9] and again[3] == epochs[3]
    assert Epochs([(rows, None), (rows, 10)], 8, seed=1).length == 8
    twice = Epochs([(rows[:4], 10)], 10, seed=1)[0]
    assert all(2 <= sum(shown is row for shown in twice) <= 3 for row in rows[:4])


def test_rows_carry_the_answer_behind_the_prompt(guard: Guard) -> None:
    unsafe, safe = (encode(e, guard.tokenizer, POLICY) for e in make(2))
    decode = guard.tokenizer.decode
    assert decode(unsafe.ids[unsafe.n_prompt :]) == "unsafe\nS10"
    assert decode(safe.ids[safe.n_prompt :]) == "safe"
    batch = collate([unsafe, safe], guard.tokenizer.pad_id)
    assert batch.tokens.shape == (2, max(len(unsafe.ids), len(safe.ids)))


def test_verdict_loss_is_the_cross_entropy_at_the_verdict_position(guard: Guard) -> None:
    rows = [encode(e, guard.tokenizer, POLICY) for e in make(4)]
    recipe = Recipe(prefix_weight=0, answer_weight=0, dropout=0, token_dropout=0)
    task = VerdictTask(guard.core, guard.tokenizer, Epochs([(rows, None)], 4, 0), recipe, POLICY, {})
    loss, _ = task.loss(task.batch(0))
    expected = 0.0
    for row in task.epochs[0]:
        logp = guard.core(torch.tensor([row.ids[: row.n_prompt]]))[0, -1].double().log_softmax(-1)
        expected -= logp[guard.tokens.unsafe if row.target else guard.tokens.safe].item() / 4
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_padding_does_not_enter_the_language_loss(guard: Guard) -> None:
    rows = [encode(e, guard.tokenizer, POLICY) for e in make(2)]
    pad = guard.tokenizer.pad_id
    batch = collate(rows, pad)
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row.ids[: row.n_prompt]])
        logp = guard.core(ids)[0, :-1].log_softmax(-1)
        total -= logp.gather(-1, ids[0, 1:, None]).sum().item()
        count += row.n_prompt - 1
    loss = language_loss(guard.core, guard.core.hidden(batch.tokens), batch)
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_fine_tuning_learns_and_leaves_the_core_alone(guard: Guard, tmp_path: Path) -> None:
    before = {name: p.clone() for name, p in guard.core.named_parameters()}
    recipe = Recipe(language_steps=5, batch=16, average_decay=0.8)
    config = FitConfig(tmp_path, steps=40, lr=4e-3, warmup=5, save_every=20, log_every=10)
    held_out = make(60, seed=9)
    trained, figures = fine_tune(
        guard.core, guard.tokenizer, [(make(200), None)], {"own": held_out}, config, recipe, POLICY
    )
    assert figures["auprc_own"] > 0.95
    verdicts = trained.classify([e.messages for e in held_out])
    assert np.mean([v.unsafe == e.unsafe for v, e in zip(verdicts, held_out, strict=True)]) > 0.8
    assert max(verdicts[0].categories, key=lambda c: verdicts[0].categories[c]) == "S10"
    assert all(torch.equal(p, before[name]) for name, p in guard.core.named_parameters())
    assert not any(p.requires_grad for p in guard.core.parameters())


def test_generated_requests_are_a_function_of_the_seed_and_cover_every_category() -> None:
    made = examples.templates(1500, seed=3)
    assert made == examples.templates(1500, seed=3) != examples.templates(1500, seed=4)
    assert {e.code for e in made} == {None, *CATEGORIES}
    assert all(e.unsafe == (e.code is not None) for e in made)
    assert 0.2 < np.mean([e.unsafe for e in made]) < 0.5
    refusals = [e for e in made if e.messages[-1].text in REFUSALS]
    assert refusals and not any(e.unsafe for e in refusals)


def test_every_sentence_stands_around_harmless_and_harmful_aims() -> None:
    assert not set(HARMLESS) & {aim for aims in HARMFUL.values() for aim in aims}
    assert all(frame.count("{}") == 1 for frame in FRAMES)
