"""One tiny random core and a small adapter for all tests of this folder."""

import pytest
import torch

from core_llm.model import Llama
from core_llm.testing import tiny_core
from core_llm.tokenizer import Tokenizer
from speech_adapter.adapter import SpeechAdapter
from speech_adapter.testing import small_config


@pytest.fixture(scope="session")
def core_and_tokenizer() -> tuple[Llama, Tokenizer]:
    return tiny_core()


@pytest.fixture
def adapter(core_and_tokenizer: tuple[Llama, Tokenizer]) -> SpeechAdapter:
    """Every vector of 80 ms stands in the token stream."""
    torch.manual_seed(0)
    return SpeechAdapter(small_config(merge=False), core_and_tokenizer[0].embed_tokens.weight).eval()


@pytest.fixture
def merging_adapter(core_and_tokenizer: tuple[Llama, Tokenizer]) -> SpeechAdapter:
    """Vectors that say the same token are merged."""
    torch.manual_seed(0)
    return SpeechAdapter(small_config(merge=True), core_and_tokenizer[0].embed_tokens.weight).eval()
