import copy
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core_llm.chat import Message
from core_llm.errors import CheckpointError, UserError
from core_llm.lora import LoRA, LoRAConfig
from core_llm.quantized_embedding import QuantizedEmbedding
from core_llm.quantized_linear import Int4Linear, Int8Linear
from core_llm.train.fit import FitConfig
from guard import stored
from guard.batches import Batch, collate, encode, encode_forced
from guard.compress import Compression, Stage, compress, report
from guard.distillation import Distillation, distillation_loss, read_logits, with_opinions
from guard.examples import Example
from guard.fake_quantisation import rounded_weights
from guard.guard import Guard
from guard.head import VerdictHead, cut_head
from guard.policy import Policy
from guard.pruning import important_layers, neuron_importance, prune
from guard.tasks import Recipe
from guard.train import fine_tune


def make(n: int) -> list[Example]:
    """Conversations whose answer is unsafe where it holds "red"."""
    rng = random.Random(0)
    found = []
    for i in range(n):
        words = [rng.choice(["two", "three", "circle", "left"]) for _ in range(4)]
        words.insert(rng.randrange(5), "blue" if i % 2 else "red")
        messages = (Message("user", f"question {i}"), Message("assistant", " ".join(words)))
        found.append(Example(messages, i % 2 == 0, float(i % 2 == 0), None if i % 2 else "S10"))
    return found


DATA = make(48)
RULES = Policy({"S1": "Violence", "S10": "Hate"}, window=32, context=32)


def copied(guard: Guard) -> Guard:
    return Guard(copy.deepcopy(guard.core), guard.tokenizer, guard.policy)


def batches(guard: Guard, rows: list[Example]) -> list[Batch]:
    return [collate([encode_forced(e, guard.tokenizer, guard.policy) for e in rows], guard.tokenizer.pad_id)]


def probabilities(guard: Guard) -> list[float]:
    return [v.probability for v in guard.classify([e.messages for e in DATA])]


def test_a_cut_head_gives_the_same_verdict_and_all_mass(guard: Guard, tmp_path: Path) -> None:
    small = copied(guard)
    kept = cut_head(small.core, guard.tokenizer, list(guard.policy.categories))
    assert 10 < kept < 40
    assert probabilities(small) == pytest.approx(probabilities(guard), abs=1e-6)
    before, after = (g.classify([DATA[0].messages])[0] for g in (guard, small))
    assert after.categories == pytest.approx(before.categories, abs=1e-6)
    assert after.mass > before.mass
    small.save(tmp_path / "g")
    guard.save(tmp_path / "whole")
    loaded = Guard.load(tmp_path / "g")
    assert isinstance(loaded.core.lm_head, VerdictHead)
    # Both were rounded to bf16 when they were saved, and alike.
    whole = probabilities(Guard.load(tmp_path / "whole"))
    assert probabilities(loaded) == pytest.approx(whole, abs=1e-6)
    with pytest.raises(UserError, match="cut to the verdict's tokens already"):
        cut_head(small.core, guard.tokenizer, ["S1"])
    guard.save(tmp_path / "g")  # a whole guard over a cut one
    assert not isinstance(Guard.load(tmp_path / "g").core.lm_head, VerdictHead)


def test_damaged_heads_are_refused(guard: Guard, tmp_path: Path) -> None:
    small = copied(guard)
    cut_head(small.core, guard.tokenizer, ["S1"])
    small.save(tmp_path)
    path = tmp_path / stored.HEAD
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"head\.safetensors"):
        Guard.load(tmp_path)


def test_a_layer_that_does_nothing_goes_first(guard: Guard) -> None:
    core = copy.deepcopy(guard.core)
    torch.nn.init.zeros_(core.layers[0].self_attn.o_proj.weight)
    torch.nn.init.zeros_(core.layers[0].mlp.down_proj.weight)
    data = batches(guard, DATA[:8])
    expected = core.hidden(data[0].tokens)
    assert important_layers(core, data, guard.tokens, 1) == [1]
    assert len(core.layers) == 2  # as it was
    shape = prune(core, data, guard.tokens, 1, None)
    assert shape.layers == (1,) and core.config.n_layers == 1
    torch.testing.assert_close(core.hidden(data[0].tokens), expected)


def test_neurons_that_add_nothing_go_first_and_padding_does_not_count(guard: Guard) -> None:
    core = copy.deepcopy(guard.core)
    dead = torch.arange(0, 128, 2)
    for block in core.layers:
        block.mlp.down_proj.weight.data[:, dead] = 0
    data = batches(guard, DATA[:8])
    expected = core.hidden(data[0].tokens)
    first = neuron_importance(core, data)[0]
    alone = neuron_importance(core, [b for e in DATA[:8] for b in batches(guard, [e])])[0]
    torch.testing.assert_close(first, alone)
    assert torch.equal(first[dead], torch.zeros(64))
    prune(core, data, guard.tokens, None, 64)
    assert core.config.ffn_dim == 64 and core.layers[0].mlp.gate_proj.weight.shape == (64, 64)
    torch.testing.assert_close(core.hidden(data[0].tokens), expected)


@pytest.mark.parametrize(("layers", "ffn"), [(0, None), (3, None), (None, 0), (None, 129)])
def test_shapes_that_the_guard_does_not_have_are_refused(
    guard: Guard, layers: int | None, ffn: int | None
) -> None:
    with pytest.raises(UserError, match="must be between 1 and"):
        prune(copy.deepcopy(guard.core), [], guard.tokens, layers, ffn)


def test_distillation_is_zero_gradient_at_the_teacher_and_its_loss_is_the_cross_entropy(guard: Guard) -> None:
    heat = 3.0
    pair = torch.tensor([[-0.2, -1.9], [-2.0, -0.3]], requires_grad=True)
    names = torch.tensor([[0.5, 1.5], [2.0, float("-inf")]], requires_grad=True)
    p = pair.detach().softmax(-1)[:, 1]
    opinions = p[:, None] * names.detach().softmax(-1)
    batch = Batch(*(torch.zeros(2),) * 3, p, torch.tensor([[3, 4], [3, -1]]), opinions)
    verdict, named = distillation_loss(pair, names, batch, Distillation(heat))
    soft = (pair.detach() / heat).softmax(-1).double()
    entropy = -(soft * soft.log()).sum(-1).mean() * heat**2
    assert verdict.item() == pytest.approx(entropy.item(), rel=1e-5)
    (verdict + named).backward()
    assert pair.grad is not None and pair.grad.abs().max() < 1e-6
    assert names.grad is not None and names.grad.nan_to_num().abs().max() < 1e-6
    with pytest.raises(UserError, match="temperature"):
        Distillation(0)


def test_opinions_are_the_teachers_verdicts_and_are_asked_once(guard: Guard, tmp_path: Path) -> None:
    cache = tmp_path / "state" / "opinions.jsonl"
    taught = with_opinions(guard, DATA, cache)
    for example, verdict in zip(taught, guard.classify([e.messages for e in DATA]), strict=True):
        assert example.target == pytest.approx(verdict.probability, abs=1e-6)
        assert example.opinion == pytest.approx(verdict.categories)
    row = encode_forced(taught[0], guard.tokenizer, guard.policy)
    data = collate([row], guard.tokenizer.pad_id)
    logp, names = read_logits(guard.core, data, guard.core.hidden(data.tokens))
    pair = logp[0, [guard.tokens.safe, guard.tokens.unsafe]].softmax(-1)
    assert pair[1].item() == pytest.approx(taught[0].target, abs=1e-6)
    shares = torch.tensor(row.opinion) / sum(row.opinion)
    torch.testing.assert_close(names[0].softmax(-1), shares, atol=1e-6, rtol=1e-4)
    assert "question" not in cache.read_text()
    with cache.open("a") as file:
        file.write('["half a li')  # killed while writing
    asked = copied(guard)
    asked.classify = lambda *_: pytest.fail("asked again")  # type: ignore[method-assign, assignment]
    assert with_opinions(asked, DATA, cache) == taught


def test_rounded_weights_are_those_of_the_quantised_guard(guard: Guard) -> None:
    from core_llm.quantize import quantize

    small = copied(guard)
    cut_head(small.core, guard.tokenizer, list(guard.policy.categories))
    small.core.requires_grad_(True)
    plain = {name: p.clone() for name, p in small.core.named_parameters()}
    tokens = batches(guard, DATA[:4])[0].tokens
    with rounded_weights(small.core, "int4"):
        rounded = small.core.hidden(tokens)
        rounded.sum().backward()
        parameters = dict(small.core.named_parameters())
        assert all(p.grad is not None for n, p in parameters.items() if "original" in n)
    assert all(torch.equal(p, plain[name]) for name, p in small.core.named_parameters())
    quantize(small.core, "int4", embedding=True)
    torch.testing.assert_close(rounded, small.core.hidden(tokens), atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize(("scheme", "aware"), [("int8", False), ("int4", True)])
def test_a_compressed_guard_heals_and_is_loaded_as_it_was(
    guard: Guard, tmp_path: Path, scheme: str, aware: bool
) -> None:
    # A random guard puts little mass on its verdicts: to raise that would be most of what is learnt.
    soft = Distillation(temperature=1.0, categories=0.1, mass=0.0)
    settings = Compression(1, 64, True, scheme, aware, 16, 16, 0.5, distillation=soft)
    config = FitConfig(tmp_path / "out" / "state", 40, lr=2e-3, warmup=5, weight_decay=0.0)
    small, stages = compress(guard, [(DATA, None)], {"own": DATA}, config, settings)
    assert [stage.name for stage in stages] == ["full", "pruned", "healed", scheme]
    assert stages[0].bytes > stages[1].bytes == stages[2].bytes > stages[3].bytes
    table = report(stages)
    assert table.count("\n") == 6 and f"| {scheme} |" in table
    full = probabilities(guard)
    bare = replace(settings, aware=False)
    unhealed, without = compress(guard, [(DATA, None)], {}, FitConfig(tmp_path / "no", 0), bare)
    assert [stage.name for stage in without] == ["full", "pruned", scheme]
    assert math.dist(full, probabilities(small)) < 0.8 * math.dist(full, probabilities(unhealed))
    small.save(tmp_path / "out")
    loaded = Guard.load(tmp_path / "out")
    assert probabilities(loaded) == pytest.approx(probabilities(small), abs=1e-2)
    assert isinstance(loaded.core.embed_tokens, QuantizedEmbedding)
    kind = Int8Linear if scheme == "int8" else Int4Linear
    assert isinstance(loaded.core.layers[0].mlp.up_proj, kind)
    with pytest.raises(UserError, match="quantised"):
        compress(loaded, [(DATA, None)], {}, config, Compression(1, 64))


def test_reports_and_settings_are_checked() -> None:
    assert "| full | 1.50 | 0.700 |" in report([Stage("full", 1_500_000, {"auprc_x": 0.7})])
    with pytest.raises(UserError, match="--qat"):
        Compression(aware=True)
    with pytest.raises(UserError, match="unknown quantisation 'fp8'"):
        Compression(scheme="fp8")


def test_low_rank_updates_learn_merge_and_stay_apart(guard: Guard, tmp_path: Path) -> None:
    guard.save(tmp_path / "core")
    core = copy.deepcopy(Guard.load(tmp_path / "core").core)
    before = {name: p.clone() for name, p in core.named_parameters()}
    lora = LoRA(core, LoRAConfig(4, 8.0, targets=("q_proj", "v_proj", "down_proj")))
    recipe = Recipe.for_rules(batch=16, average_decay=0.5)
    config = FitConfig(tmp_path / "state", 10, lr=1e-2, warmup=2)
    trained, _ = fine_tune(core, guard.tokenizer, [(DATA, None)], {}, config, recipe, RULES, lora)
    assert all(torch.equal(p, before[name]) for name, p in core.named_parameters())
    after = probabilities(trained)
    untrained = probabilities(Guard(guard.core, guard.tokenizer, RULES))
    assert max(abs(a - b) for a, b in zip(after, untrained, strict=True)) > 0.05
    stored.save_apart(tmp_path / "apart", lora, "../core", guard.tokenizer, trained.prompter.settings())
    apart = Guard.load(tmp_path / "apart")
    assert probabilities(apart) == pytest.approx(after, abs=1e-2)
    with pytest.raises(UserError, match="keeps its updates apart"):
        compress(apart, [(DATA, None)], {}, config, Compression(1))
    lora.merge()
    merged = Guard(core, guard.tokenizer, RULES)
    assert probabilities(merged) == pytest.approx(after, abs=1e-4)


def test_a_guard_of_rules_answers_whole_and_learns_nothing_of_the_prompt(guard: Guard) -> None:
    example = Example(DATA[0].messages, True, 1.0, "S10", ("S1",))
    row = encode(example, guard.tokenizer, RULES)
    assert guard.tokenizer.decode(row.ids[row.n_prompt :]) == "unsafe\nS10,S1"
    assert row.ids[-1] == guard.tokenizer.eot_id
    recipe = Recipe.for_rules()
    assert recipe.language_steps == recipe.prefix_weight == recipe.language_weight == 0
    assert recipe.augmentation is not None
