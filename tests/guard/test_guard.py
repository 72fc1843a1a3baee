import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from core_llm.chat import Message
from core_llm.errors import CheckpointError, UserError
from core_llm.kernels import attend
from guard.guard import Guard, Verdict
from guard.prompt import Row, prompts
from guard.testing import tiny_guard

TEXTS = [
    "hello",
    "what is two and two",
    "a much longer message that needs more padding than the others do, by far",
    "no",
]


def ask(text: str) -> list[Message]:
    return [Message("user", text)]


def softmax64(logits: torch.Tensor) -> np.ndarray:
    values = logits.double().numpy()
    exponentials = np.exp(values - values.max())
    return exponentials / exponentials.sum()


@pytest.mark.parametrize("brief", [True, False])
def test_probabilities_equal_a_float64_softmax_at_the_verdict_position(brief: bool) -> None:
    guard = tiny_guard(brief=brief)
    core = guard.core.double()
    core.frequencies = core.frequencies.double()
    for text in TEXTS[:2]:
        ids = prompts(ask(text), guard.tokenizer, guard.policy)[0]
        with torch.no_grad():
            at_verdict = softmax64(core(torch.tensor([ids]))[0, -1])
            at_code = softmax64(core(torch.tensor([[*ids, *guard.tokens.forced]]))[0, -1])
        verdict = guard.classify([ask(text)])[0]
        safe, unsafe = at_verdict[guard.tokens.safe], at_verdict[guard.tokens.unsafe]
        assert verdict.probability == pytest.approx(unsafe / (safe + unsafe), rel=1e-6)
        assert verdict.mass == pytest.approx(safe + unsafe, rel=1e-6)
        codes = at_code[list(guard.tokens.codes.values())]
        expected = verdict.probability * codes / codes.sum()
        assert list(verdict.categories.values()) == pytest.approx(expected.tolist(), rel=1e-6)


def test_a_padded_batch_equals_one_by_one(guard: Guard) -> None:
    together = guard.classify([ask(text) for text in TEXTS])
    for text, verdict in zip(TEXTS, together, strict=True):
        alone = guard.classify([ask(text)])[0]
        assert verdict.probability == pytest.approx(alone.probability, abs=1e-6)
        assert verdict.mass == pytest.approx(alone.mass, abs=1e-6)
        assert verdict.categories == pytest.approx(alone.categories, abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_results_come_in_the_order_of_the_conversations(guard: Guard, batch_size: int) -> None:
    texts = [" ".join(["word"] * (1 + i * 7 % 23)) + f" {i}" for i in range(12)]
    verdicts = guard.classify([ask(text) for text in texts], batch_size)
    alone = [guard.classify([ask(text)])[0].probability for text in texts]
    assert [v.probability for v in verdicts] == pytest.approx(alone, abs=1e-6)


def test_a_batch_costs_one_forward_pass(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = guard.core.hidden

    def counted(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(1)
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(guard.core, "hidden", counted)
    guard.classify([ask(text) for text in TEXTS])
    assert len(calls) == 1


def test_categories_add_up_to_the_probability(guard: Guard) -> None:
    verdict = guard.classify([ask("hello")])[0]
    assert list(verdict.categories) == [f"S{i}" for i in range(1, 15)]
    assert sum(verdict.categories.values()) == pytest.approx(verdict.probability)


def test_a_long_message_is_as_bad_as_its_worst_window(guard: Guard) -> None:
    text = " ".join(str(i) for i in range(300))
    rows = prompts(ask(text), guard.tokenizer, guard.policy)
    windows = guard.judge_rows([Row(ids) for ids in rows], guard.prompter.reading())
    verdict = guard.classify([ask(text), ask("hello")])[0]
    assert len(rows) > 3
    assert verdict.probability == pytest.approx(max(w.probability for w in windows), abs=1e-6)


def test_an_answer_that_is_no_verdict_counts_as_unsafe(guard: Guard) -> None:
    verdict = guard.classify([ask("hello")])[0]
    assert verdict.mass < 0.5  # random weights: safe and unsafe are two words of 768
    assert verdict.unsafe and verdict.named


def test_broken_numbers_count_as_unsafe() -> None:
    guard = tiny_guard(seed=1)
    guard.core.norm.weight.data.fill_(math.nan)
    verdict = guard.classify([ask("hello")])[0]
    assert verdict.unsafe and verdict.probability == 1.0 and verdict.mass == 0.0
    assert all(math.isfinite(score) for score in verdict.categories.values())


def test_a_confident_safe_answer_is_safe(guard: Guard) -> None:
    shares = [1 / 14] * 14
    verdict = guard.prompter.reading().verdict
    assert not verdict(0.1, 0.99, shares).unsafe
    assert verdict(0.1, 0.99, shares).text == "safe"
    assert verdict(0.6, 0.99, shares).unsafe
    assert verdict(0.1, 0.4, shares).unsafe


def test_an_unsafe_verdict_names_its_strongest_category() -> None:
    verdict = Verdict(True, 0.8, 1.0, {"S1": 0.5, "S2": 0.25, "S10": 0.05})
    assert verdict.named == ["S1", "S2"]
    assert verdict.text == "unsafe\nS1,S2"


def test_attention_goes_through_the_one_door(guard: Guard) -> None:
    import core_llm.layers

    assert core_llm.layers.attend is attend


def test_saved_and_loaded_guard_gives_the_same_verdict(tmp_path: Path) -> None:
    guard = tiny_guard(seed=2)
    for parameter in guard.core.parameters():  # checkpoints are bf16: start from values that it holds
        parameter.data = parameter.data.bfloat16().float()
    guard.save(tmp_path / "mine", card="a card")
    loaded = Guard.load(tmp_path / "mine")
    assert loaded.policy == guard.policy and loaded.name == "mine"
    assert loaded.classify([ask("hello")]) == guard.classify([ask("hello")])


def test_unknown_guard_lists_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match="known: nano"):
        Guard.load("no-such-guard")


def test_a_core_is_not_taken_for_a_guard(tmp_path: Path) -> None:
    from core_llm.checkpoint import save_core

    guard = tiny_guard()
    save_core(tmp_path / "core", guard.core, guard.tokenizer)
    with pytest.raises(CheckpointError, match="no guard here"):
        Guard.load(tmp_path / "core")


@pytest.mark.parametrize("damage", ["truncate", "settings", "no-window", "shape"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "guard"
    tiny_guard().save(folder)
    if damage == "truncate":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "settings":
        (folder / "guard.json").write_text("{")
    elif damage == "no-window":
        values = json.loads((folder / "guard.json").read_text())
        del values["window"]
        (folder / "guard.json").write_text(json.dumps(values))
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(CheckpointError):
        Guard.load(folder)


def test_an_empty_message_is_refused(guard: Guard) -> None:
    with pytest.raises(UserError, match="empty"):
        guard.classify([ask("hello"), ask("  ")])


def test_nothing_to_judge_gives_no_verdicts(guard: Guard) -> None:
    assert guard.classify([]) == []
