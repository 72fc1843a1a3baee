"""LoRA from outside: the base stays what it was, bit for bit, and the updates are the formula's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core_llm.checkpoint import core_hash, load_core, save_core
from core_llm.cli import lora_merge
from core_llm.config import LlamaConfig
from core_llm.errors import CheckpointError, UserError
from core_llm.lora import ALL_LINEAR, LoRA, LoRAConfig
from core_llm.model import Llama
from core_llm.testing import tiny_core
from core_llm.train.fit import FitConfig, fit

CONFIG = LlamaConfig(64, 2, 4, 2, 128, vocab_size=300, max_positions=64)
TOKENS = torch.arange(24).reshape(2, 12) * 7 % 300


def fresh(seed: int = 0) -> Llama:
    return Llama(CONFIG).initialise(seed).eval()


def learned(core: Llama, config: LoRAConfig) -> LoRA:
    """Updates as if they had been trained: B is not zero."""
    lora = LoRA(core, config, seed=1).eval()
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if name.endswith(".b"):
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    return lora


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ALL_LINEAR])
def test_fresh_updates_leave_logits_hash_and_keys_of_the_core_as_they_were(targets: tuple[str, ...]) -> None:
    core = fresh()
    logits, digest, keys = core(TOKENS), core_hash(core), list(core.state_dict())
    lora = LoRA(core, LoRAConfig(targets=targets))
    assert torch.equal(core(TOKENS), logits)
    assert core_hash(core) == digest and list(core.state_dict()) == keys
    assert len(list(lora.parameters())) == 2 * CONFIG.n_layers * len(targets)
    assert not any(p.requires_grad for p in core.parameters())
    assert all(p.requires_grad for p in lora.parameters())


def test_update_is_the_formula_of_the_paper_in_float64() -> None:
    """W x + (alpha / rank) B A x, as in the paper (and in peft)."""
    core = fresh()
    lora = learned(core, LoRAConfig(rank=4, alpha=6.0))
    linear = core.layers[1].self_attn.v_proj
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    a, b = (lora.get_parameter(f"layers.1.self_attn.v_proj.{name}").double() for name in "ab")
    expected = x.double() @ linear.weight.double().T + 6.0 / 4 * (x.double() @ a.T) @ b.T
    assert (linear(x) - expected).abs().max() < 1e-6
    assert (linear(x) - x @ linear.weight.T).abs().max() > 1e-2  # control: the update is not nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_core_equals_the_attached_one_and_unmerging_restores_every_bit(dtype: torch.dtype) -> None:
    core = fresh().to(dtype)
    bare = {name: tensor.clone() for name, tensor in core.state_dict().items()}
    lora = learned(core, LoRAConfig(rank=4, targets=ALL_LINEAR))
    attached = core(TOKENS)
    lora.merge()
    merged = core(TOKENS)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert (merged - attached).abs().max() <= tolerance * attached.abs().max()
    assert merged.dtype == dtype and lora.merged and core_hash(core) != core_hash(fresh())
    lora.merge()  # once is enough
    assert torch.equal(core(TOKENS), merged)
    lora.detach()
    assert all(torch.equal(tensor, bare[name]) for name, tensor in core.state_dict().items())
    assert not torch.equal(core(TOKENS), attached)
    lora.attach()
    assert torch.equal(core(TOKENS), attached)


def test_dropout_touches_the_update_alone_and_only_in_training() -> None:
    core = fresh()
    bare = core(TOKENS)
    lora = learned(core, LoRAConfig(dropout=0.5))
    assert torch.equal(core(TOKENS), core(TOKENS))
    lora.train()
    assert not torch.equal(core(TOKENS), core(TOKENS))
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if name.endswith(".b"):
                parameter.zero_()
    assert torch.equal(core(TOKENS), bare)


class Memorise:
    """Learn one sequence by heart through the updates."""

    name = "memorise"

    def __init__(self, core: Llama, lora: LoRA) -> None:
        self.core, self.lora = core, lora

    def modules(self) -> Mapping[str, nn.Module]:
        return {"lora": self.lora}

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.lora.parameters())}]

    def batch(self, step: int) -> Tensor:
        return TOKENS

    def loss(self, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        return F.cross_entropy(self.core(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten()), {}

    def evaluate(self) -> dict[str, float]:
        return {"loss": self.loss(TOKENS)[0].item()}


def test_training_moves_the_updates_and_nothing_of_the_core(tmp_path: Path) -> None:
    core = fresh()
    digest = core_hash(core)
    lora = LoRA(core, LoRAConfig(targets=ALL_LINEAR))
    task = Memorise(core, lora)
    before = task.evaluate()["loss"]
    after = fit(task, FitConfig(tmp_path, steps=25, lr=2e-2, warmup=2, autocast=False))["loss"]
    assert after < 0.5 * before
    assert core_hash(core) == digest and all(p.grad is None for p in core.parameters())
    state = torch.load(tmp_path / "memorise.state.pt", weights_only=True)["modules"]
    assert set(state) == {"lora"} and set(state["lora"]) == set(lora.state_dict())
    lora.detach()
    assert task.evaluate()["loss"] == pytest.approx(before, abs=0)


def test_adapter_file_holds_the_updates_alone_and_fits_one_core(tmp_path: Path) -> None:
    core = fresh()
    lora = learned(core, LoRAConfig(rank=2, targets=("q_proj", "down_proj")))
    lora.save(tmp_path / "lora")
    stored = load_file(tmp_path / "lora" / "model.safetensors")
    assert set(stored) == set(lora.state_dict()) and all("proj" in name for name in stored)
    other = fresh()
    again = LoRA.load(tmp_path / "lora", other)
    assert again.config == lora.config
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, lora.get_parameter(name).bfloat16().float())
    assert (other(TOKENS) - core(TOKENS)).abs().max() < 0.02 * core(TOKENS).abs().max()
    with pytest.raises(CheckpointError, match="trained on another core"):
        LoRA.load(tmp_path / "lora", fresh(seed=1))
    lora.merge()
    with pytest.raises(UserError, match="unmerge"):
        lora.save(tmp_path / "again")


def test_damaged_adapter_names_the_key_and_leaves_the_core_bare(tmp_path: Path) -> None:
    core = fresh()
    bare = core(TOKENS)
    lora = learned(core, LoRAConfig())
    lora.save(tmp_path / "lora")
    lora.detach()
    weights = tmp_path / "lora" / "model.safetensors"
    stored = load_file(weights)
    key = "layers.0.self_attn.q_proj.a"
    save_file({name: t for name, t in stored.items() if name != key}, weights)
    with pytest.raises(CheckpointError, match=f"missing: {key}"):
        LoRA.load(tmp_path / "lora", core)
    save_file({**stored, key: stored[key][:3].contiguous()}, weights)
    with pytest.raises(CheckpointError, match=key):
        LoRA.load(tmp_path / "lora", core)
    assert torch.equal(core(TOKENS), bare)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(UserError, match="unknown LoRA target 'lm_head'"):
        LoRAConfig(targets=("lm_head",))
    with pytest.raises(UserError, match="rank"):
        LoRAConfig(rank=0)
    with pytest.raises(UserError, match="no target"):
        LoRAConfig(targets=())


def test_command_writes_a_core_with_the_updates_inside(tmp_path: Path) -> None:
    core, tokenizer = tiny_core()
    save_core(tmp_path / "core", core, tokenizer)
    base, _ = load_core(tmp_path / "core")
    lora = learned(base, LoRAConfig(targets=ALL_LINEAR))
    lora.save(tmp_path / "lora")
    lora_merge(str(tmp_path / "core"), tmp_path / "lora", tmp_path / "out")
    merged, _ = load_core(tmp_path / "out")
    attached, bare = base(TOKENS), load_core(tmp_path / "core")[0](TOKENS)
    error = (merged(TOKENS) - attached).abs().max()
    assert error < 0.1 * (attached - bare).abs().max()
