import json
from pathlib import Path

import pytest
import torch

from core_llm.config import LlamaConfig
from core_llm.errors import CheckpointError, UserError
from core_llm.model import Llama
from core_llm.quantize import load_quantized, model_bytes, pack, quantize, save_quantized, saved_bytes
from core_llm.quantized_embedding import NoHead, QuantizedEmbedding
from core_llm.testing import tiny_core
from core_llm.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_core()[1]


def make(tokenizer: Tokenizer, tied: bool = True) -> Llama:
    config = LlamaConfig(128, 2, 4, 2, 192, vocab_size=tokenizer.vocab_size, tied_embeddings=tied)
    return Llama(config).initialise(0).eval().requires_grad_(False)


TOKENS = torch.tensor([[1, 5, 9, 300, 2, 5]])


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_rows_of_the_table_are_those_of_the_rounded_weight(tokenizer: Tokenizer, scheme: str) -> None:
    core = make(tokenizer)
    plain = core.embed(TOKENS)
    quantize(core, scheme, embedding=True)
    rows = core.embed(TOKENS)
    assert isinstance(core.embed_tokens, QuantizedEmbedding)
    assert torch.equal(rows, core.embed_tokens.table.dequantized()[TOKENS])
    step = plain.abs().max() / (127 if scheme == "int8" else 6)
    assert 0 < (rows - plain).abs().max() < step
    assert rows.dtype == core.embed_tokens.weight.dtype == torch.float32


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_core_without_a_plain_table_is_read_back_as_it_was(
    tokenizer: Tokenizer, tmp_path: Path, scheme: str, tied: bool
) -> None:
    core = make(tokenizer, tied)
    quantize(core, scheme, embedding=True)
    expected = core(TOKENS)
    save_quantized(tmp_path, core, tokenizer)
    size = (tmp_path / "quantized.safetensors").stat().st_size
    assert size == pytest.approx(saved_bytes(core), rel=0.05)
    loaded, _ = load_quantized(tmp_path)
    norms = 1e-2  # the norms are saved in bf16
    torch.testing.assert_close(loaded(TOKENS), expected, rtol=norms, atol=norms)
    assert loaded.embed_tokens.weight.dtype == torch.float32
    half, _ = load_quantized(tmp_path, "auto")
    assert half(TOKENS).dtype == torch.bfloat16
    pack(loaded)
    torch.testing.assert_close(loaded(TOKENS), expected, rtol=norms, atol=norms)


def test_the_table_takes_a_quarter_of_its_bytes(tokenizer: Tokenizer) -> None:
    core, other = make(tokenizer), make(tokenizer)
    quantize(core, "int8", embedding=True)
    quantize(other, "int8")
    saved = model_bytes(other) - model_bytes(core)
    assert saved == pytest.approx(tokenizer.vocab_size * 128 * 3, rel=0.02)


def test_a_core_without_a_head_is_saved_without_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    core = make(tokenizer)
    core.lm_head = NoHead()  # type: ignore[assignment]
    quantize(core, "int8", embedding=True)
    save_quantized(tmp_path, core, tokenizer)
    loaded, _ = load_quantized(tmp_path)
    assert isinstance(loaded.lm_head, NoHead)
    torch.testing.assert_close(loaded.hidden(TOKENS), core.hidden(TOKENS), rtol=1e-2, atol=1e-2)
    with pytest.raises(UserError, match="without its head"):
        loaded(TOKENS)


def test_what_has_no_form_is_refused_before_anything_is_changed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    core = make(tokenizer)
    with pytest.raises(UserError, match="fp8 has no form for the embedding"):
        quantize(core, "fp8", embedding=True)
    assert not isinstance(core.embed_tokens, QuantizedEmbedding)
    quantize(core, "int8", embedding=True)
    save_quantized(tmp_path, core, tokenizer)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values["quantization"]["embedding"] = "yes"
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="embedding is 'yes'"):
        load_quantized(tmp_path)
