"""Vocabularies on disk: the ranks of tiktoken, the JSON of the `tokenizers` library, and one as the other."""

import base64
import binascii
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core_llm.errors import CheckpointError

if TYPE_CHECKING:
    import tokenizers


@lru_cache(maxsize=1)
def byte_letters() -> str:
    """The letter that stands for each byte in a byte-level vocabulary (GPT-2's table).

    Printable bytes stand for themselves, the others for the letters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(spare)) for byte in range(256))


def _spelled(word: bytes) -> str:
    letters = byte_letters()
    return "".join(letters[byte] for byte in word)


def words_of(backend: Any, n_words: int) -> list[bytes]:
    """The bytes of every word, by id, of a backend of either kind."""
    if hasattr(backend, "encode_ordinary"):
        return [backend.decode_single_token_bytes(i) for i in range(n_words)]
    byte = {letter: i for i, letter in enumerate(byte_letters())}
    words = [b""] * n_words
    for spelling, i in backend.get_vocab(with_added_tokens=False).items():
        words[i] = bytes(byte[letter] for letter in spelling)
    return words


def read_tiktoken(path: Path) -> list[bytes]:
    """The words of a tiktoken file, by rank: one base64 word and its rank per line.

    Raises `CheckpointError` for a malformed line, a rank that is missing or there twice, a byte without word.
    """
    try:
        pairs = [line.split() for line in path.read_bytes().splitlines() if line]
        ranked = [(int(rank), binascii.a2b_base64(word, strict_mode=True)) for word, rank in pairs]
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not a tiktoken file ({error})") from error
    ranked.sort(key=lambda pair: pair[0])
    words = [word for _, word in ranked]
    if [rank for rank, _ in ranked] != list(range(len(ranked))) or len(set(words)) != len(words):
        raise CheckpointError(f"{path}: truncated or not a tiktoken file (its ranks are not 0, 1, 2, …)")
    lacking = 256 - sum(len(word) == 1 for word in words)
    if lacking:
        raise CheckpointError(f"{path}: truncated or not a tiktoken file ({lacking} bytes have no word)")
    return words


def merges_of(words: Sequence[bytes]) -> list[tuple[str, str]]:
    """The merges that byte-pair encoding by rank performs: every split of a word into two words, by rank."""
    rank = {word: i for i, word in enumerate(words)}
    merges: list[tuple[str, str]] = []
    for word in words:
        splits = [(word[:i], word[i:]) for i in range(1, len(word))]
        known = [(rank[left], rank[right]) for left, right in splits if left in rank and right in rank]
        merges += [(_spelled(words[left]), _spelled(words[right])) for left, right in sorted(known)]
    return merges


def json_backend(words: Sequence[bytes], special: Sequence[str], pattern: str) -> "tokenizers.Tokenizer":
    """The `tokenizers` form of a tiktoken vocabulary: the same ids for every text.

    `ignore_merges`, because tiktoken takes a piece that is a word whole, without asking how to merge it.
    """
    from tokenizers import Tokenizer, decoders, models, processors

    vocab = {_spelled(word): i for i, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab, merges_of(words), ignore_merges=True))
    backend.pre_tokenizer = _pre_tokenizer(pattern)
    backend.decoder = decoders.ByteLevel()
    add_special(backend, special)
    bos = special[0]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, len(words))]
    )
    return backend


def tiktoken_file(backend: Any, words: Sequence[bytes], path: Path) -> bytes:
    """The tiktoken form of a vocabulary, to be written to `path`.

    Raises `CheckpointError` where the backend does not merge by rank alone, so that ids would differ.
    """
    if not hasattr(backend, "encode_ordinary"):
        model: Mapping[str, Any] = json.loads(backend.to_str())["model"]
        merges = {tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]}
        if not model.get("ignore_merges") or merges != set(merges_of(words)):
            raise CheckpointError(
                f"{path}: this vocabulary does not merge by rank alone and has no tiktoken form; "
                "write it as tokenizer.json"
            )
    return b"".join(base64.b64encode(word) + f" {i}\n".encode() for i, word in enumerate(words))


def train_backend(texts: Iterable[str], n_words: int, pattern: str) -> "tokenizers.Tokenizer":
    """A byte-level BPE of at most `n_words` words over `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = _pre_tokenizer(pattern)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_words, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _pre_tokenizer(pattern: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def add_special(backend: "tokenizers.Tokenizer", names: Sequence[str]) -> None:
    """Append special tokens whose spellings in text are ordinary characters."""
    from tokenizers import AddedToken

    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    backend.encode_special_tokens = True


def read_json(path: Path) -> "tokenizers.Tokenizer":
    """A `tokenizer.json` in which no added token can come from text.

    Raises `CheckpointError` for an unreadable file or one that is not a byte-level BPE with ids 0, 1, 2, …
    """
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(str(path))
        if any(not token.special for token in backend.get_added_tokens_decoder().values()):
            backend = Tokenizer.from_str(_all_special(backend.to_str()))
    except Exception as error:  # the library raises bare Exception for every kind of bad file
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: not a readable tokenizer.json ({reason})") from error
    backend.encode_special_tokens = True
    vocab = backend.get_vocab(with_added_tokens=False)
    if set("".join(vocab)) - set(byte_letters()) or sorted(vocab.values()) != list(range(len(vocab))):
        raise CheckpointError(f"{path}: not a byte-level vocabulary of the Llama 3 family")
    return backend


def _all_special(text: str) -> str:
    """Mark every added token as special: the library looks for the others in user text."""
    values = json.loads(text)
    for token in values["added_tokens"]:
        token["special"] = True
    return json.dumps(values, ensure_ascii=False)
