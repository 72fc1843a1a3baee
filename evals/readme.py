"""The table of the README, written from the committed results files so that it can never drift from them."""

from collections.abc import Sequence
from pathlib import Path

from core_llm.errors import UserError
from core_llm.files import write_text
from evals import scorecard
from evals.results import Entry, read

BEGIN = "<!-- results: written by `evals reproduce-nano`, checked by the tests -->"
END = "<!-- /results -->"


def table(results: Sequence[Path]) -> str:
    """Markdown: one row per task with its headline metric, and the command behind every file."""
    lines = [
        "| task | rows | metric | score | 95 % interval | control | reference |",
        "|---|---|---|---|---|---|---|",
    ]
    made = []
    for path in results:
        entries = read(path)
        for row in scorecard.rows(entries):
            if row.main:
                cells = (
                    row.task,
                    f"{row.n:,}",
                    row.metric,
                    row.score,
                    row.interval,
                    row.control,
                    row.reference,
                )
                lines.append(f"| {' | '.join(cells)} |")
        made.append(f"`docs/results/{path.name}` by `{_command(entries)}`")
    return "\n".join([*lines, "", f"Made by: {'; '.join(made)}."])


def _command(entries: Sequence[Entry]) -> str:
    return entries[0]["provenance"]["command"] if entries else ""


def with_table(text: str, results: Sequence[Path]) -> str:
    """The README's text with its table renewed; raises `UserError` where the marks are missing."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UserError(f"the README has lost its marks {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{table(results)}\n{END}{tail}"


def update(readme: Path, results: Sequence[Path]) -> None:
    """Rewrite the table in place."""
    write_text(readme, with_table(readme.read_text(encoding="utf-8"), results))
