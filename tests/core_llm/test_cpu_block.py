"""A block decoded in one C call against the same block step by step."""

import pytest
import torch
from torch import Tensor, nn

from core_llm import layers
from core_llm.cache import KVCache
from core_llm.config import LlamaConfig
from core_llm.kernels.cpu import ops
from core_llm.lora import LoRA, LoRAConfig
from core_llm.model import Llama
from core_llm.quantize import quantize

pytestmark = pytest.mark.skipif(not ops.available(), reason="no C compiler on this machine")

CONFIG = LlamaConfig(128, 3, 4, 2, 192, vocab_size=96, max_positions=64, tied_embeddings=True)


def bf16_core(scheme: str | None = None) -> Llama:
    core = Llama(CONFIG).initialise(0).to(torch.bfloat16)
    core.frequencies = Llama(CONFIG).frequencies
    core.eval().requires_grad_(False)
    if scheme:
        quantize(core, scheme)
    return core


@torch.inference_mode()
def decoded(core: Llama, rows: int, lengths: list[int], steps: int = 3) -> Tensor:
    """Hidden states of some steps behind a prompt whose rows end at `lengths`."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 96, (rows, 7), generator=generator)
    cache = KVCache(CONFIG, rows, 16, torch.bfloat16)
    core.hidden(tokens, cache=cache, lengths=torch.tensor(lengths))
    out = [
        core.hidden(torch.randint(0, 96, (rows, 1), generator=generator), cache=cache) for _ in range(steps)
    ]
    return torch.cat(out, 1).float()


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
@pytest.mark.parametrize("lengths", [[7], [7, 3, 5]])
def test_block_in_one_call_equals_the_steps(
    scheme: str | None, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    core, calls = bf16_core(scheme), list[int]()
    plain = layers.decode_block
    monkeypatch.setattr(layers, "decode_block", lambda *args: (calls.append(1), plain(*args))[1])
    fused = decoded(core, len(lengths), lengths)
    assert len(calls) == 3 * CONFIG.n_layers
    monkeypatch.setattr(layers, "suits", lambda *args: False)
    stepwise = decoded(core, len(lengths), lengths)
    assert len(calls) == 3 * CONFIG.n_layers
    # bf16 steps of 2^-8, some of them in a row
    assert (fused - stepwise).abs().max() <= 2.0**-5 * stepwise.abs().max()


def test_block_in_one_call_errs_no_more_than_the_steps_against_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    core = bf16_core()
    wide = Llama(CONFIG).eval().requires_grad_(False)
    wide.load_state_dict({name: tensor.float() for name, tensor in core.state_dict().items()})
    exact = decoded_fp32(wide)
    fused = (decoded(core, 1, [7]) - exact).abs().mean()
    monkeypatch.setattr(layers, "suits", lambda *args: False)
    stepwise = (decoded(core, 1, [7]) - exact).abs().mean()
    assert fused <= 1.5 * stepwise


@torch.inference_mode()
def decoded_fp32(core: Llama) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 96, (1, 7), generator=generator)
    more = [torch.randint(0, 96, (1, 1), generator=generator) for _ in range(3)]
    return core.hidden(torch.cat([tokens, *more], 1))[:, 7:]


def test_lora_and_wrapped_layers_are_not_bypassed() -> None:
    core = bf16_core()
    before = decoded(core, 1, [7])

    lora = LoRA(core, LoRAConfig(rank=2), seed=0)
    for _, parameter in lora.named_parameters():
        nn.init.constant_(parameter, 0.2)
    adapted = decoded(core, 1, [7])
    assert (adapted - before).abs().max() > 0.01
    lora.detach()
    assert torch.equal(decoded(core, 1, [7]), before)

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    block = core.layers[1]
    assert isinstance(block, layers.Block)
    block.self_attn.v_proj = Doubled(block.self_attn.v_proj)  # type: ignore[assignment]
    assert (decoded(core, 1, [7]) - before).abs().max() > 0.01
