"""Ids equal tiktoken's and transformers', text survives, and user text never becomes a special token."""

import base64
import os
from collections.abc import Iterable
from pathlib import Path

import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken.load import load_tiktoken_bpe

from core_llm.checkpoint import NANO
from core_llm.errors import CheckpointError
from core_llm.testing import tiny_core
from core_llm.text_stream import TextStream
from core_llm.tokenizer import MAX_CHARACTERS, MAX_RUN, N_SPECIAL, Tokenizer, special_tokens

ROOT = Path(os.environ.get("DATA_ROOT", Path(__file__).parents[3] / "shared" / "data"))
RELEASED = ROOT / "llama3_tokenizer" / "tokenizer.model"
_, TINY = tiny_core()

# The released pattern, written down here a second time: the reference must not come from the code under test.
PATTERN = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

PIECES = st.one_of(
    st.text(max_size=20),  # anything, lone surrogates too
    st.text(st.characters(categories=["Mn", "Mc", "Me", "Sk", "Zs", "Cf"]), max_size=8),
    st.sampled_from(
        ["👩‍👩‍👧‍👦", "🇸🇪", "é", "e\u0301\u0327", "ﬀ", "İI'S", "ſ 'ſ", "\ufeff", "ⅷ²", "\ud83d\ude00"]
    ),
    st.tuples(
        st.sampled_from([" ", "\n", "\r\n", "\t", "\u3000", "7", "٣", "a", "!"]), st.integers(1, 90)
    ).map(lambda run: run[0] * run[1]),
    st.sampled_from(special_tokens() + special_tokens("3")),
    st.sampled_from(
        ["def f(x):\n    return 1", "it's We'LL", "https://a.b/c?d=1", "1234567,890", "日本語の文", "हिन्दी"]
    ),
)
TEXTS = st.lists(PIECES, max_size=12).map("".join)


def released_file() -> Path:
    if not RELEASED.is_file():
        pytest.skip(f"no {RELEASED}: set DATA_ROOT to the folder that holds llama3_tokenizer/")
    return RELEASED


@pytest.fixture(scope="module")
def released() -> Tokenizer:
    return Tokenizer.load(released_file())


@pytest.fixture(scope="module")
def reference() -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "reference",
        pat_str=PATTERN,
        mergeable_ranks=load_tiktoken_bpe(str(released_file())),
        special_tokens={name: 128_000 + i for i, name in enumerate(special_tokens())},
    )


@pytest.fixture(scope="module")
def from_transformers(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """tokenizer.json of the released vocabulary, made by transformers' own converter."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    converter = TikTokenConverter(
        str(released_file()), pattern=PATTERN, extra_special_tokens=special_tokens("3.1")
    )
    path = tmp_path_factory.mktemp("transformers") / "tokenizer.json"
    converter.converted().save(str(path))
    return Tokenizer.load(path)


def well_formed(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@settings(max_examples=250, deadline=None)
@given(TEXTS)
@example("\ud800")
@example("a\udcff\n\n\n b" + " " * 300 + "x")
def test_ids_equal_those_of_tiktoken_and_of_transformers(
    released: Tokenizer, reference: tiktoken.Encoding, from_transformers: Tokenizer, text: str
) -> None:
    ids = released.encode(text)
    assert ids == reference.encode(text, disallowed_special=())
    assert ids == from_transformers.encode(text)
    assert all(i < 128_000 for i in ids)
    assert released.decode(ids) == from_transformers.decode(ids) == well_formed(text)
    assert released.decode(ids) == reference.decode(ids)


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_any_text_survives_a_trained_vocabulary_and_yields_no_special_token(text: str) -> None:
    ids = TINY.encode(text)
    assert all(i < TINY.n_words for i in ids)
    assert TINY.decode(ids) == well_formed(text)


def streamed(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(i) for i in ids), stream.finish()]


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_streamed_pieces_hold_whole_characters_and_add_up_to_the_text(released: Tokenizer, text: str) -> None:
    for tokenizer in (released, TINY):
        pieces = streamed(tokenizer, tokenizer.encode(text))
        assert "".join(pieces) == well_formed(text)
        if "\ufffd" not in well_formed(text):
            assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 767), max_size=30))
def test_streamed_ids_of_no_valid_text_add_up_to_their_decoding(ids: list[int]) -> None:
    assert "".join(streamed(TINY, ids)) == TINY.decode(ids)


def test_a_character_of_four_bytes_comes_out_whole_and_a_cut_one_is_marked() -> None:
    byte = {bytes: i for i, bytes in enumerate(TINY.token_bytes)}
    ids = [byte[bytes([b])] for b in "é🙂!".encode()]
    assert streamed(TINY, ids) == ["", "é", "", "", "", "🙂", "!", ""]
    assert "".join(streamed(TINY, ids[:4])) == "é\ufffd"


def test_texts_that_stop_tiktoken_are_cut_as_the_released_code_cuts_them(
    released: Tokenizer, reference: tiktoken.Encoding, from_transformers: Tokenizer
) -> None:
    """At most 400,000 characters at once, and runs of blanks or of non-blanks of at most 25,000."""

    def cut(text: str) -> list[str]:
        pieces = []
        for start in range(0, len(text), 400_000):
            chunk, begin, run = text[start : start + 400_000], 0, 0
            for i, letter in enumerate(chunk):
                run = run + 1 if i and letter.isspace() == chunk[i - 1].isspace() else 1
                if run > 25_000:
                    pieces.append(chunk[begin:i])
                    begin, run = i, 1
            pieces.append(chunk[begin:])
        return pieces

    assert (MAX_CHARACTERS, MAX_RUN) == (400_000, 25_000)
    for text in ("x" * 50_001, "ab\u2003" * 10 + " " * 60_000 + "y", "word \n" * 66_000 + "z" * 26_000):
        ids = released.encode(text)
        assert ids == [i for piece in cut(text) for i in reference.encode_ordinary(piece)]
        assert ids == from_transformers.encode(text) and released.decode(ids) == text
    blanks = " " * 2_000_000 + "x"  # tiktoken itself panics
    assert released.decode(released.encode(blanks)) == blanks
    for text in ("a" * 25_000, " " * 24_999 + "b" * 25_000, "one two " * 20_000):  # within the limits: uncut
        assert released.encode(text) == reference.encode_ordinary(text)


def test_special_tokens_follow_the_words_in_the_order_of_llama_3() -> None:
    # Released ids 128000 + n, from the specification of the family.
    facts = {
        "<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|finetune_right_pad_id|>": 4,
        "<|start_header_id|>": 6, "<|end_header_id|>": 7, "<|eom_id|>": 8, "<|eot_id|>": 9,
        "<|python_tag|>": 10, "<|image|>": 11,
    }  # fmt: skip
    names = special_tokens()
    assert len(names) == len(set(names)) == N_SPECIAL
    for name, n in facts.items():
        assert names.index(name) == n and TINY.special(name) == TINY.n_words + n


def test_each_version_names_the_same_ids_in_its_own_way(released: Tokenizer) -> None:
    three, later, vision = (special_tokens(version) for version in ("3", "3.1", "3.2"))  # type: ignore[arg-type]
    shared = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>",
              9: "<|eot_id|>"}  # fmt: skip
    for names in (three, later, vision):
        assert len(set(names)) == 256 and {i: names[i] for i in shared} == shared
    assert [three[i] for i in (2, 5, 8, 10, 255)] == [
        f"<|reserved_special_token_{i}|>" for i in (0, 3, 4, 5, 250)
    ]
    assert later[4:6] == ["<|finetune_right_pad_id|>", "<|reserved_special_token_2|>"]
    assert later[8] == "<|eom_id|>" and later[10:12] == ["<|python_tag|>", "<|reserved_special_token_3|>"]
    assert later[255] == "<|reserved_special_token_247|>" and vision[11] == "<|image|>"
    first = Tokenizer.load(released_file(), version="3")
    for tokenizer in (first, released):
        assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.stop_ids) == (
            128_000,
            128_004,
            (128_001, 128_008, 128_009),
        )
        assert (tokenizer.python_tag_id, tokenizer.image_id, tokenizer.vocab_size) == (
            128_010,
            128_011,
            128_256,
        )
        assert tokenizer.special("<|eom_id|>") == 128_008  # named or not
    assert first.decode([128_010], keep_special=True) == "<|reserved_special_token_5|>"
    assert (
        released.decode([128_010, 64], keep_special=True) == "<|python_tag|>a"
        and released.decode([128_010]) == ""
    )


def test_saved_tokenizer_is_equal_and_readable_by_the_tokenizers_library(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend

    TINY.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path)
    text = "what color is the shape? <|eot_id|> 12345 ünïcode\n\n"
    assert again.encode(text) == TINY.encode(text)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.encode_special_tokens = True
    assert backend.encode(text, add_special_tokens=False).ids == TINY.encode(text)


def test_released_vocabulary_is_written_in_both_forms_and_reads_back_the_same(
    released: Tokenizer, from_transformers: Tokenizer, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer as Backend

    released.save(tmp_path / "tokenizer.model")
    assert (tmp_path / "tokenizer.model").read_bytes() == released_file().read_bytes()
    released.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    from_transformers.save(tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == released_file().read_bytes()
    library = Backend.from_file(str(tmp_path / "tokenizer.json"))  # as other programs read it
    text = "It's 2024:\n\n  naïve 日本 <|eot_id|>🙂"
    assert again.encode(text) == released.encode(text)
    assert library.encode("a<|eot_id|>").ids == [128_000, 64, 128_009]


def test_vocabulary_with_merges_of_its_own_has_no_tiktoken_form(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tokenizer.model: .*write it as tokenizer.json"):
        Tokenizer.load(NANO).save(tmp_path / "tokenizer.model")


def test_tiktoken_file_is_read(tmp_path: Path) -> None:
    ranks = [bytes([i]) for i in range(256)] + [b"he", b"hel", b"lo", b"hello"]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\n".join(base64.b64encode(t) + b" " + str(i).encode() for i, t in enumerate(ranks)))
    tokenizer = Tokenizer.load(path)
    assert tokenizer.encode("hello") == [259] and tokenizer.bos_id == 260
    assert tokenizer.decode(tokenizer.encode("<|eot_id|> é")) == "<|eot_id|> é"


def test_tokens_that_a_file_adds_never_come_from_text(tmp_path: Path) -> None:
    """Fine-tuned models add tokens that are not marked special; the library would look for them in text."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    TINY.save(tmp_path / "tokenizer.json")
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    assert max(backend.encode("a <tool_call>").ids) == TINY.vocab_size  # control: the library does find it
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode("a <tool_call>")
    assert max(ids) < tokenizer.n_words and tokenizer.decode(ids) == "a <tool_call>"
    assert tokenizer.special("<tool_call>") == TINY.vocab_size
    assert tokenizer.decode([TINY.vocab_size], keep_special=True) == "<tool_call>"


def test_bad_files_name_themselves_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither"):
        Tokenizer.load(tmp_path)
    with pytest.raises(CheckpointError, match="absent.model: no such"):
        Tokenizer.load(tmp_path / "absent.model")
    lines = [base64.b64encode(bytes([i])) + b" " + str(i).encode() for i in range(256)]
    bad = {
        "words.model": b"{not a tokenizer",
        "empty.model": b"",
        "cut.model": b"\n".join(lines[:200]),
        "gap.model": b"\n".join(lines[:100] + lines[101:]),
        "twice.model": b"\n".join([*lines, lines[5]]),
        "letters.model": b"\n".join([*lines, b"a$$= 256"]),
        "words.json": b"{not a tokenizer",
        "other.json": b'{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}',
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name) as caught:
            Tokenizer.load(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_tokenizer_without_the_special_tokens_of_llama_3_is_refused(tmp_path: Path) -> None:
    import json

    TINY.save(tmp_path / "tokenizer.json")
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    whole = values["added_tokens"]
    for tokens, reason in (
        (whole[:200], "56 are missing"),
        (whole[1:], "do not follow"),
        ([], "do not follow"),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps({**values, "added_tokens": tokens}))
        with pytest.raises(CheckpointError, match=reason):
            Tokenizer.load(tmp_path)
