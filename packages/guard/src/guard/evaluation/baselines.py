"""What a guard is held against: the majority, words without a model, a model without a guard's training.

Axes: N rows, C width of the core.
"""

import zlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from core_llm.chat import Message
from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer
from guard.evaluation.rows import Row

Floats = NDArray[np.float64]
# P(unsafe) [N] of the last argument's rows after learning from the first argument's.
Learner = Callable[[Sequence[Row], Sequence[Row]], Floats]

FOLDS = 5
_LONGEST_TURN = 256  # tokens of what was said before and of the judged message that are embedded
_BATCH = 32
_STRENGTHS = (0.001, 0.01, 0.1, 1.0)  # of the linear head: inverse regularisation


def majority(train: Sequence[Row], asked: Sequence[Row]) -> Floats:
    """The share of unsafe rows in training as everyone's probability."""
    return np.full(len(asked), np.mean([row.label for row in train]))


def tfidf(train: Sequence[Row], asked: Sequence[Row]) -> Floats:
    """Logistic regression over TF-IDF of words and word pairs, see `tfidf_probabilities`."""
    labels = [row.label for row in train]
    return tfidf_probabilities([row.messages for row in train], labels, [row.messages for row in asked])


def tfidf_probabilities(
    train: Sequence[Sequence[Message]], labels: Sequence[int], asked: Sequence[Sequence[Message]]
) -> Floats:
    """P(unsafe) [N] of a logistic regression over TF-IDF of words and word pairs, one bag per role."""
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    known, new = [], []
    for role in ("user", "assistant"):
        texts = _by_role(train, role)
        if not any(texts):
            continue
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
        known.append(vectorizer.fit_transform(texts))
        new.append(vectorizer.transform(_by_role(asked, role)))
    model = LogisticRegression(max_iter=1000).fit(hstack(known), np.asarray(labels))
    return np.asarray(model.predict_proba(hstack(new))[:, 1])


def _by_role(conversations: Sequence[Sequence[Message]], role: str) -> list[str]:
    return [
        " ".join(message.text for message in messages if message.role == role) for messages in conversations
    ]


class LinearHead:
    """Logistic regression on a core's embeddings: what the core knows before anyone made a guard of it.

    A row is the mean final hidden state of what was said before, and that of the judged message [2 C],
    standardised. How strongly the head is regularised is chosen on folds of the training rows.
    """

    def __init__(self, core: Llama, tokenizer: Tokenizer) -> None:
        self.core, self.tokenizer = core, tokenizer
        self._known: dict[str, NDArray[np.float32]] = {}

    def __call__(self, train: Sequence[Row], asked: Sequence[Row]) -> Floats:
        """P(unsafe) [N] of `asked`."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import log_loss
        from sklearn.preprocessing import StandardScaler

        scale = StandardScaler().fit(self._features(train))
        known, new = (scale.transform(self._features(rows)) for rows in (train, asked))
        labels = np.array([row.label for row in train])
        inner = np.array([fold_of(row.group) == 0 for row in train])

        def head(strength: float, x: Floats, y: NDArray[np.int64]) -> LogisticRegression:
            return LogisticRegression(C=strength, max_iter=500).fit(x, y)

        best = _STRENGTHS[1]
        if len(set(labels[inner])) == len(set(labels[~inner])) == 2:
            losses = [
                log_loss(
                    labels[inner], head(c, known[~inner], labels[~inner]).predict_proba(known[inner])[:, 1]
                )
                for c in _STRENGTHS
            ]
            best = _STRENGTHS[int(np.argmin(losses))]
        return np.asarray(head(best, known, labels).predict_proba(new)[:, 1])

    def _features(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        pairs = [(" ".join(m.text for m in row.messages[:-1]), row.messages[-1].text) for row in rows]
        self._embed(sorted({text for pair in pairs for text in pair if text not in self._known}, key=len))
        return np.stack([np.concatenate([self._known[text] for text in pair]) for pair in pairs])

    def _embed(self, texts: Sequence[str]) -> None:
        """Mean final hidden state [C] of each text, zeros for an empty one."""
        import torch
        from tqdm import tqdm

        device = self.core.embed_tokens.weight.device
        with tqdm(total=len(texts), desc="embeddings", unit="text", leave=False) as bar:
            for start in range(0, len(texts), _BATCH):
                batch = texts[start : start + _BATCH]
                ids = [self.tokenizer.encode(text)[:_LONGEST_TURN] for text in batch]
                rows = [[self.tokenizer.bos_id, *each] for each in ids]
                width = max(map(len, rows))
                padded = [row + [self.tokenizer.pad_id] * (width - len(row)) for row in rows]
                with torch.inference_mode():
                    # Attention is causal: the padding behind a row changes nothing in it.
                    hidden = self.core.hidden(torch.tensor(padded, device=device)).float().cpu()
                for text, each, states in zip(batch, ids, hidden, strict=True):
                    mean = states[1 : 1 + len(each)].mean(0) if each else torch.zeros_like(states[0])
                    self._known[text] = mean.numpy()
                bar.update(len(batch))


def fold_of(group: str) -> int:
    """A stable fold: rows that share a context stay together."""
    return zlib.crc32(group.encode(errors="replace")) % FOLDS


def probabilities(
    learner: Learner, train: Sequence[Row], fallback: Sequence[Row], asked: Sequence[Row], most: int
) -> tuple[Floats, str]:
    """P(unsafe) [N] of `asked` by a learner that saw none of them, and what it learnt from, in words.

    It learns from the set's own train rows; where these are missing or all alike, from `fallback` (the train
    rows of all sets of the run); where those are too, from the asked rows themselves, out of fold.
    most: of more train rows so many are taken, spread evenly.
    """
    for rows, source in ((train, "own train rows"), (fallback, "train rows of all sets")):
        if len({row.label for row in rows}) == 2:
            return learner(_spread(rows, most), asked), source
    fold = np.array([fold_of(row.group) for row in asked])
    found = np.full(len(asked), np.nan)
    for number in sorted(set(fold.tolist())):
        rest = [row for row, own in zip(asked, fold, strict=True) if own != number]
        held = np.flatnonzero(fold == number)
        labels = {row.label for row in rest}
        if len(labels) == 2:
            found[held] = learner(rest, [asked[i] for i in held.tolist()])
        elif labels:
            found[held] = float(labels.pop())
    return found, "the other test rows (out of fold)"


def _spread(rows: Sequence[Row], most: int) -> Sequence[Row]:
    n = len(rows)
    return rows if n <= most else [rows[i * n // most] for i in range(most)]
