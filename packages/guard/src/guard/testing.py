"""Guards for tests of every package: a tiny random one (real code, no weights to ship), and ones with
verdicts that a test can foresee.
"""

import hashlib
import time
from collections.abc import Sequence

from core_llm.chat import Image, Message
from core_llm.config import LlamaConfig
from core_llm.data.phrases import sample_texts
from core_llm.errors import UserError
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

    policy = Policy()  # type: ignore[assignment]
    threshold = 0.5  # type: ignore[assignment]
    temperature = 1.0  # type: ignore[assignment]

    def __init__(self) -> None:
        self.name = "word-guard"
        self.seen: list[str] = []

    def classify(
        self,
        conversations: Sequence[Sequence[Message]],
        batch_size: int = 32,
        policy: Policy | None = None,
    ) -> list[Verdict]:
        """One verdict per conversation, by its last message."""
        return [self._one(messages[-1].text) for messages in conversations]

    def _one(self, text: str) -> Verdict:
        self.seen.append(text)
        probability = 0.9 if "bomb" in text else 0.1
        categories = {code: probability * (code == "S9") for code in CATEGORIES}
        return Verdict(probability >= 0.5, probability, 1.0, categories)


def word_probability(text: str) -> float:
    """P(unsafe) of `WordEngine`: above 0.6 for what holds "bomb", below 0.4 for the rest, another one for
    every text, so that a verdict that went to the wrong place is noticed.
    """
    share = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:6], "big") / 2**48
    return (0.6 if "bomb" in text else 0.0) + 0.4 * share


class WordEngine:
    """No model. delay: seconds that each batch takes. sees: whether images are judged too."""

    def __init__(self, delay: float = 0.0, sees: bool = False) -> None:
        self.name, self.delay, self.sees = "word-engine", delay, sees
        self.policy = Policy()

    def judge(
        self, conversations: Sequence[Sequence[Message]], policy: Policy | None = None
    ) -> list[Verdict]:
        """Verdicts on the last messages, by their words."""
        if self.delay:
            time.sleep(self.delay)
        return [self._one(messages, policy or self.policy) for messages in conversations]

    def _one(self, messages: Sequence[Message], policy: Policy) -> Verdict:
        images = [part for part in messages[-1].parts if isinstance(part, Image)]
        if images and not self.sees:
            raise UserError("this guard reads text only")
        text = messages[-1].text
        if not text.strip() and not images:
            raise UserError("the message to judge is empty: give some text")
        probability = word_probability(text)
        categories = {c.code: probability * (c.code == "S9") for c in policy.enabled}
        unsafe = probability >= (policy.threshold or 0.5)
        return Verdict(unsafe, probability, 1.0, categories, policy=policy.digest)

    def check(self, policy: Policy) -> None:
        """Any policy that tells the one category that is ever found."""
        if "S9" not in policy.categories:
            raise UserError("this guard needs the category S9")

    def close(self) -> None:
        """Nothing is held."""
