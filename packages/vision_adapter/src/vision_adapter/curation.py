"""Steps that choose among pictures with captions: near-duplicates, rare words, captions that fit.

As the paper prepares its pairs (arXiv 2407.21783, section 7.1.1). Each step is a function of vectors or
texts; `curate_run` strings them together.
Axes: N pairs, D width of a vector.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from core_llm.data.near_duplicates import join, root, words
from core_llm.errors import UserError

_EXACT_UP_TO = 20_000  # pictures; more are searched in the cells of a k-means first
_PROBES = 8  # cells searched of each picture


def near_duplicates(vectors: np.ndarray, threshold: float) -> np.ndarray:
    """For each of N unit vectors [N, D], the number of the first picture of its group: int [N].

    Pictures whose cosine reaches the threshold are one group, and so is all that such links connect; the
    first of a group is the one to keep. Up to 20,000 pictures the search is exact; beyond, FAISS looks into
    the nearest cells of a k-means alone. Raises `UserError` where faiss is not installed or the threshold is
    not in (0, 1].
    """
    if not 0 < threshold <= 1:
        raise UserError(f"a threshold of duplicates lies above 0 and at most at 1, not at {threshold}")
    try:
        import faiss
    except ImportError as error:
        raise UserError("finding duplicates needs faiss: install it (`uv pip install faiss-cpu`)") from error
    n, width = vectors.shape
    group = list(range(n))
    if n == 0:
        return np.array(group, dtype=int)
    index: faiss.Index = faiss.IndexFlatIP(width)
    if n > _EXACT_UP_TO:
        cells = faiss.IndexIVFFlat(index, width, int(4 * n**0.5), faiss.METRIC_INNER_PRODUCT)
        cells.train(vectors)
        cells.nprobe, index = _PROBES, cells
    index.add(vectors)
    # Equal vectors may differ from 1 by rounding: a threshold of 1 must still find them.
    for start in range(0, n, 4096):
        limits, _, found = index.range_search(vectors[start : start + 4096], threshold - 1e-5)
        for row in range(len(limits) - 1):
            for other in found[limits[row] : limits[row + 1]]:
                join(group, start + row, int(other))
    return np.array([root(group, i) for i in range(n)])


def ngrams(caption: str, longest: int = 2) -> set[str]:
    """All different sequences of 1 to `longest` words."""
    said = words(caption)
    return {
        " ".join(said[start : start + n]) for n in range(1, longest + 1) for start in range(len(said) - n + 1)
    }


def ngram_counts(captions: Sequence[str], longest: int = 2) -> Counter[str]:
    """In how many captions each n-gram occurs: f."""
    return Counter(gram for caption in captions for gram in ngrams(caption, longest))


def keep_probability(
    caption: str, counts: Counter[str], rare: float, vocabulary: set[str] | None = None, longest: int = 2
) -> float:
    """How likely a pair is to be kept, so that frequent n-grams lose most of their pairs.

    A caption with an n-gram rarer than T = `rare` is always kept. Otherwise each n-gram of it is drawn with
    probability sqrt(T / f), f being its frequency, and the pair is kept if any was:
    1 - prod(1 - sqrt(T / f)).
    vocabulary: n-grams that count, by default all. A caption without one of them is kept.
    Source: arXiv 2407.21783, section 7.1.1.
    """
    grams = ngrams(caption, longest)
    grams = grams if vocabulary is None else grams & vocabulary
    lost = 1.0
    for gram in grams:
        frequency = counts[gram]
        if frequency <= rare:
            return 1.0
        lost *= 1 - (rare / frequency) ** 0.5
    return 1 - lost if grams else 1.0


def drawn(identity: str, probability: float, seed: int = 0) -> bool:
    """A coin whose side depends on identity and seed alone: a resumed run throws the same."""
    digest = hashlib.sha256(f"{seed}:{identity}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < probability


def clip_scores(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Cosine of each picture with its own caption: unit vectors [N, D] and [N, D] → [N]."""
    return np.einsum("nd,nd->n", images, texts)
