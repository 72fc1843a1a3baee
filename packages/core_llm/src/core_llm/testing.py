"""A tiny random core for tests of every package: real code, no weights to ship."""

from core_llm.config import LlamaConfig
from core_llm.data.phrases import sample_texts
from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer


def tiny_core(seed: int = 0, vocab_size: int = 768) -> tuple[Llama, Tokenizer]:
    """A random core (dim 64, 2 layers, 4 heads over 2 K/V heads) and a tokenizer that fits it."""
    tokenizer = Tokenizer.train(sample_texts(seed=0, n=400), vocab_size)
    config = LlamaConfig(64, 2, 4, 2, 128, vocab_size=vocab_size, max_positions=512, tied_embeddings=True)
    core = Llama(config).initialise(seed).eval().requires_grad_(False)
    return core, tokenizer
