"""Llama 3 tokenizers: byte-level BPE plus 256 special tokens that user text can never produce.

Reads `tokenizer.json` (tokenizers) and the released `tokenizer.model` (tiktoken).
"""

import base64
import binascii
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def special_tokens() -> list[str]:
    """The 256 special tokens in the order in which they follow the words (Llama 3.2 naming)."""
    names = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>",
        "<|reserved_special_token_2|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
        "<|image|>",
    ]
    return names + [f"<|reserved_special_token_{i}|>" for i in range(3, 3 + N_SPECIAL - len(names))]


# Llama 3 has no audio token: the last reserved one marks where an audio part stands. It is only a
# marker in `chat.render`; the core never embeds it, because the speech adapter's vectors replace it.
AUDIO_TOKEN = special_tokens()[-1]


class Tokenizer:
    """Text ↔ token ids. Words have ids 0..n_words-1, special tokens the 256 ids after them."""

    def __init__(self, backend: "tokenizers.Tokenizer | tiktoken.Encoding", n_words: int) -> None:
        self._backend = backend
        self._is_tiktoken = hasattr(backend, "encode_ordinary")
        self.n_words = n_words
        self.vocab_size = n_words + N_SPECIAL
        self._special = {name: n_words + i for i, name in enumerate(special_tokens())}
        self.bos_id = self.special("<|begin_of_text|>")
        self.end_of_text_id = self.special("<|end_of_text|>")
        self.pad_id = self.special("<|finetune_right_pad_id|>")
        self.eot_id = self.special("<|eot_id|>")
        self.eom_id = self.special("<|eom_id|>")
        self.image_id = self.special("<|image|>")
        self.audio_id = self.special(AUDIO_TOKEN)
        self.headers: dict[str, list[int]] = {}  # role → ids, filled by chat.header_ids
        self.stop_ids = (self.end_of_text_id, self.eom_id, self.eot_id)

    def special(self, name: str) -> int:
        """Id of a special token; an unknown name raises KeyError."""
        return self._special[name]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; special-token spellings in it are encoded as ordinary characters."""
        # Lone surrogates (from broken JSON escapes) have no UTF-8 form; they become U+FFFD.
        text = text.encode("utf-8", errors="replace").decode("utf-8") if not text.isascii() else text
        backend: Any = self._backend
        return (
            backend.encode_ordinary(text)
            if self._is_tiktoken
            else backend.encode(text, add_special_tokens=False).ids
        )

    def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
        """Text of ids; special tokens are dropped unless `keep_special`."""
        kept = [i for i in ids if keep_special or i < self.n_words]
        backend: Any = self._backend
        if self._is_tiktoken:
            return backend.decode(kept)
        return backend.decode(kept, skip_special_tokens=False)

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`; raises `CheckpointError` for a tiktoken tokenizer."""
        if self._is_tiktoken:
            raise CheckpointError("a tokenizer.model is copied, not written as tokenizer.json")
        backend: Any = self._backend
        temporary = path.with_name(path.name + ".tmp")
        backend.save(str(temporary))
        os.replace(temporary, path)

    @classmethod
    def load(cls, where: Path | str) -> "Tokenizer":
        """Read a `tokenizer.json`, a `tokenizer.model`, or the folder that holds one of them."""
        path = Path(where)
        if path.is_dir():
            found = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
            if not found:
                raise CheckpointError(f"{path}: holds neither tokenizer.json nor tokenizer.model")
            path = found[0]
        if not path.is_file():
            raise CheckpointError(f"{path}: no such tokenizer file")
        return _load_tiktoken(path) if path.suffix == ".model" else _load_json(path)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A byte-level BPE over `texts` with the Llama 3 pre-tokenisation; vocab_size counts the specials."""
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers, trainers

        backend = Backend(models.BPE())
        backend.pre_tokenizer = _pre_tokenizer()
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - N_SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        n_words = backend.get_vocab_size()
        if n_words != vocab_size - N_SPECIAL:
            raise CheckpointError(
                f"the texts hold only {n_words} distinct pieces, {vocab_size - N_SPECIAL} asked for: "
                "give more text or a smaller vocabulary"
            )
        return _with_specials(backend, n_words)


def _pre_tokenizer() -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _with_specials(backend: Any, n_words: int) -> Tokenizer:
    from tokenizers import AddedToken

    backend.add_special_tokens([AddedToken(name, special=True) for name in special_tokens()])
    backend.encode_special_tokens = True  # their spellings in text are ordinary characters
    return Tokenizer(backend, n_words)


def _load_json(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every kind of bad file
        raise CheckpointError(f"{path}: not a readable tokenizer.json ({error})") from error
    backend.encode_special_tokens = True
    n_words = backend.get_vocab_size(with_added_tokens=False)
    bos = backend.token_to_id("<|begin_of_text|>")
    if bos is None or bos != n_words:
        raise CheckpointError(f"{path}: the Llama 3 special tokens do not follow its {n_words} words")
    return Tokenizer(backend, n_words)


def _load_tiktoken(path: Path) -> Tokenizer:
    import tiktoken

    try:
        pairs: Sequence[list[bytes]] = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise CheckpointError(f"{path}: not a tiktoken file ({error})") from error
    special = {name: len(ranks) + i for i, name in enumerate(special_tokens())}
    encoding = tiktoken.Encoding(path.stem, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    return Tokenizer(encoding, len(ranks))
