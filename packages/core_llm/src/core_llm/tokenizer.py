"""Llama 3 tokenizers: byte-level BPE plus 256 special tokens that user text can never produce.

Reads and writes `tokenizer.json` (tokenizers) and the released `tokenizer.model` (tiktoken).
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from core_llm import vocabulary
from core_llm.errors import CheckpointError

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

# Pre-tokenisation of Llama 3 (from the released tokenizer code).
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

N_SPECIAL = 256
Version = Literal["3", "3.1", "3.2"]

# tiktoken's regular expressions overflow their stack on a few hundred thousand blanks in a row. The released
# code therefore encodes at most so many characters at once, and cuts longer runs of blanks or of non-blanks.
# Both backends are cut alike, so that they agree at any length.
MAX_CHARACTERS = 400_000
MAX_RUN = 25_000
_LONG_RUN = re.compile(rf"\s{{{MAX_RUN + 1},}}|\S{{{MAX_RUN + 1},}}")


def special_tokens(version: Version = "3.2") -> list[str]:
    """Names of the 256 special tokens in the order in which they follow the words.

    The ids are the same in the whole family. 3.1 gave five of the reserved tokens of 3 a meaning, and 3.2
    one more (`<|image|>`).
    """
    named = {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        9: "<|eot_id|>",
    }
    if version != "3":
        named |= {4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>"}
    if version == "3.2":
        named[11] = "<|image|>"
    reserved = iter(range(N_SPECIAL))
    return [
        named[i] if i in named else f"<|reserved_special_token_{next(reserved)}|>" for i in range(N_SPECIAL)
    ]


# Names that every tokenizer answers to, whatever its file calls those ids.
_ALWAYS = {name: i for i, name in enumerate(special_tokens()) if "reserved" not in name}


class Tokenizer:
    """Text ↔ token ids. Words have ids 0..n_words-1, special tokens the 256 ids after them.

    special: ids of the special tokens by the names that the file gives them. A token that a file adds beyond
    the 256, as fine-tuned models do, is special too.
    """

    def __init__(
        self, backend: "tokenizers.Tokenizer | tiktoken.Encoding", n_words: int, special: Mapping[str, int]
    ) -> None:
        self._backend = backend
        self._is_tiktoken = hasattr(backend, "encode_ordinary")
        self._bytes: list[bytes] | None = None
        self.n_words = n_words
        self.vocab_size = n_words + N_SPECIAL
        self._special = {name: n_words + i for name, i in _ALWAYS.items()} | dict(special)
        self.bos_id = n_words
        self.end_of_text_id = n_words + 1
        self.pad_id = n_words + 4
        self.eom_id = n_words + 8
        self.eot_id = n_words + 9
        self.python_tag_id = n_words + 10
        # Like `audio_id` a marker, replaced by an adapter's rows. Hub files of 3.2-Vision number it behind
        # the 256, where a core without its adapter has no row to look up.
        self.image_id = min(self._special["<|image|>"], n_words + _ALWAYS["<|image|>"])
        # Llama 3 has no audio token: the last reserved one marks where an audio part stands. It is only a
        # marker in `chat.render`; the core never embeds it, because the speech adapter's vectors replace it.
        self.audio_id = n_words + N_SPECIAL - 1
        self.headers: dict[str, list[int]] = {}  # role → ids, filled by chat.header_ids
        self.stop_ids = (self.end_of_text_id, self.eom_id, self.eot_id)

    def special(self, name: str) -> int:
        """Id of a special token; an unknown name raises KeyError."""
        return self._special[name]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; special-token spellings in it are encoded as ordinary characters.

        Surrogate pairs become their character, lone surrogates (from broken JSON escapes) U+FFFD, as in
        tiktoken.
        """
        if not text.isascii():
            text = _without_surrogates(text)
        backend: Any = self._backend
        ids: list[int] = []
        for piece in _pieces(text):
            ids += (
                backend.encode_ordinary(piece)
                if self._is_tiktoken
                else backend.encode(piece, add_special_tokens=False).ids
            )
        return ids

    def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
        """Text of ids; special tokens are dropped unless `keep_special`.

        Bytes that are not UTF-8 become U+FFFD. Raises IndexError for an id that the file does not have,
        where it is not dropped.
        """
        table = self.token_bytes
        joined = b"".join(table[i] for i in ids if keep_special or i < self.n_words)
        return joined.decode("utf-8", errors="replace")

    @property
    def token_bytes(self) -> list[bytes]:
        """What each id stands for: the bytes of a word, the name of a special token."""
        if self._bytes is None:
            words = vocabulary.words_of(self._backend, self.n_words)
            last = max(self.vocab_size - 1, *self._special.values())
            special = {i: name.encode() for name, i in self._special.items()}
            self._bytes = words + [special.get(i, b"") for i in range(self.n_words, last + 1)]
        return self._bytes

    def save(self, path: Path) -> None:
        """Write the vocabulary: as a tiktoken file where the name ends in `.model`, else as `tokenizer.json`.

        A vocabulary in either form can be written in the other, except one whose merges are not those of
        its ranks (such as nano's): it has no tiktoken form, and asking for it raises `CheckpointError`.
        """
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        words = self.token_bytes[: self.n_words]
        if path.suffix == ".model":
            temporary.write_bytes(vocabulary.tiktoken_file(self._backend, words, path))
        elif self._is_tiktoken:
            names = [name.decode() for name in self.token_bytes[self.n_words :]]
            backend = vocabulary.json_backend(words, names, PATTERN)
            backend.save(str(temporary))
        else:
            backend_json: Any = self._backend
            backend_json.save(str(temporary))
        os.replace(temporary, path)

    @classmethod
    def load(cls, where: Path | str, version: Version = "3.2") -> "Tokenizer":
        """Read a `tokenizer.json`, a `tokenizer.model`, or the folder that holds one of them.

        version: how to name the special tokens of a `tokenizer.model`, which does not name them itself.
        Raises `CheckpointError` for a missing or unreadable file or one that is not of the Llama 3 family.
        """
        path = Path(where)
        if path.is_dir():
            found = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
            if not found:
                raise CheckpointError(f"{path}: holds neither tokenizer.json nor tokenizer.model")
            path = found[0]
        if not path.is_file():
            raise CheckpointError(f"{path}: no such tokenizer file")
        return _load_tiktoken(path, version) if path.suffix == ".model" else _load_json(path)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A byte-level BPE over `texts` with the Llama 3 pre-tokenisation; vocab_size counts the specials."""
        backend = vocabulary.train_backend(texts, vocab_size - N_SPECIAL, PATTERN)
        n_words = backend.get_vocab_size()
        if n_words != vocab_size - N_SPECIAL:
            raise CheckpointError(
                f"the texts hold only {n_words} distinct pieces, {vocab_size - N_SPECIAL} asked for: "
                "give more text or a smaller vocabulary"
            )
        names = special_tokens()
        vocabulary.add_special(backend, names)
        return cls(backend, n_words, {name: n_words + i for i, name in enumerate(names)})


def _without_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces that tiktoken can take; see `MAX_RUN`."""
    if len(text) <= MAX_RUN:
        yield text
        return
    for start in range(0, len(text), MAX_CHARACTERS):
        chunk = text[start : start + MAX_CHARACTERS]
        cuts = [
            cut
            for run in _LONG_RUN.finditer(chunk)
            for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN)
        ]
        for begin, end in zip([0, *cuts], [*cuts, len(chunk)], strict=True):
            yield chunk[begin:end]


def _load_json(path: Path) -> Tokenizer:
    backend = vocabulary.read_json(path)
    n_words = backend.get_vocab_size(with_added_tokens=False)
    special = {token.content: i for i, token in backend.get_added_tokens_decoder().items()}
    if special.get("<|begin_of_text|>") != n_words:
        raise CheckpointError(f"{path}: the Llama 3 special tokens do not follow its {n_words} words")
    lacking = set(range(n_words, n_words + N_SPECIAL)) - set(special.values())
    misplaced = [name for i, name in enumerate(special_tokens("3")) if "reserved" not in name
                 and special.get(name) != n_words + i]  # fmt: skip
    if lacking or misplaced:
        what = f"{misplaced[0]} is not where it belongs" if misplaced else f"{len(lacking)} are missing"
        raise CheckpointError(f"{path}: not the {N_SPECIAL} special tokens of Llama 3 ({what})")
    return Tokenizer(backend, n_words, special)


def _load_tiktoken(path: Path, version: Version) -> Tokenizer:
    import tiktoken

    words: Sequence[bytes] = vocabulary.read_tiktoken(path)
    special = {name: len(words) + i for i, name in enumerate(special_tokens(version))}
    ranks = {word: rank for rank, word in enumerate(words)}
    encoding = tiktoken.Encoding(path.stem, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    return Tokenizer(encoding, len(words), special)
