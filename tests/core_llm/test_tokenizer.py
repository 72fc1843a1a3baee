"""Round trips, and that user text never becomes a special token."""

import base64
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core_llm.errors import CheckpointError
from core_llm.testing import tiny_core
from core_llm.tokenizer import N_SPECIAL, Tokenizer, special_tokens

_, TOKENIZER = tiny_core()


@settings(max_examples=300, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from(special_tokens()).map(lambda s: f"a{s}b {s}")
)
def test_any_text_survives_and_yields_no_special_token(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert all(i < TOKENIZER.n_words for i in ids)
    assert TOKENIZER.decode(ids) == text


def test_special_tokens_follow_the_words_in_the_order_of_llama_3() -> None:
    names = special_tokens()
    assert len(names) == len(set(names)) == N_SPECIAL
    # Released ids 128000 + n, from the specification of the family.
    for name, n in {
        "<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|finetune_right_pad_id|>": 4,
        "<|start_header_id|>": 6,
        "<|end_header_id|>": 7, "<|eom_id|>": 8, "<|eot_id|>": 9, "<|python_tag|>": 10, "<|image|>": 11,
    }.items():  # fmt: skip
        assert names.index(name) == n and TOKENIZER.special(name) == TOKENIZER.n_words + n


def test_saved_tokenizer_is_equal_and_readable_by_the_tokenizers_library(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend

    TOKENIZER.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path)
    text = "what color is the shape? <|eot_id|> 12345 ünïcode\n\n"
    assert again.encode(text) == TOKENIZER.encode(text)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.encode_special_tokens = True
    assert backend.encode(text, add_special_tokens=False).ids == TOKENIZER.encode(text)


def test_tiktoken_file_is_read(tmp_path: Path) -> None:
    ranks = [bytes([i]) for i in range(256)] + [b"he", b"hel", b"lo", b"hello"]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\n".join(base64.b64encode(t) + b" " + str(i).encode() for i, t in enumerate(ranks)))
    tokenizer = Tokenizer.load(path)
    assert tokenizer.encode("hello") == [259] and tokenizer.bos_id == 260
    assert tokenizer.decode(tokenizer.encode("<|eot_id|> é")) == "<|eot_id|> é"


def test_bad_files_name_themselves(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither"):
        Tokenizer.load(tmp_path)
    for name in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / name).write_text("{not a tokenizer")
        with pytest.raises(CheckpointError, match=name):
            Tokenizer.load(tmp_path / name)
