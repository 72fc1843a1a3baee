"""Random-initialised checkpoints of transformers' LlamaForCausalLM, read by this core: the same logits.

Axes: B batch, T text positions.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from core_llm.checkpoint import open_weights, read_core
from core_llm.generate import generate
from core_llm.kernels import Mask
from core_llm.model import Llama
from core_llm.sampling import Sampling

ROPE = {
    "3": None,
    "3.1": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "3.2": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
VOCAB = 320


def peer_and_core(
    folder: Path, kind: str = "3.1", heads: int = 4, kv_heads: int = 2, tied: bool = False, **changes: Any
) -> tuple[Any, Llama]:
    """A random transformers model saved to `folder`, and this core read from there."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = dict(ROPE[kind] or {"rope_type": "default"}, rope_theta=500_000.0)
    if ROPE[kind]:
        rope["original_max_position_embeddings"] = 8192
    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": VOCAB,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": rope,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "initializer_range": 0.15,  # the usual 0.02 makes logits so small that 1e-4 proves little
    } | changes
    torch.manual_seed(heads * 10 + kv_heads)
    peer = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    peer.save_pretrained(folder)
    return peer, read_core(open_weights(folder))


def some_tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def same_logits(peer: Any, core: Llama, tokens: Tensor, positions: Tensor | None = None) -> None:
    theirs = peer(tokens, position_ids=positions).logits
    ours = core(tokens, positions=positions)
    assert theirs.std() > 0.3
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", sorted(ROPE))
@pytest.mark.parametrize("kv_heads", [8, 4, 2, 1])
def test_logits_equal_transformers(tmp_path: Path, kv_heads: int, kind: str, tied: bool) -> None:
    peer, core = peer_and_core(tmp_path, kind, 8, kv_heads, tied)
    assert (
        core.config.tied_embeddings == tied and core.config.n_heads // core.config.n_kv_heads == 8 // kv_heads
    )
    same_logits(peer, core, some_tokens(2, 33))


@pytest.mark.parametrize("kind", sorted(ROPE))
def test_logits_equal_transformers_at_the_far_end_of_the_context(tmp_path: Path, kind: str) -> None:
    # 16 channels turn between once in 6 positions and once in millions; far positions tell them apart.
    peer, core = peer_and_core(tmp_path, kind)
    positions = torch.tensor([[*range(20), *range(8180, 8210), *range(131_040, 131_072)]])
    same_logits(peer, core, some_tokens(1, positions.shape[1]), positions)


@pytest.mark.parametrize("kind", ["3.1", "3.2"])
def test_a_text_longer_than_the_original_context_has_the_logits_of_transformers(
    tmp_path: Path, kind: str
) -> None:
    peer, core = peer_and_core(
        tmp_path, kind, 2, 1, hidden_size=16, num_hidden_layers=1, initializer_range=0.4
    )
    same_logits(peer, core, some_tokens(1, 8_400))


def test_another_rope_factor_would_be_noticed(tmp_path: Path) -> None:
    peer, _ = peer_and_core(tmp_path / "3.1", "3.1")
    _, other = peer_and_core(tmp_path / "3.2", "3.2")
    tokens = some_tokens(1, 64)
    positions = torch.arange(0, 64_000, 1000)[None]
    with torch.no_grad():
        assert (
            peer(tokens, position_ids=positions).logits - other(tokens, positions=positions)
        ).abs().max() > 0.01


@pytest.mark.parametrize(("kind", "kv_heads", "tied"), [("3", 4, False), ("3.1", 2, False), ("3.2", 1, True)])
def test_greedy_generation_equals_transformers_over_64_tokens(
    tmp_path: Path, kind: str, kv_heads: int, tied: bool
) -> None:
    peer, core = peer_and_core(tmp_path, kind, 4, kv_heads, tied)
    prompts = [some_tokens(1, n, seed=n)[0].tolist() for n in (3, 17, 9)]
    ours = generate(core, prompts, Sampling(64))
    for prompt, completion in zip(prompts, ours):
        theirs = peer.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False, pad_token_id=0)
        assert list(completion.tokens) == theirs[0, len(prompt) :].tolist()
    assert len({token for completion in ours for token in completion.tokens}) > 20  # not one token repeated
    assert all(len(completion.tokens) == 64 for completion in ours)


def left_padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions, visible keys [B, T, T] of prompts that end together, as transformers pads them."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    real = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts])
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    visible = real[:, None, :] & torch.ones(width, width, dtype=torch.bool).tril()
    return tokens, positions, visible


def test_left_and_right_padded_batches_equal_one_by_one_and_transformers(tmp_path: Path) -> None:
    peer, core = peer_and_core(tmp_path)
    prompts = [some_tokens(1, n, seed=n)[0].tolist() for n in (5, 21, 12)]
    tokens, positions, visible = left_padded(prompts)
    right = torch.tensor([p + [0] * (21 - len(p)) for p in prompts])
    with torch.no_grad():
        left_out = core(tokens, positions=positions, mask=Mask.pairs(visible))
        right_out = core(right)
        their_left = peer(tokens, attention_mask=visible[:, -1].long(), position_ids=positions).logits
        for row, prompt in enumerate(prompts):
            alone = core(torch.tensor([prompt]))[0]
            for batched in (left_out[row, -len(prompt) :], right_out[row, : len(prompt)]):
                torch.testing.assert_close(batched, alone, atol=1e-5, rtol=0)
            torch.testing.assert_close(their_left[row, -len(prompt) :], alone, atol=1e-4, rtol=0)
            assert generate(core, [prompt], Sampling(8)) == [generate(core, prompts, Sampling(8))[row]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_to_ours_to_transformers_is_bit_exact(
    tmp_path: Path, tied: bool, dtype: torch.dtype
) -> None:
    from transformers import LlamaForCausalLM

    from core_llm.convert import convert_checkpoint

    peer, _ = peer_and_core(tmp_path / "fp32", "3.2", tied=tied)
    peer.to(dtype).save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    convert_checkpoint(tmp_path / "theirs", tmp_path / "original", "original", progress=False)
    convert_checkpoint(tmp_path / "original", tmp_path / "back", "hf", progress=False)
    again, info = LlamaForCausalLM.from_pretrained(tmp_path / "back", dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    assert again.dtype == dtype
    for key in ("rope_parameters", "tie_word_embeddings", "num_key_value_heads", "rms_norm_eps"):
        assert getattr(again.config, key) == getattr(peer.config, key)
    theirs = peer.state_dict()
    assert set(again.state_dict()) == set(theirs)
    assert all(torch.equal(value, theirs[key]) for key, value in again.state_dict().items())
    stored = load_file(tmp_path / "back" / "model.safetensors")
    assert ("lm_head.weight" in stored) != tied
