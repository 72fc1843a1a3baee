"""Rounding: in bf16 the verdict is as near to exact arithmetic as transformers' own, no further from it.

Axes: B prompts, T positions, V vocabulary.
"""

import copy
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from core_llm.config import LlamaConfig
from core_llm.hf_layout import config_to_hf
from core_llm.keys import to_hf
from core_llm.model import Llama
from guard.guard import Guard
from guard.prompt import Row

SHARED, PROMPTS, BATCH = 96, 64, 8


def sharp_core(vocab: int, seed: int) -> Llama:
    """Random bf16 weights under which attention looks at few positions, as a trained core's does."""
    core = Llama(LlamaConfig(256, 4, 4, 2, 768, vocab_size=vocab, max_positions=512, tied_embeddings=True))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in core.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=256**-0.5, generator=generator)
                parameter *= 3.0 if "q_proj" in name else 1.0
    for parameter in core.parameters():  # not core.bfloat16(): a loaded core's rotary frequencies are fp32
        parameter.data = parameter.data.bfloat16()
    return core.eval().requires_grad_(False)


def peer_of(core: Llama, dtype: torch.dtype) -> Any:
    """transformers' model with the same weights, its products in `dtype`."""
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    values = config_to_hf(core.config)
    config = HFConfig(**{k: v for k, v in values.items() if k not in ("architectures", "model_type")})
    model = LlamaForCausalLM(config)
    state = {to_hf(name): p for name, p in core.named_parameters()}
    model.load_state_dict(state | {"lm_head.weight": core.lm_head.weight})
    rotary = copy.deepcopy(model.model.rotary_emb)
    model = model.to(dtype).eval()
    model.model.rotary_emb = rotary  # its frequencies stay as they are, as when it is loaded
    return model


def prompts(words: int, seed: int) -> list[Row]:
    """Behind a common head, texts of 4 to 200 tokens."""
    rng = random.Random(seed)
    head = [rng.randrange(words) for _ in range(SHARED)]
    lengths = [4 + round(196 * i / (PROMPTS - 1)) for i in range(PROMPTS)]
    return [Row([*head, *(rng.randrange(words) for _ in range(n))], SHARED) for n in lengths]


@torch.inference_mode()
def peer_odds(model: Any, rows: Sequence[Row], words: list[int], batch: int) -> Tensor:
    """Log-odds [B] of unsafe, by one prompt after the other or by batches padded on the left."""
    found = []
    for start in range(0, len(rows), batch):
        ids = [row.ids for row in rows[start : start + batch]]
        width = max(map(len, ids))
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in ids])
        logits = model(
            torch.tensor([[0] * (width - len(p)) + p for p in ids]),
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            logits_to_keep=1,
        ).logits
        pair = logits[:, -1, words].double()
        found.append(pair[:, 1] - pair[:, 0])
    return torch.cat(found)


def our_odds(core: Llama, guard: Guard, rows: Sequence[Row]) -> Tensor:
    judge = Guard(core, guard.tokenizer)
    verdicts = judge.judge_prompts(rows, judge.prompter.reading(), BATCH)
    return torch.tensor([v.probability for v in verdicts], dtype=torch.double).logit()


def test_bf16_is_as_near_to_fp32_as_transformers_own(guard: Guard) -> None:
    core = sharp_core(guard.tokenizer.vocab_size, seed=0)
    rows = prompts(guard.tokenizer.n_words, seed=0)
    words = [guard.tokens.safe, guard.tokens.unsafe]
    exact = peer_odds(peer_of(core, torch.float32), rows, words, BATCH)
    theirs = peer_of(core, torch.bfloat16)
    single, padded = (
        (peer_odds(theirs, rows, words, batch) - exact).abs().mean().item() for batch in (1, BATCH)
    )
    ours = (our_odds(core, guard, rows) - exact).abs().mean().item()
    assert 0 < ours <= (single + padded)  # twice their mean
    wide = our_odds(copy.deepcopy(core).float(), guard, rows)
    assert (wide - exact).abs().max() < 1e-4
