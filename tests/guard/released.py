"""Random checkpoints in the form of released guards, for the tests of this folder."""

import json
from pathlib import Path

import torch

from core_llm.checkpoint import save_core
from core_llm.config import LlamaConfig, RopeScaling
from core_llm.data.phrases import sample_texts
from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer
from guard.prompt import VerdictTokens

TEMPLATES = Path(__file__).parent / "templates"
NAMES = ("listed", "plain", "described")


def tokenizer() -> Tokenizer:
    """One with a token for each word of a verdict and for each number, as Llama 3's has."""
    numbers = " ".join(f"S{n}" for n in range(1, 30))
    template = TEMPLATES.joinpath("listed.jinja").read_text()
    words = ["\n\nsafe", "\n\nunsafe\nS1,S2", numbers]
    return Tokenizer.train([*sample_texts(seed=0, n=400), *words * 200, template], 900)


def save_released(folder: Path, template: str, seed: int = 0, heads: int = 4) -> Path:
    """A small random guard whose answer is mostly a verdict, in Hugging Face's layout."""
    words = tokenizer()
    scaling = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64)
    config = LlamaConfig(
        64, 3, heads, 2, 96, vocab_size=words.vocab_size, max_positions=4096, rope_scaling=scaling,
        tied_embeddings=False,
    )  # fmt: skip
    core = Llama(config).initialise(seed).eval()
    tokens = VerdictTokens.of(words, [f"S{n}" for n in range(1, 15)])
    with torch.no_grad():
        # As a trained guard's: the mass is on the verdict's tokens, and the codes are among the top 20.
        core.lm_head.weight *= 0.05
        generator = torch.Generator().manual_seed(seed + 100)
        common = torch.randn(64, generator=generator)
        core.embed_tokens.weight += common
        for token in [tokens.safe, tokens.unsafe, *tokens.codes.values()]:
            strength = 0.3 if token in (tokens.safe, tokens.unsafe) else 0.2
            core.lm_head.weight[token] += strength * common + 0.2 * torch.randn(64, generator=generator)
    for parameter in core.parameters():
        parameter.data = parameter.data.bfloat16().float()
    save_core(folder, core, words, dtype=torch.float32)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "pad_token": "<|finetune_right_pad_id|>",
        "chat_template": TEMPLATES.joinpath(f"{template}.jinja").read_text(),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
