"""How much of an evaluation set stands in a training set: word n-grams that both have.

As in the Llama 3 paper (section 5.1.4) a row is contaminated where a given share of its words lies in n-grams
of the training set; there n is 8 tokens, and the share is chosen per benchmark.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core_llm.data.near_duplicates import words
from core_llm.errors import DataError, UserError
from evals.tasks.base import Options, Sample, Task

NGRAM = 8
SHARE = 0.5


@dataclass(frozen=True)
class RowOverlap:
    """One evaluation row: its words, and how many of them lie in an n-gram of the training set."""

    id: str
    words: int
    shared: int

    @property
    def share(self) -> float:
        return self.shared / self.words if self.words else 0.0


@dataclass(frozen=True)
class Overlap:
    """An evaluation set against a training set. Rows shorter than n words are counted apart."""

    n: int
    rows: list[RowOverlap]
    too_short: int
    texts: int  # of the training set

    def contaminated(self, share: float) -> list[RowOverlap]:
        """Rows of whose words at least this share is in the training set."""
        return [row for row in self.rows if row.shared and row.share >= share]


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Word n-grams in order; words are lower case and without punctuation."""
    said = words(text)
    return [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]


def overlap(evaluation: Sequence[tuple[str, str]], training: Iterable[str], n: int = NGRAM) -> Overlap:
    """Rows (id, text) against training texts, which are read once and not kept.

    Only the n-grams of the evaluation set are held in memory. Raises `UserError` for n below 1.
    """
    if n < 1:
        raise UserError(f"--n must be at least 1, not {n}")
    grams = {name: ngrams(text, n) for name, text in evaluation}
    wanted = {gram for row in grams.values() for gram in row}
    found: set[tuple[str, ...]] = set()
    texts = 0
    for text in training:
        texts += 1
        found.update(wanted.intersection(ngrams(text, n)))
    rows = [RowOverlap(name, len(row) + n - 1, _covered(row, found, n)) for name, row in grams.items() if row]
    return Overlap(n, rows, sum(1 for row in grams.values() if not row), texts)


def _covered(row: Sequence[tuple[str, ...]], found: set[tuple[str, ...]], n: int) -> int:
    """Words that lie in at least one n-gram that was found."""
    covered: set[int] = set()
    for i, gram in enumerate(row):
        if gram in found:
            covered.update(range(i, i + n))
    return len(covered)


def text_of(sample: Sample, labelled: bool = False) -> str:
    """What a row says: its messages, and its choices or its answer where these are text.

    labelled: the target is a label ("safe"), which is no text of the dataset.
    """
    said = " ".join(message.text for message in sample.messages)
    if labelled:
        return said
    more = [text.strip() for text in sample.choices or (sample.target,)]
    return " ".join([said, *(text for text in more if len(text) > 1 and text not in said)])


def rows_of(task: Task, options: Options) -> list[tuple[str, str]]:
    """Id and text of every row of a task."""
    labelled = task.section == "safety"
    return [(sample.id, text_of(sample, labelled)) for sample in task.load(options)]


def texts_of(where: str, data_root: Path | None) -> Iterator[str]:
    """Texts of a training set: a .jsonl or .txt file, or the train split of a registered dataset.

    A line of a .jsonl file holds "text" or "messages" (with "content"), else all strings of the line count.
    Raises `DataError` for a name that is neither, or a file that cannot be read.
    """
    from core_llm.data import sources

    path = Path(where)
    if path.is_file():
        yield from _file_texts(path)
    elif where.partition(":")[0] in sources.SOURCES:
        for row in sources.load(where, data_root, "train"):
            yield " ".join(_strings(row.fields))
    else:
        raise DataError(f"{where}: neither a file nor a dataset; known: {', '.join(sources.SOURCES)}")


def _file_texts(path: Path) -> Iterator[str]:
    from core_llm.data.tables import read_rows

    if path.suffix in (".jsonl", ".csv"):
        for row in read_rows(path):
            yield row["text"] if isinstance(row.get("text"), str) else " ".join(_strings(row))
        return
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                if line.strip():
                    yield line
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text ({error})") from error


def _strings(value: Any) -> Iterator[str]:
    """All strings in a row, in order; paths and bytes of media are no text."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _strings(part)


def as_json(task: str, train: str, found: Overlap, share: float) -> dict[str, Any]:
    """The finding with every row that is contaminated, most of all first."""
    rows = sorted(found.contaminated(share), key=lambda row: (-row.share, row.id))
    return {
        "task": task,
        "train": train,
        "n": found.n,
        "share": share,
        "rows": len(found.rows),
        "too_short": found.too_short,
        "training_texts": found.texts,
        "contaminated": len(rows),
        "contaminated_rows": [{**asdict(row), "share": round(row.share, 4)} for row in rows],
    }
