"""Checkpoints: exact, strict, atomic, and readable by transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core_llm.checkpoint import core_hash, load_adapter, load_core, save_adapter, save_core
from core_llm.errors import CheckpointError
from core_llm.testing import tiny_core


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    core, tokenizer = tiny_core()
    save_core(tmp_path / "core", core, tokenizer, card="a card")
    return tmp_path / "core"


def test_saved_core_loads_with_the_same_hash_and_output(saved: Path) -> None:
    core, tokenizer = tiny_core()
    loaded, again = load_core(saved)
    assert core_hash(loaded) == core_hash(core)
    tokens = torch.tensor([again.encode("what color is the shape?")])
    rounded = {k: v.bfloat16().float() for k, v in core.state_dict().items()}
    core.load_state_dict(rounded)
    assert torch.equal(loaded(tokens), core(tokens))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_transformers_reads_the_saved_core(saved: Path) -> None:
    from transformers import LlamaForCausalLM

    loaded, _ = load_core(saved)
    peer = LlamaForCausalLM.from_pretrained(saved, dtype=torch.float32)
    tokens = torch.arange(1, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens), peer(tokens).logits, atol=1e-4, rtol=1e-4)


def test_missing_unknown_and_misshapen_keys_are_named(saved: Path) -> None:
    path = saved / "model.safetensors"
    good = load_file(path)
    for change, named in (
        (lambda t: t.pop("model.norm.weight"), "missing: model.norm.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "unknown: extra"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), r"norm.weight has shape \(3,\)"),
    ):
        tensors = dict(good)
        change(tensors)
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=named):
            load_core(saved)


def test_truncated_missing_and_foreign_files_are_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="truncated"):
        load_core(saved)
    path.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        load_core(saved)
    values = json.loads((saved / "config.json").read_text())
    for change, named in (
        ({"model_type": "gpt2"}, "gpt2"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
    ):
        (saved / "config.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(CheckpointError, match=named):
            load_core(saved)
    with pytest.raises(CheckpointError, match="known: nano"):
        load_core("no-such-model")


def test_adapter_file_fits_only_its_core_and_kind(tmp_path: Path) -> None:
    core, _ = tiny_core()
    save_adapter(tmp_path / "a", "vision_adapter", {"width": 3}, {"w": torch.ones(2)}, core)
    config, tensors = load_adapter(tmp_path / "a", "vision_adapter", core)
    assert config == {"width": 3} and torch.equal(tensors["w"], torch.ones(2))
    with pytest.raises(CheckpointError, match="not a speech_adapter"):
        load_adapter(tmp_path / "a", "speech_adapter", core)
    with pytest.raises(CheckpointError, match="another core"):
        load_adapter(tmp_path / "a", "vision_adapter", tiny_core(seed=1)[0])


def test_failed_write_leaves_the_old_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core, tokenizer = tiny_core(seed=5)
    before = (saved / "model.safetensors").read_bytes()

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_core(saved, core, tokenizer)
    assert (saved / "model.safetensors").read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["core"]
