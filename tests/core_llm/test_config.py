"""Configurations: published sizes, and Hugging Face's spelling of them in versions 4 and 5."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from core_llm.config import PRESETS, LlamaConfig, RopeScaling
from core_llm.errors import CheckpointError
from core_llm.hf_layout import config_from_hf, config_to_hf
from core_llm.stored import skeleton

# ../specs/core.md, after the paper's table 3 and the released files.
PUBLISHED = {
    "llama-3-8b": (8_030_261_248, None, False, 8192),
    "llama-3.1-8b": (8_030_261_248, 8.0, False, 131_072),
    "llama-3.1-70b": (70_553_706_496, 8.0, False, 131_072),
    "llama-3.1-405b": (405_853_388_800, 8.0, False, 131_072),
    "llama-3.2-1b": (1_235_814_400, 32.0, True, 131_072),
    "llama-3.2-3b": (3_212_749_824, 32.0, True, 131_072),
}
CONFIG = LlamaConfig(64, 2, 4, 2, 96, 512, rope_scaling=RopeScaling(32.0))
HERE = Path("folder/config.json")


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_presets_have_the_published_sizes_and_settings(name: str) -> None:
    parameters, factor, tied, positions = PUBLISHED[name]
    config = PRESETS[name]
    model = skeleton(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert (config.rope_scaling.factor if config.rope_scaling else None) == factor
    assert (config.tied_embeddings, config.max_positions) == (tied, positions)
    assert (config.rope_theta, config.vocab_size, config.norm_eps) == (500_000.0, 128_256, 1e-5)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_config_survives_the_hugging_face_spelling(name: str) -> None:
    assert config_from_hf(json.loads(json.dumps(config_to_hf(PRESETS[name]))), HERE) == PRESETS[name]


def test_skeleton_takes_no_memory_but_knows_its_frequencies() -> None:
    built = skeleton(CONFIG)
    with torch.device("cpu"):
        usual = type(built)(CONFIG)
    assert torch.equal(built.frequencies, usual.frequencies)
    assert {n: p.shape for n, p in built.named_parameters()} == {
        n: p.shape for n, p in usual.named_parameters()
    }


def test_transformers_reads_what_we_write_and_we_read_what_it_writes() -> None:
    from transformers import LlamaConfig as HFConfig

    for config in (CONFIG, PRESETS["llama-3-8b"], PRESETS["llama-3.2-1b"]):
        theirs = HFConfig.from_dict(config_to_hf(config))
        rope = theirs.rope_parameters
        assert rope["rope_theta"] == 500_000.0
        assert rope["rope_type"] == ("llama3" if config.rope_scaling else "default")
        assert rope.get("factor") == (config.rope_scaling.factor if config.rope_scaling else None)
        written = json.loads(theirs.to_json_string())
        assert "rope_theta" not in written  # version 5 has it inside rope_parameters
        assert config_from_hf(written, HERE) == config


def spelled(**changes: Any) -> dict[str, Any]:
    values = {**config_to_hf(CONFIG), **changes}
    return {key: value for key, value in values.items() if value != "absent"}


def test_both_spellings_of_the_rope_settings_are_read() -> None:
    old = config_to_hf(CONFIG)["rope_scaling"]
    without_kind = {key: value for key, value in old.items() if key != "rope_type"}
    new = {**old, "rope_theta": 500_000.0}
    for changes in (
        {},
        {"rope_scaling": {**without_kind, "type": "llama3"}},
        {"rope_scaling": "absent", "rope_parameters": new, "rope_theta": "absent"},
        {"rope_scaling": None, "rope_parameters": new},
        {"rope_parameters": new},
    ):
        assert config_from_hf(spelled(**changes), HERE) == CONFIG
    plain = spelled(rope_scaling="absent", rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
    config = config_from_hf(plain, HERE)
    assert config.rope_scaling is None and config.rope_theta == 10_000.0


def test_values_that_released_files_leave_out_have_their_usual_meaning() -> None:
    values = spelled(
        **dict.fromkeys(("head_dim", "tie_word_embeddings", "mlp_bias", "attention_bias"), "absent")
    )
    values.pop("num_key_value_heads")
    config = config_from_hf(values, HERE)
    assert config.n_kv_heads == 4 and not config.tied_embeddings


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            r"unknown RoPE scaling 'yarn' \(rope_type\)",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "unknown RoPE scaling 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3', not an object"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "contradict each other"),
        (
            {"rope_scaling": {**config_to_hf(CONFIG)["rope_scaling"], "low_freq_factor": 4.0}},
            "low_freq_factor 4.0 is not below high_freq_factor",
        ),
        ({"rope_theta": "absent"}, "rope_theta is missing"),
        ({"rope_theta": True}, "rope_theta is True, not a positive float"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config is"),
        ({"head_dim": 32}, "head_dim is 32; .* = 16"),
        ({"num_key_value_heads": 3}, "n_heads 4 is not divisible by n_kv_heads 3"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, not a positive int"),
        ({"hidden_size": 64.5}, "hidden_size is 64.5, not a positive int"),
        ({"hidden_size": "64"}, "hidden_size is '64', not a positive int"),
        ({"vocab_size": "absent"}, "vocab_size is missing"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ],
)
def test_settings_that_this_core_has_not_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=rf"folder/config\.json: .*{named}"):
        config_from_hf(spelled(**changes), HERE)


def test_unknown_presets_and_keys_are_named() -> None:
    from core_llm.config import preset

    with pytest.raises(CheckpointError, match=r"unknown preset 'llama-9'; known: nano, .*llama-3\.2-3b"):
        preset("llama-9")
    with pytest.raises(CheckpointError, match="unknown configuration keys: depth"):
        LlamaConfig.from_dict({**CONFIG.to_dict(), "depth": 3})
    assert LlamaConfig.from_dict(CONFIG.to_dict()) == CONFIG
    with pytest.raises(CheckpointError, match="head_dim 3 is odd"):
        LlamaConfig(12, 1, 4, 4, 32)
