"""Requests with a known label for the dataset registry: safe ones that look unsafe, and unsafe ones.

Every row has "prompt", "kind" (the dataset's own category) and "label" (1: a good answer refuses, or the text
is hateful; 0: a refusal is wrong).
"""

import csv
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from core_llm.data.rows import Row, Source

# group (rows that must stay together) and fields of a row.
_Fields = Callable[[dict[str, Any]], tuple[str, dict[str, Any]]]


def _xstest(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    # A safe prompt and its unsafe contrast turn on the same word.
    fields = {"prompt": row["prompt"], "kind": row["type"], "label": _label(row, "unsafe", "safe")}
    return f"{row['type'].removeprefix('contrast_')}-{row['focus']}", fields


def _hatecheck(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    label = _label(row, "hateful", "non-hateful", column="label_gold")
    fields = {"prompt": row["test_case"], "kind": row["functionality"], "label": label}
    # Cases made of one template differ in the group that is named.
    template = str(row.get("templ_id") or "")
    return template or str(row["case_id"]), fields


def _label(row: dict[str, Any], unsafe: str, safe: str, column: str = "label") -> int:
    value = str(row[column]).strip().lower()
    if value not in (unsafe, safe):
        raise ValueError(f"{column} is '{row[column]}', neither '{unsafe}' nor '{safe}'")
    return int(value == unsafe)


def _strongreject(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    prompt = row.get("forbidden_prompt") or row["prompt"]
    return prompt, {"prompt": prompt, "kind": row["category"], "label": 1}


def _harmbench(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    behaviour = row.get("Behavior") or row["prompt"]
    context = row.get("ContextString") or row.get("context") or ""
    kind = row.get("SemanticCategory") or row.get("category") or ""
    # HarmBench itself puts the context before the request, with a line between.
    prompt = f"{context}\n\n---\n\n{behaviour}" if context else behaviour
    return behaviour, {"prompt": prompt, "kind": kind, "label": 1}


def _local(name: str, file: str, fields: _Fields) -> Callable[[Path], Iterator[Row]]:
    def read(folder: Path) -> Iterator[Row]:
        with open(folder / file, encoding="utf-8", newline="") as opened:
            yield from _rows(name, csv.DictReader(opened), fields)

    return read


def _hub(name: str, fields: _Fields) -> Callable[[Iterable[dict[str, Any]], str], Iterator[Row]]:
    def read(rows: Iterable[dict[str, Any]], split: str) -> Iterator[Row]:
        # These are test sets however a hub copy calls its one part: the hash of the group splits.
        yield from _rows(name, rows, fields)

    return read


def _rows(name: str, rows: Iterable[dict[str, Any]], fields: _Fields) -> Iterator[Row]:
    for i, row in enumerate(rows):
        yield Row(f"{name}-{i}", *fields(row))


SAFETY = (
    Source(
        name="xstest",
        title="XSTest",
        licence="CC BY 4.0",
        homepage="https://github.com/paul-rottger/xstest",
        hub=("Paul/XSTest", None),
        dev_fraction=1.0,
        read_local=_local("xstest", "xstest_prompts.csv", _xstest),
        read_hub=_hub("xstest", _xstest),
    ),
    Source(
        name="hatecheck",
        title="HateCheck",
        licence="CC BY 4.0",
        homepage="https://github.com/paul-rottger/hatecheck-data",
        hub=("Paul/hatecheck", None),
        dev_fraction=1.0,
        read_local=_local("hatecheck", "test_suite_cases.csv", _hatecheck),
        read_hub=_hub("hatecheck", _hatecheck),
    ),
    Source(
        name="strongreject",
        title="StrongREJECT",
        licence="MIT",
        homepage="https://github.com/alexandrasouly/strongreject",
        hub=("walledai/StrongREJECT", None),
        dev_fraction=1.0,
        read_local=_local("strongreject", "strongreject_dataset.csv", _strongreject),
        read_hub=_hub("strongreject", _strongreject),
    ),
    Source(
        name="harmbench",
        title="HarmBench, text behaviours",
        licence="MIT",
        homepage="https://github.com/centerforaisafety/HarmBench",
        hub=("walledai/HarmBench", "standard"),  # asks for an agreement first; the columns are unconfirmed
        dev_fraction=1.0,
        read_local=_local("harmbench", "harmbench_behaviors_text_all.csv", _harmbench),
        read_hub=_hub("harmbench", _harmbench),
    ),
)
