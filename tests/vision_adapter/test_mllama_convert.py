"""`vision-adapter convert`: between the layouts, into core and adapter and back; what it refuses."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as Pillow
from safetensors.torch import load_file
from torch import Tensor

from core_llm.adapters import Assistant
from core_llm.chat import Image, Message, Text
from core_llm.checkpoint import core_hash, load_core, save_core
from core_llm.errors import CheckpointError, UserError
from core_llm.model import Llama
from core_llm.testing import tiny_core
from core_llm.tokenizer import Tokenizer
from vision_adapter import cli, mllama_checkpoint
from vision_adapter.adapter import load
from vision_adapter.mllama_adapter import MllamaAdapter
from vision_adapter.mllama_config import MllamaConfig, preset
from vision_adapter.mllama_convert import convert_checkpoint
from vision_adapter.mllama_keys import count, entries, to_table

CONFIG = MllamaConfig(
    image_size=28, dim=32, n_layers=2, n_global_layers=1, n_heads=4, ffn_dim=64, intermediate_layers=(1,),
    cross_layers=(0, 1),
)  # fmt: skip
Family = tuple[Llama, Tokenizer, MllamaAdapter]


@pytest.fixture(scope="module")
def family() -> Family:
    """With open gates, tables that both layouts can express, and values that bf16 can."""
    core, tokenizer = tiny_core()
    torch.manual_seed(0)
    adapter = MllamaAdapter(CONFIG, core.config)
    for name, parameter in adapter.named_parameters():
        if parameter.dim() == 0:
            parameter.data.fill_(0.7)
        elif "tile_embedding" in name or "tile_positional_embedding" in name:
            width = parameter.shape[1] // (4 * CONFIG.dim)
            parameter.data.copy_(to_table(torch.randn(4, 4, width, CONFIG.dim), 4))
    for parameter in (*core.parameters(), *adapter.parameters()):
        parameter.data = parameter.data.to(torch.bfloat16).float()
    return core, tokenizer, adapter.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def fused(family: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in both layouts, each with the companions of a hub repository."""
    root, found = tmp_path_factory.mktemp("fused"), {}
    core, tokenizer, adapter = family
    for layout in ("hf", "original"):
        found[layout] = root / layout
        mllama_checkpoint.save_fused(root / layout, core, adapter, layout)  # type: ignore[arg-type]
        tokenizer.save(root / layout / "tokenizer.json")
        (root / layout / "LICENSE.txt").write_text("the licence")
    (root / "hf" / "generation_config.json").write_text("{}")
    return found


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {f"{path.relative_to(folder)} {key}": value for key, value in load_file(path).items()}
    for path in sorted(folder.rglob("*.pth")):
        found |= {f"{path.name} {k}": v for k, v in torch.load(path, weights_only=True).items()}
    return found


def same(one: Path, other: Path) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def answers(core: Llama, tokenizer: Tokenizer, adapter: Any) -> list[Tensor]:
    pictures = [Pillow.new("RGB", size, colour) for size, colour in (((60, 30), "red"), ((28, 28), "blue"))]
    conversations = [
        [Message("user", [Image(pictures[0]), Text("what?")])],
        [Message("user", [Text("no picture")])],
        [Message("user", [Image(pictures[0]), Text("and"), Image(pictures[1]), Text("so?")])],
    ]
    with torch.inference_mode():
        return Assistant(core, tokenizer, [adapter]).logits(conversations)


@pytest.mark.parametrize("layout", ["hf", "original"])
@pytest.mark.parametrize("source", ["hf", "original"])
def test_both_layouts_become_each_other_bit_by_bit(
    source: str, layout: str, fused: dict[str, Path], tmp_path: Path
) -> None:
    cli.cli_models.convert(str(fused[source]), tmp_path / "out", layout)  # type: ignore[arg-type]
    assert same(tmp_path / "out", fused[layout])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"LICENSE.txt", "tokenizer.json"} <= names
    assert ("generation_config.json" in names) == (source == layout == "hf")
    name = "config.json" if layout == "hf" else "params.json"
    assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((fused[layout] / name).read_text())


def test_shards_and_dtype_are_as_asked(fused: dict[str, Path], tmp_path: Path) -> None:
    convert_checkpoint(fused["hf"], tmp_path / "two", "original", n_shards=2, progress=False)
    assert len(list((tmp_path / "two").glob("consolidated.*.pth"))) == 2
    convert_checkpoint(
        tmp_path / "two", tmp_path / "small", "hf", torch.float32, max_shard_size="400KB", progress=False
    )
    assert len(list((tmp_path / "small").glob("model-*.safetensors"))) > 2
    convert_checkpoint(tmp_path / "small", tmp_path / "one", "hf", torch.bfloat16, progress=False)
    assert same(tmp_path / "one", fused["hf"])


@pytest.mark.parametrize("source", ["hf", "original"])
def test_a_split_checkpoint_answers_as_the_fused_one_and_joins_again(
    source: str, family: Family, fused: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "model"
    convert_checkpoint(fused[source], out, "adapter", progress=False)
    core, tokenizer = load_core(out / "core")  # an ordinary core, for every other command
    adapter = load(out / "vision_adapter", core)
    assert isinstance(adapter, MllamaAdapter) and adapter.config == CONFIG
    assert core_hash(core) == core_hash(mllama_checkpoint.load_fused(fused[source], "auto")[0])
    for ours, theirs in zip(answers(core, tokenizer, adapter), answers(*family), strict=True):
        assert torch.equal(ours, theirs)
    for layout in ("hf", "original"):
        convert_checkpoint(out, tmp_path / layout, layout, progress=False)  # type: ignore[arg-type]
        assert same(tmp_path / layout, fused[layout])
    assert (out / "core" / "LICENSE.txt").is_file()


def test_an_adapter_beside_a_tied_core_becomes_one_checkpoint(
    family: Family, fused: dict[str, Path], tmp_path: Path
) -> None:
    core, tokenizer, adapter = family
    assert core.config.tied_embeddings
    save_core(tmp_path / "m" / "core", core, tokenizer)
    adapter.save(tmp_path / "m" / "vision_adapter", core)
    convert_checkpoint(tmp_path / "m", tmp_path / "out", dtype=torch.bfloat16)
    assert same(tmp_path / "out", fused["hf"])


def test_a_split_model_answers_on_the_command_line(
    fused: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert_checkpoint(fused["hf"], tmp_path / "m", "adapter", progress=False)
    Pillow.new("RGB", (50, 20), "green").save(tmp_path / "p.png")
    parts = (str(tmp_path / "m" / "core"), str(tmp_path / "m" / "vision_adapter"))
    cli.answer(tmp_path / "p.png", "what is it?", *parts, max_new_tokens=3)
    said = capsys.readouterr().out.strip()
    cli.explain(tmp_path / "p.png", "what is it?", tmp_path / "o.png", *parts, max_new_tokens=3)
    assert said in capsys.readouterr().out and (tmp_path / "o.png").is_file()
    from evals.models import load_assistant

    assert isinstance(load_assistant(tmp_path / "m").adapters[0], MllamaAdapter)


def test_an_image_token_numbered_behind_the_vocabulary_is_a_marker_only(
    family: Family, fused: dict[str, Path], tmp_path: Path
) -> None:
    core, tokenizer, adapter = family
    values = json.loads((fused["hf"] / "tokenizer.json").read_text())
    for token in values["added_tokens"]:
        if token["content"] == "<|image|>":
            token["content"] = "<|reserved_special_token_3000|>"
    known = values["added_tokens"][0]
    values["added_tokens"].append({**known, "content": "<|image|>", "id": tokenizer.vocab_size})
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))  # as the hub's files number it
    theirs = Tokenizer.load(tmp_path)
    assert theirs.special("<|image|>") == core.config.vocab_size
    for ours, other in zip(answers(core, tokenizer, adapter), answers(core, theirs, adapter), strict=True):
        assert torch.equal(ours, other)


def refused(source: Path, out: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one line that the command says; nothing may be written."""
    before = sorted(out.parent.iterdir())
    sys.argv = ["vision-adapter", "convert", str(source), "--out", str(out), *flags]
    with pytest.raises(SystemExit) as caught:
        cli.main()
    said = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and len(said) == 1 and sorted(out.parent.iterdir()) == before
    return said[0]


def test_mistakes_are_one_line_and_leave_nothing(
    family: Family,
    fused: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    work = tmp_path / "work"
    work.mkdir()
    out = work / "out"
    core, _, adapter = family

    def broken(name: str, layout: str, **sizes: Any) -> Path:
        mllama_checkpoint.save_fused(tmp_path / name, core, adapter, layout, **sizes)  # type: ignore[arg-type]
        return tmp_path / name

    shards = broken("shards", "hf", max_shard_size="300KB")
    sorted(shards.glob("model-*"))[1].unlink()
    assert "should be in model-00002-of" in refused(shards, out, capsys)
    files = broken("files", "original", n_shards=2)
    (files / "consolidated.00.pth").unlink()
    assert "consolidated.00.pth: no such file" in refused(files, out, capsys, "--layout", "adapter")
    last = broken("last", "original", n_shards=2)
    (last / "consolidated.01.pth").unlink()
    assert "if a file is missing behind consolidated.00.pth, fetch it" in refused(last, out, capsys)
    mixed = broken("mixed", "hf")
    (mixed / "params.json").write_text("{}")
    assert "both layouts side by side (config.json and params.json)" in refused(mixed, out, capsys)
    other = broken("other", "original")
    (other / "config.json").write_text("{}")
    assert "config.json is of one layout and params.json of the other" in refused(other, out, capsys)
    cut = broken("cut", "hf")
    with open(cut / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    assert "model.safetensors: truncated" in refused(cut, out, capsys)
    convert_checkpoint(fused["hf"], tmp_path / "m", "adapter", progress=False)
    assert "model_type is 'llama', expected 'mllama'" in refused(tmp_path / "m" / "core", out, capsys)
    assert "is split into core and adapter already" in refused(
        tmp_path / "m", out, capsys, "--layout", "adapter"
    )
    bare = broken("bare", "hf")  # a core needs its tokenizer
    assert "neither tokenizer.json nor tokenizer.model" in refused(bare, out, capsys, "--layout", "adapter")
    full = work / "full"
    full.mkdir()
    (full / "mine").write_text("kept")
    assert "is not empty" in refused(fused["hf"], full, capsys)
    assert "source and target are the same" in refused(
        fused["hf"], fused["hf"], capsys, "--overwrite", "True"
    )
    assert "cannot cut n_kv_heads 2 into 4 shards" in refused(
        fused["hf"], out, capsys, "--layout", "original", "--shards", "4"
    )


def test_a_hub_id_out_of_reach_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = refused(Path("no-such-org/Llama-3.2-11B-Vision"), tmp_path / "out", capsys)
    assert said.startswith("error: no-such-org/Llama-3.2-11B-Vision: ") and "hub" in said


def test_a_failed_split_leaves_the_target_as_it_was(
    fused: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "m"
    convert_checkpoint(fused["hf"], out, "adapter", progress=False)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def fails(*_: Any, **__: Any) -> None:
        raise CheckpointError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(MllamaAdapter, "save", fails)
        with pytest.raises(CheckpointError, match="the disk is full"):
            convert_checkpoint(fused["original"], out, "adapter", overwrite=True, progress=False)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == [out]
    (out / "notes.txt").write_text("kept")
    convert_checkpoint(fused["original"], out, "adapter", overwrite=True, progress=False)
    core, _ = load_core(out / "core")
    load(out / "vision_adapter", core)
    assert (out / "notes.txt").is_file() and list(tmp_path.iterdir()) == [out]


def test_a_split_adapter_refuses_another_core(fused: dict[str, Path], tmp_path: Path) -> None:
    convert_checkpoint(fused["hf"], tmp_path / "m", "adapter", progress=False)
    with pytest.raises(CheckpointError, match="this mllama was trained on another core") as caught:
        load(tmp_path / "m" / "vision_adapter", tiny_core(seed=3)[0])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="nano has no fused checkpoint"):
        convert_checkpoint("nano", tmp_path / "n")


@pytest.mark.parametrize("size", ["11b", "90b"])
def test_released_sizes_count_as_transformers_counts_them(size: str) -> None:
    from transformers import MllamaConfig as TheirConfig
    from transformers import MllamaForConditionalGeneration

    text = {
        "11b": {"hidden_size": 4096, "num_hidden_layers": 40, "num_attention_heads": 32,
                "intermediate_size": 14336, "cross_attention_layers": [*range(3, 40, 5)]},
        "90b": {"hidden_size": 8192, "num_hidden_layers": 100, "num_attention_heads": 64,
                "intermediate_size": 28672, "cross_attention_layers": [*range(3, 100, 5)]},
    }[size]  # fmt: skip
    vision = {
        "hidden_size": 1280, "num_hidden_layers": 32, "num_global_layers": 8, "attention_heads": 16,
        "intermediate_size": 5120, "image_size": 560, "patch_size": 14, "max_num_tiles": 4,
        "vision_output_dim": 7680, "intermediate_layers_indices": [3, 7, 15, 23, 30],
    }  # fmt: skip
    text |= {"vocab_size": 128256, "num_key_value_heads": 8, "tie_word_embeddings": False}
    with torch.device("meta"):
        theirs = MllamaForConditionalGeneration(TheirConfig(vision_config=vision, text_config=text))
    expected = sum(parameter.numel() for parameter in theirs.parameters())
    assert count(entries(*preset(size)))["total"] == expected
    assert expected == {"11b": 10_670_220_835, "90b": 88_593_355_323}[size]


def test_a_core_of_another_shape_is_named(family: Family, tmp_path: Path) -> None:
    core, _, adapter = family
    mllama_checkpoint.save_fused(tmp_path / "m", core, adapter)
    values = json.loads((tmp_path / "m" / "config.json").read_text())
    values["text_config"]["intermediate_size"] = 64
    (tmp_path / "m" / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"mlp.*weight has shape .*the model needs"):
        convert_checkpoint(tmp_path / "m", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
