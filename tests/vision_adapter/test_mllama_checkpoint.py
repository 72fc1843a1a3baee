"""Fused checkpoints: read strictly, split, and written back bit by bit, in both released layouts."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from core_llm.checkpoint import core_hash, open_weights, read_core, save_core
from core_llm.config import LlamaConfig, RopeScaling
from core_llm.errors import CheckpointError
from core_llm.model import Llama
from core_llm.stored import skeleton
from core_llm.testing import tiny_core
from vision_adapter import mllama_checkpoint as checkpoint
from vision_adapter.mllama_adapter import MllamaAdapter
from vision_adapter.mllama_config import (
    MllamaConfig,
    from_hf,
    from_params,
    fused_indices,
    fusion_schedule,
    preset,
    tile_grids,
    to_hf,
    to_params,
)
from vision_adapter.mllama_keys import OURS, count, entries, modern, old, to_table

CORE = LlamaConfig(64, 4, 4, 2, 128, vocab_size=384, rope_scaling=RopeScaling(8.0))
CONFIG = MllamaConfig(
    image_size=28, dim=32, n_layers=4, n_global_layers=2, n_heads=4, ffn_dim=128,
    intermediate_layers=(1, 3), cross_layers=(1, 3),
)  # fmt: skip
Part = tuple[Llama, MllamaAdapter]


@pytest.fixture(scope="module")
def family() -> Part:
    """Core and adapter in bf16; tables with one vector per place, as in the released files."""
    torch.manual_seed(0)
    core = Llama(CORE).initialise(0).to(torch.bfloat16).eval()
    adapter = MllamaAdapter(CONFIG, CORE).to(torch.bfloat16).eval()
    for name, parameter in adapter.named_parameters():
        if parameter.dim() < 2:
            torch.nn.init.normal_(parameter)
        elif "tile_embedding" in name or "tile_positional_embedding" in name:
            width = parameter.shape[1] // (4 * CONFIG.dim)
            grid = torch.randn(4, 4, width, CONFIG.dim, dtype=torch.bfloat16)
            parameter.data.copy_(to_table(grid, 4))
    return core.requires_grad_(False), adapter.requires_grad_(False)


@pytest.fixture(scope="module", params=["hf", "original"])
def written(request: Any, family: Part, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp(request.param) / "fused"
    checkpoint.save_fused(folder, *family, layout=request.param)
    yield folder


def weights_of(core: torch.nn.Module, adapter: torch.nn.Module) -> dict[str, Tensor]:
    named: dict[str, Tensor] = dict(core.named_parameters())
    return named | {OURS + name: parameter for name, parameter in adapter.named_parameters()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_parameters_count_as_the_released_models() -> None:
    config, core = preset("11b")
    counts = count(entries(config, core))
    assert counts["total"] == 10_670_220_835
    assert round(counts["encoder"] / 1e6, 1) == 863.6 and round(counts["projector"] / 1e6, 1) == 31.5
    assert counts["cross_attention"] == 8 * 218_112_258 and counts["token_rows"] == 8 * 4096
    assert counts["core"] == sum(p.numel() for p in skeleton(core).parameters())
    assert round(count(entries(*preset("90b")))["total"] / 1e9, 1) == 88.6


def test_schedules_are_those_of_the_released_models() -> None:
    assert fusion_schedule(32, 8) == tuple(range(3, 32, 4))
    assert fused_indices(32, fusion_schedule(32, 8))[1] == list(range(3, 40, 5))
    assert fused_indices(80, fusion_schedule(80, 20))[1] == list(range(3, 100, 5))
    assert fusion_schedule(6, 2) == (2, 5) and fusion_schedule(5, 2) == (1, 4)
    assert fused_indices(4, (0, 3)) == ([1, 2, 3, 5], [0, 4])
    with pytest.raises(CheckpointError, match="do not fit a core of 4 layers"):
        fusion_schedule(4, 5)


def test_grids_have_the_ids_of_the_released_models() -> None:
    assert tile_grids(4) == ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))


def test_configurations_survive_both_layouts() -> None:
    for config, core in (preset("11b"), preset("90b"), (CONFIG, CORE), (replace(CONFIG, token_rows=4), CORE)):
        params = json.loads(json.dumps(to_params(config, core)))
        assert from_params(params, Path("params.json")) == (config, core)
        if config.token_rows == 8:
            assert from_hf(json.loads(json.dumps(to_hf(config, core))), Path("config.json")) == (config, core)
    released = to_params(*preset("11b"))
    assert {key for key in released if key.startswith("vision_")} == {
        "vision_chunk_size", "vision_max_num_chunks", "vision_num_cross_attention_layers"
    }  # fmt: skip


def test_a_fused_checkpoint_is_split_and_comes_back_bit_by_bit(written: Path, family: Part) -> None:
    weights = checkpoint.open_fused(written)
    assert checkpoint.is_fused(written)
    core, adapter = read_core(weights), checkpoint.read_adapter(weights)
    assert adapter.config == CONFIG and core.config == CORE
    assert same(weights_of(core, adapter), weights_of(*family))
    assert core_hash(core) == core_hash(family[0])
    assert not any(p.requires_grad for p in (*core.parameters(), *adapter.parameters()))
    in_fp32 = checkpoint.read_adapter(weights, torch.float32)
    assert same(weights_of(core, in_fp32), weights_of(core, adapter.float()))


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_layouts_convert_into_each_other_bit_by_bit(
    written: Path, family: Part, layout: checkpoint.Layout, tmp_path: Path
) -> None:
    weights = checkpoint.open_fused(written)
    checkpoint.write_fused(
        tmp_path / "out",
        weights.vision,
        weights.config,
        lambda name: weights.read(name, torch.bfloat16),
        layout,
    )
    direct = tmp_path / "direct"
    checkpoint.save_fused(direct, *family, layout=layout)
    files = sorted(path.name for path in direct.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "out").iterdir())
    one, other = (_raw(folder) for folder in (tmp_path / "out", direct))
    assert same(one, other)
    for name in ("config.json", "params.json"):
        if name in files:
            assert (direct / name).read_text() == (tmp_path / "out" / name).read_text()


def _raw(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    for path in sorted(folder.glob("*.pth")):
        loaded = torch.load(path, weights_only=True)
        tensors |= {f"{path.name} {key}": value for key, value in loaded.items()}
    return tensors


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_shards_hold_the_same_model(family: Part, layout: checkpoint.Layout, tmp_path: Path) -> None:
    checkpoint.save_fused(tmp_path / "m", *family, layout=layout, max_shard_size="300KB", n_shards=2)
    assert len(list((tmp_path / "m").glob("*.safetensors" if layout == "hf" else "*.pth"))) >= 2
    weights = checkpoint.open_fused(tmp_path / "m")
    assert same(weights_of(read_core(weights), checkpoint.read_adapter(weights)), weights_of(*family))


def test_original_names_and_forms_are_the_released_ones(family: Part, tmp_path: Path) -> None:
    checkpoint.save_fused(tmp_path / "m", *family, layout="original")
    stored = torch.load(tmp_path / "m" / "consolidated.00.pth", weights_only=True)
    core, adapter = family
    named = dict(adapter.named_parameters())
    assert torch.equal(stored["text_model.learnable_embedding.weight"], adapter.token_rows)
    assert torch.equal(stored["text_model.tok_embeddings.weight"], core.embed_tokens.weight)
    vision = "vision_model.vision_encoder."
    assert torch.equal(
        stored[f"{vision}conv1._linear.weight"], named["encoder.patch_embedding.weight"].flatten(1)
    )
    assert stored[f"{vision}pre_tile_pos_embed.embedding"].shape == (4, 4, 1, 32)
    places = stored[f"{vision}gated_positional_embedding"]
    assert places.shape == (4, 4, 5, 32)
    table = named["encoder.gated_positional_embedding.tile_embedding.weight"].unflatten(1, (4, 5, 32))
    assert torch.equal(places[1, 0], table[6, 2]) and torch.equal(
        places[0, 1], table[4, 1]
    )  # grid (2, 2), (1, 4)
    cross = "text_model.cross_attention_layers.1."
    assert torch.equal(stored[f"{cross}attention.wq.weight"], named["cross_attention.3.q_proj.weight"])
    assert stored[f"{cross}gate_ffwd"].shape == (1,)
    rotary = stored["text_model.layers.1.attention.wq.weight"]
    ours = core.get_parameter("layers.1.self_attn.q_proj.weight")
    assert torch.equal(rotary[1], ours[8]) and torch.equal(
        rotary[2], ours[1]
    )  # pairs of a head of 16 channels
    assert f"{vision}global_transformer.resblocks.1.gate_ffn" in stored
    assert f"{vision}transformer.resblocks.3.mlp.c_proj.bias" in stored
    assert "vision_model.vision_projection.bias" in stored and "text_model.output.weight" in stored


def test_what_the_original_layout_cannot_express_is_an_error(family: Part, tmp_path: Path) -> None:
    core, adapter = family
    table = adapter.encoder.pre_tile_positional_embedding.embedding.weight
    before = table.detach().clone()
    table.data[6, 0] += 1  # the first tile of (2, 2) no longer has the vector that it has in (1, 1)
    try:
        with pytest.raises(CheckpointError, match="pre_tile_positional_embedding.*Hugging Face's layout"):
            checkpoint.save_fused(tmp_path / "m", core, adapter, layout="original")
        checkpoint.save_fused(tmp_path / "hf", core, adapter)
        again = checkpoint.read_adapter(checkpoint.open_fused(tmp_path / "hf"))
        assert same(weights_of(core, again), weights_of(core, adapter))
    finally:
        table.data.copy_(before)
    assert not (tmp_path / "m").exists()
    with pytest.raises(CheckpointError, match="cannot cut n_heads 4 into 3 shards"):
        checkpoint.save_fused(tmp_path / "m", core, adapter, layout="original", n_shards=3)


def test_names_of_older_and_newer_transformers_are_read_alike(family: Part, tmp_path: Path) -> None:
    checkpoint.save_fused(tmp_path / "old", *family)
    tensors = load_file(tmp_path / "old" / "model.safetensors")
    assert (
        "language_model.model.embed_tokens.weight" in tensors and "language_model.lm_head.weight" in tensors
    )
    renamed = {modern(key): value for key, value in tensors.items()}
    assert "model.language_model.layers.1.cross_attn_attn_gate" in renamed and "lm_head.weight" in renamed
    assert [old(key) for key in renamed] == list(tensors)
    save_file(renamed, tmp_path / "old" / "model.safetensors")
    weights = checkpoint.open_fused(tmp_path / "old")
    assert same(weights_of(read_core(weights), checkpoint.read_adapter(weights)), weights_of(*family))


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (
            "vision_model.class_embedding",
            "drop",
            r"model.safetensors: .*missing: model.vision_model.class_emb",
        ),
        ("vision_model.extra", "add", "unknown: vision_model.extra"),
        (
            "multi_modal_projector.bias",
            "cut",
            r"multi_modal_projector.bias has shape \(63,\), the model needs",
        ),
        (
            "language_model.model.embed_tokens.weight",
            "cut",
            r"embed_tokens.weight has shape \(391, 64\).*\(392",
        ),
        ("language_model.model.layers.1.cross_attn_attn_gate", "int", "cross_attn_attn_gate has dtype I64"),
    ],
)
def test_strict_in_hugging_faces_layout(
    family: Part, tmp_path: Path, key: str, change: str, message: str
) -> None:
    checkpoint.save_fused(tmp_path / "m", *family)
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    if change == "add":
        tensors[key] = torch.zeros(2)
    elif change == "drop":
        del tensors[key]
    elif change == "cut":
        tensors[key] = tensors[key][:-1].clone()
    else:
        tensors[key] = tensors[key].long()
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.open_fused(tmp_path / "m").open()


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (
            "vision_model.vision_encoder.ln_pre.bias",
            "drop",
            "missing: vision_model.vision_encoder.ln_pre.bias",
        ),
        ("text_model.extra", "add", "unknown: text_model.extra"),
        ("vision_model.vision_projection.bias", "cut", r"vision_projection.bias has shape \(63,\)"),
    ],
)
def test_strict_in_the_original_layout(
    family: Part, tmp_path: Path, key: str, change: str, message: str
) -> None:
    checkpoint.save_fused(tmp_path / "m", *family, layout="original")
    path = tmp_path / "m" / "consolidated.00.pth"
    tensors = torch.load(path, weights_only=True)
    tensors["text_model.rope.freqs"] = torch.zeros(2)  # a table that older files hold
    torch.save(tensors, path)
    checkpoint.open_fused(tmp_path / "m").open()
    if change == "add":
        tensors[key] = torch.zeros(2)
    elif change == "drop":
        del tensors[key]
    else:
        tensors[key] = tensors[key][:-1].clone()
    torch.save(tensors, path)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.open_fused(tmp_path / "m").open()


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("vision_config", "vision_output_dim", 97, "vision_output_dim is 97, not 96"),
        ("vision_config", "hidden_act", "quick_gelu", "hidden_act is 'quick_gelu'"),
        ("vision_config", "supported_aspect_ratios", [[1, 1]], "supported_aspect_ratios"),
        ("vision_config", "attention_heads", 5, "not divisible by n_heads 5"),
        ("text_config", "cross_attention_layers", [1, 9], "cross_attention_layers .* go beyond"),
        ("text_config", "cross_attention_layers", [1, 2], "must each be followed by a core layer"),
        ("text_config", "hidden_size", None, "hidden_size is None"),
    ],
)
def test_settings_that_do_not_fit_are_named(section: str, key: str, value: Any, message: str) -> None:
    values = to_hf(CONFIG, CORE)
    values[section] |= {key: value}
    with pytest.raises(CheckpointError, match=message) as caught:
        from_hf(values, Path("somewhere/config.json"))
    assert "somewhere/config.json" in str(caught.value)


def test_an_adapter_is_saved_beside_its_core_and_refused_by_another(tmp_path: Path) -> None:
    core, tokenizer = tiny_core()
    torch.manual_seed(0)
    adapter = MllamaAdapter(replace(CONFIG, cross_layers=(0, 1)), core.config)
    before = core_hash(core)
    adapter.save(tmp_path / "eyes", core, "a card")
    again = checkpoint.load(tmp_path / "eyes", core)
    assert core_hash(core) == before and again.config == adapter.config
    assert same(dict(again.named_parameters()), dict(adapter.to(torch.bfloat16).float().named_parameters()))
    other, _ = tiny_core(seed=1)
    with pytest.raises(CheckpointError, match="trained on another core"):
        checkpoint.load(tmp_path / "eyes", other)
    path = tmp_path / "eyes" / "model.safetensors"
    save_file({"token_rows": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"model.safetensors: keys do not fit the model \(missing: "):
        checkpoint.load(tmp_path / "eyes", core)
    path.write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="model.safetensors: truncated"):
        checkpoint.load(tmp_path / "eyes", core)


def test_a_core_with_tied_embeddings_is_written_with_a_head_of_its_own(tmp_path: Path) -> None:
    core, tokenizer = tiny_core()
    adapter = MllamaAdapter(replace(CONFIG, cross_layers=(0, 1)), core.config)
    checkpoint.save_fused(tmp_path / "m", core, adapter, dtype=torch.float32)
    tokenizer.save(tmp_path / "m" / "tokenizer.json")
    again, read_tokenizer, eyes = checkpoint.load_fused(tmp_path / "m")
    assert core_hash(again) == core_hash(core) and again.lm_head.weight is not again.embed_tokens.weight
    assert read_tokenizer.vocab_size == tokenizer.vocab_size
    assert same(dict(eyes.named_parameters()), dict(adapter.named_parameters()))
    save_core(tmp_path / "core", again, tokenizer, dtype=torch.float32)  # the core goes on as a text model
    assert same(
        dict(read_core(open_weights(tmp_path / "core")).named_parameters()), dict(again.named_parameters())
    )
