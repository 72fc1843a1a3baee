"""Near-duplicate texts: MinHash signatures find candidates, their exact overlap decides.

Texts are sets of letter n-grams after folding of case, width, punctuation and blanks; two are near-duplicates
where their Jaccard overlap reaches a threshold. MinHash and its banding: Broder 1997; Leskovec, Rajaraman and
Ullman, Mining of Massive Datasets, chapter 3.
"""

import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache

from core_llm.errors import UserError

LETTERS = 5  # of an n-gram
THRESHOLD = 0.8
_PERMUTATIONS = 128
_SEED = 1


def words(text: str) -> list[str]:
    """Lower-case words, punctuation left out."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower())


def folded(text: str) -> str:
    """Words of a text after NFKC, with one blank between them: what spelling and layout cannot change."""
    return " ".join(words(unicodedata.normalize("NFKC", text)))


def shingles(text: str) -> frozenset[str]:
    """The letter n-grams of a folded text; all of a text that is shorter; none of one without words."""
    said = folded(text)
    last = max(1, len(said) - LETTERS + 1)
    return frozenset(said[i : i + LETTERS] for i in range(last)) if said else frozenset()


def overlap(first: frozenset[str], second: frozenset[str]) -> float:
    """Jaccard overlap in [0, 1]; of two empty sets 0, because nothing is the same."""
    together = len(first | second)
    return len(first & second) / together if together else 0.0


def _hash(data: bytes) -> int:
    return zlib.crc32(data)


class NearDuplicates:
    """An index of texts that tells which of them a text is a near-duplicate of.

    Signatures only propose; a proposal counts where the n-grams overlap by `threshold`. The bands are chosen
    so that hardly any true pair is missed. Raises `UserError` for a threshold outside (0, 1].
    """

    def __init__(self, texts: Iterable[str] = (), threshold: float = THRESHOLD) -> None:
        from datasketch import MinHashLSH

        if not 0 < threshold <= 1:
            raise UserError(
                f"a threshold of near-duplicates lies above 0 and at most at 1, not at {threshold}"
            )
        self.threshold = threshold
        self._lsh = MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS, weights=(0.1, 0.9))
        self._known: list[frozenset[str]] = []
        for text in texts:
            self.add(text)

    def add(self, text: str) -> int:
        """Number of the text in the index, counted from 0."""
        grams, signature = _prepared(text)
        self._known.append(grams)
        if grams:
            self._lsh.insert(len(self._known) - 1, signature)
        return len(self._known) - 1

    def find(self, text: str) -> list[int]:
        """Numbers of the texts that this one is a near-duplicate of, in order."""
        grams, signature = _prepared(text)
        if not grams:
            return []
        proposed = sorted(self._lsh.query(signature))
        return [i for i in proposed if overlap(grams, self._known[i]) >= self.threshold]


@lru_cache(maxsize=4)  # a text is often asked for in several indexes, and then added to one
def _prepared(text: str) -> tuple[frozenset[str], object]:
    """n-grams and signature of a text."""
    grams = shingles(text)
    return grams, _signature(grams) if grams else None


def _signature(grams: frozenset[str]) -> object:
    from datasketch import MinHash

    signature = MinHash(num_perm=_PERMUTATIONS, seed=_SEED, hashfunc=_hash)
    signature.update_batch([gram.encode() for gram in grams])
    return signature


def groups(
    texts: Sequence[str],
    threshold: float = THRESHOLD,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> list[int]:
    """For each text the number of the first one of its group: all that links of near-duplicates connect.

    progress: wraps the texts, for a progress bar.
    """
    index = NearDuplicates(threshold=threshold)
    first: list[int] = []
    for number, text in enumerate(progress(texts)):
        first.append(number)
        for other in index.find(text):
            join(first, number, other)
        index.add(text)
    return [root(first, i) for i in range(len(first))]


def root(group: list[int], i: int) -> int:
    """The first member of the group of i, where `group` names for each member an earlier one."""
    while group[i] != i:
        group[i] = group[group[i]]  # halve the path
        i = group[i]
    return i


def join(group: list[int], a: int, b: int) -> None:
    """Make one group of two; the smaller number stays its first."""
    a, b = root(group, a), root(group, b)
    group[max(a, b)] = min(a, b)


def repeated(texts: Sequence[str], threshold: float = THRESHOLD) -> Iterator[bool]:
    """For each text whether it is a near-duplicate of one before it that was kept."""
    index = NearDuplicates(threshold=threshold)
    for text in texts:
        known = bool(index.find(text))
        if not known:
            index.add(text)
        yield known
