"""The core against transformers, and its cache against no cache."""

import pytest
import torch

from core_llm.cache import KVCache
from core_llm.checkpoint import config_to_hf
from core_llm.config import LlamaConfig, RopeScaling
from core_llm.errors import UserError
from core_llm.model import Llama
from core_llm.testing import tiny_core


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("scaling", [None, RopeScaling(factor=8.0, original_max_positions=32)])
def test_logits_equal_transformers(kv_heads: int, scaling: RopeScaling | None) -> None:
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    _, tokenizer = tiny_core()
    config = LlamaConfig(64, 2, 4, kv_heads, 96, 300, max_positions=256, rope_scaling=scaling)
    model = Llama(config).initialise(3)
    values = config_to_hf(config, tokenizer)
    peer = LlamaForCausalLM(
        HFConfig(**{k: v for k, v in values.items() if k not in ("architectures", "model_type", "dtype")})
    )
    state = {k if k.startswith("lm_head") else f"model.{k}": v for k, v in model.state_dict().items()}
    peer.load_state_dict(state)
    tokens = torch.randint(0, 300, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), peer(tokens).logits, atol=1e-4, rtol=1e-4)


def test_cached_decoding_equals_uncached() -> None:
    core, _ = tiny_core()
    tokens = torch.randint(0, 500, (3, 20), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([12, 5, 9])
    with torch.inference_mode():
        cache = KVCache(core.config, 3, 32)
        core.hidden(tokens[:, :12], cache=cache, lengths=lengths)
        for step in range(6):
            following = tokens[torch.arange(3), lengths + step]
            cached = core(following[:, None], cache=cache)[:, 0]
            for row in range(3):
                whole = core(tokens[row : row + 1, : int(lengths[row]) + step + 1])[0, -1]
                torch.testing.assert_close(cached[row], whole, atol=1e-5, rtol=1e-4)


def test_chunked_prefill_equals_one_pass() -> None:
    core, _ = tiny_core()
    tokens = torch.randint(0, 500, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        cache = KVCache(core.config, 2, 16)
        parts = [core(tokens[:, a : a + 4], cache=cache) for a in range(0, 16, 4)]
        torch.testing.assert_close(torch.cat(parts, dim=1), core(tokens), atol=1e-5, rtol=1e-4)


def test_interleaved_layer_runs_before_its_block_only_when_given() -> None:
    core, _ = tiny_core()
    tokens = torch.randint(0, 500, (1, 8))
    with torch.inference_mode():
        plain = core(tokens)
        assert torch.equal(core(tokens, interleaved={1: lambda hidden: hidden}), plain)
        assert not torch.equal(core(tokens, interleaved={1: lambda hidden: hidden + 1}), plain)


def test_text_longer_than_the_context_names_both_lengths() -> None:
    core, _ = tiny_core()
    with pytest.raises(UserError, match=r"513.*512"):
        core(torch.zeros(1, 513, dtype=torch.long))
    with pytest.raises(UserError, match="600"):
        KVCache(core.config, 1, 600)


def test_rotary_frequencies_stay_exact_in_bf16() -> None:
    core, _ = tiny_core()
    exact = core.frequencies.clone()
    for converted in (core.bfloat16(), core.to(torch.float16)):
        assert converted.embed_tokens.weight.dtype != torch.float32
        assert converted.frequencies.dtype == torch.float32 and torch.equal(converted.frequencies, exact)
    core.to("meta")
    assert core.bfloat16().frequencies.is_meta
    assert tiny_core()[0].double().frequencies.dtype == torch.float64
