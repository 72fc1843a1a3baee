"""The scorecard: entries of results.json as rows of text, for the terminal, the report and the demo."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from core_llm.stats import LOWER_IS_BETTER
from evals.results import Entry

SECTIONS = ("text", "vision", "speech", "safety", "speed")
COLUMNS = ("task", "what", "rows", "metric", "score", "95 % interval", "control", "reference", "verdict")
_PLAIN = frozenset({"perplexity"})  # not a share: shown as a number


@dataclass(frozen=True)
class Row:
    """One metric of one task as text. `main` marks the headline; other metrics follow it."""

    section: str
    task: str
    title: str
    n: int
    metric: str
    score: str
    interval: str
    control: str
    reference: str
    verdict: str
    main: bool

    def cells(self) -> tuple[str, ...]:
        """The text of each of `COLUMNS`; what belongs to the task is shown once."""
        once = (self.task, self.title, f"{self.n:,}") if self.main else ("", "", "")
        return (*once, self.metric, self.score, self.interval, self.control, self.reference, self.verdict)


def number(metric: str, value: float | None) -> str:
    """A score as text: shares with three decimals."""
    if value is None:
        return "undefined"
    return f"{value:.2f}" if metric in _PLAIN else f"{value:.3f}"


def arrow(metric: str) -> str:
    """The metric's name with the direction that is better."""
    return f"{metric} {'↓' if metric in LOWER_IS_BETTER else '↑'}"


def _beside(entry: Entry, metric: str, role: str) -> str:
    """The control that is hardest to beat (or all references) with its value."""
    found = [
        (name, control["metrics"][metric]["value"])
        for name, control in entry.get("controls", {}).items()
        if control["role"] == role
        and metric in control["metrics"]
        and control["metrics"][metric]["value"] is not None
    ]
    if not found:
        return ""
    best = min if metric in LOWER_IS_BETTER else max
    name, value = best(found, key=lambda pair: pair[1])
    return f"{number(metric, value)} {name}"


def _verdict(entry: Entry) -> str:
    if entry.get("no_evidence_against"):
        return "no evidence"
    if any(control["role"] == "control" for control in entry.get("controls", {}).values()):
        return "beats its controls"
    return "bit-equal" if entry["task"] == "text-regression" and _headline(entry)["value"] == 1.0 else ""


def _headline(entry: Entry) -> dict[str, Any]:
    return next(iter(entry["metrics"].values()))


def rows(entries: Sequence[Entry]) -> list[Row]:
    """All rows in the order of the sections."""
    ordered = sorted(entries, key=lambda e: SECTIONS.index(e.get("section", "text")))
    result = []
    for entry in ordered:
        for i, (metric, estimate) in enumerate(entry["metrics"].items()):
            low, high = estimate["ci95"]
            result.append(
                Row(
                    section=entry.get("section", "text"),
                    task=entry["task"],
                    title=entry.get("title", ""),
                    n=entry["n"],
                    metric=arrow(metric),
                    score=number(metric, estimate["value"]),
                    interval="" if low is None else f"{number(metric, low)} – {number(metric, high)}",
                    control=_beside(entry, metric, "control"),
                    reference=_beside(entry, metric, "reference"),
                    verdict=_verdict(entry) if i == 0 else "",
                    main=i == 0,
                )
            )
    return result


def show(entries: Sequence[Entry]) -> None:
    """Print the scorecard."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    table = Table(box=box.SIMPLE_HEAD, title="Scorecard", title_justify="left", header_style="bold")
    for column in COLUMNS:
        if column != "what":
            table.add_column(
                column, justify="right" if column in ("rows", "score") else "left", no_wrap=column == "task"
            )
    section = ""
    for row in rows(entries):
        if row.section != section:
            section = row.section
            table.add_section()
            table.add_row(Text(section.upper(), style="bold cyan"))
        task, _, *others, verdict = row.cells()
        style = "yellow" if verdict == "no evidence" else "green"
        table.add_row(task, *others, Text(verdict, style=style), style="" if row.main else "dim")
    console.print(table)
    if any(entry.get("no_evidence_against") for entry in entries):
        console.print(
            "no evidence: score and control cannot be told apart, so it may owe nothing to the skill."
        )
