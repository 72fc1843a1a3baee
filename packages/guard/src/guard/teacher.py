"""A bag-of-n-grams teacher for the guard's training: logistic regression on TF-IDF.

A small model trained on few conversations overfits hard labels; the teacher's out-of-fold probabilities
smooth them. Distillation: arXiv 1503.02531. The same regression is the baseline that the guard is
measured against (`baseline_scores`).
"""

import zlib
from collections.abc import Sequence

import numpy as np

Pair = tuple[str, str]  # what was said before (may be empty), and the message that is judged

# (field of a Pair, settings of its vectorizer)
_FEATURES = [
    (field, settings)
    for field in (0, 1)
    for settings in (
        {"ngram_range": (1, 2), "min_df": 2, "sublinear_tf": True},
        {"analyzer": "char_wb", "ngram_range": (2, 5), "min_df": 3, "sublinear_tf": True},
    )
]


def out_of_fold(pairs: Sequence[Pair], labels: Sequence[int], folds: int = 5) -> np.ndarray:
    """P(unsafe) [N] of every pair from a regression that saw neither it nor its context."""
    # The fold is a stable hash of the context: conversations that share one stay together.
    fold = np.array([zlib.crc32(context.encode(errors="replace")) % folds for context, _ in pairs])
    target = np.asarray(labels)
    probability = np.zeros(len(pairs))
    for number in range(folds):
        held_out = np.flatnonzero(fold == number)
        rest = np.flatnonzero(fold != number)
        if not len(held_out) or len(set(target[rest])) < 2:
            probability[held_out] = target.mean()
            continue
        probability[held_out] = _fit_predict(
            [pairs[i] for i in rest.tolist()], target[rest], [pairs[i] for i in held_out.tolist()]
        )
    return probability


def _fit_predict(pairs: Sequence[Pair], labels: np.ndarray, others: Sequence[Pair]) -> np.ndarray:
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    known, new = [], []
    for column, settings in _FEATURES:
        vectorizer = TfidfVectorizer(**settings)
        try:
            known.append(vectorizer.fit_transform([pair[column] for pair in pairs]))
        except ValueError:
            continue  # nothing frequent enough in this field
        new.append(vectorizer.transform([pair[column] for pair in others]))
    if not known:
        return np.full(len(others), labels.mean())
    model = LogisticRegression(C=1.0, solver="liblinear").fit(hstack(known).tocsr(), labels)
    return model.predict_proba(hstack(new).tocsr())[:, 1]


def baseline_scores(train: Sequence[Pair], labels: Sequence[int], dev: Sequence[Pair]) -> np.ndarray:
    """Scores [N] of the plain baseline: logistic regression on TF-IDF of words and word pairs."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    features = vectorizer.fit_transform([" ".join(pair).strip() for pair in train])
    model = LogisticRegression(solver="liblinear").fit(features, np.asarray(labels))
    return model.predict_proba(vectorizer.transform([" ".join(pair).strip() for pair in dev]))[:, 1]
