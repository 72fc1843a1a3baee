"""Guards for tests of every package: a tiny random one (real code, no weights to ship), and one with
verdicts that a test can foresee.
"""

from collections.abc import Sequence

from core_llm.chat import Message
from core_llm.config import LlamaConfig
from core_llm.data.phrases import sample_texts
from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer
from guard.guard import Guard, Verdict
from guard.policy import Policy
from guard.taxonomy import CATEGORIES


def tiny_guard(seed: int = 0, brief: bool = True, window: int = 32) -> Guard:
    """A guard on a random core (dim 64, 2 layers) whose vocabulary has one token per category code."""
    texts = [*sample_texts(seed=0, n=400), *["S10 S11 S12 S13 S14 safe unsafe"] * 200]
    tokenizer = Tokenizer.train(texts, 768)
    config = LlamaConfig(64, 2, 4, 2, 128, vocab_size=768, max_positions=1024, tied_embeddings=True)
    core = Llama(config).initialise(seed).eval().requires_grad_(False)
    return Guard(core, tokenizer, Policy(brief=brief, window=window, context=32))


class WordGuard(Guard):
    """Judges a message unsafe where it holds the word "bomb": for tests of what is built on a guard."""

    def __init__(self) -> None:
        self.name = "word-guard"
        self.seen: list[str] = []

    def classify(self, conversations: Sequence[Sequence[Message]], batch_size: int = 32) -> list[Verdict]:
        """One verdict per conversation, by its last message."""
        return [self._one(messages[-1].text) for messages in conversations]

    def _one(self, text: str) -> Verdict:
        self.seen.append(text)
        probability = 0.9 if "bomb" in text else 0.1
        categories = {code: probability * (code == "S9") for code in CATEGORIES}
        return Verdict(probability >= 0.5, probability, 1.0, categories)
