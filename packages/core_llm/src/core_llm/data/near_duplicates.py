"""Near-duplicate texts, all of them: an index of rare n-grams proposes pairs, their exact overlap decides.

Texts are sets of letter n-grams after folding of case, width, punctuation and blanks; two are near-duplicates
where their Jaccard overlap reaches a threshold. Prefix filtering: Chaudhuri, Ganti and Kaushik, A Primitive
Operator for Similarity Joins in Data Cleaning (ICDE 2006); Bayardo, Ma and Srikant, Scaling Up All Pairs
Similarity Search (WWW 2007).
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache

from core_llm.errors import UserError

LETTERS = 5  # of an n-gram
THRESHOLD = 0.8
_ROUNDING = 1e-9  # of a threshold times a number of n-grams


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
    shared = len(first & second)
    together = len(first) + len(second) - shared
    return shared / together if together else 0.0


class NearDuplicates:
    """An index of texts that tells which of them a text is a near-duplicate of; none is missed.

    Of two sets whose overlap reaches t, each holds at least a share t of itself in common with the other. So
    the rarest n-gram that they share is among the rarest n - ⌈t n⌉ + 1 of each: only these are looked up.
    common: texts that tell which n-grams are rare, by default those of the index; a matter of speed alone.
    Raises `UserError` for a threshold outside (0, 1].
    """

    def __init__(
        self, texts: Iterable[str] = (), threshold: float = THRESHOLD, common: Sequence[str] = ()
    ) -> None:
        if not 0 < threshold <= 1:
            raise UserError(
                f"a threshold of near-duplicates lies above 0 and at most at 1, not at {threshold}"
            )
        self.threshold = threshold
        texts = list(texts)
        self._count: Counter[str] = Counter()
        for text in common or texts:
            self._count.update(shingles(text))
        self._holders: defaultdict[str, list[int]] = defaultdict(list)
        self._known: list[frozenset[str]] = []
        for text in texts:
            self.add(text)

    def add(self, text: str) -> int:
        """Number of the text in the index, counted from 0."""
        grams = _shingles(text)
        for gram in self._rarest(grams):
            self._holders[gram].append(len(self._known))
        self._known.append(grams)
        return len(self._known) - 1

    def find(self, text: str) -> list[int]:
        """Numbers of the texts that this one is a near-duplicate of, in order."""
        grams = _shingles(text)
        proposed = {i for gram in self._rarest(grams) for i in self._holders.get(gram, ())}
        return [i for i in sorted(proposed) if overlap(grams, self._known[i]) >= self.threshold]

    def _rarest(self, grams: frozenset[str]) -> list[str]:
        """The n-grams one of which a near-duplicate must share; in one order for all texts, [] of none."""
        places = len(grams) - math.ceil(self.threshold * len(grams) - _ROUNDING) + 1
        rarest = sorted(gram for gram in grams if gram not in self._count)
        if len(rarest) < places:  # hardly ever in a search for leaks, which it makes fast
            counted = sorted(gram for gram in grams if gram in self._count)
            rarest += sorted(counted, key=self._count.__getitem__)
        return rarest[:places]


_shingles = lru_cache(maxsize=4)(shingles)  # a text is often asked for first and then added


def groups(
    texts: Sequence[str],
    threshold: float = THRESHOLD,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> list[int]:
    """For each text the number of the first one of its group: all that links of near-duplicates connect.

    progress: wraps the texts, for a progress bar.
    """
    index = NearDuplicates(threshold=threshold, common=texts)
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
    index = NearDuplicates(threshold=threshold, common=texts)
    for text in texts:
        known = bool(index.find(text))
        if not known:
            index.add(text)
        yield known
