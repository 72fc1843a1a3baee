"""HTML of verdicts and scorecards."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from demo.conversation import Turn

if TYPE_CHECKING:
    from guard import Verdict

_ROOT = Path(__file__).resolve().parent.parent


def bars(verdict: "Verdict") -> str:
    """The verdict as a badge, P(unsafe) and one bar per category."""
    from guard.taxonomy import CATEGORIES

    word = "unsafe" if verdict.unsafe else "safe"
    rows = [
        _bar(f"{code} · {name}", verdict.categories.get(code, 0.0), "category")
        for code, name in CATEGORIES.items()
    ]
    return (
        f'<div class="verdict"><span class="badge {word}">{word}</span>'
        f"{_bar('P(unsafe)', verdict.probability, word)}</div>"
        f'<div class="bars">{"".join(rows)}</div>'
    )


def _bar(name: str, share: float, kind: str) -> str:
    return (
        f'<div class="bar {kind}"><span class="label">{html.escape(name)}</span>'
        f'<span class="track"><span class="fill" style="width:{100 * share:.1f}%"></span></span>'
        f'<span class="value">{share:.3f}</span></div>'
    )


def guard_line(turn: Turn) -> str:
    """What the guard said about a turn, in one line."""
    said = [
        f'{side} <span class="badge {"unsafe" if verdict.unsafe else "safe"}">'
        f"{'unsafe' if verdict.unsafe else 'safe'} {verdict.probability:.2f}</span>"
        for side, verdict in (("you", turn.input_verdict), ("answer", turn.output_verdict))
        if verdict is not None
    ]
    if turn.withheld:
        what = {"input": "your message was blocked", "output": "the answer was blocked"}
        said.append(f'<span class="badge unsafe">{what.get(turn.blocked or "", "answer withheld")}</span>')
    line = f'<div class="guard-line">{" ".join(said)}</div>' if said else ""
    return line + _scores(turn)


def _scores(turn: Turn) -> str:
    """All scores behind the line, to be opened: of the message, and of the answer where it was judged."""
    shown = [
        f"<p>{side}</p>{bars(verdict)}"
        for side, verdict in (("you", turn.input_verdict), ("answer", turn.output_verdict))
        if verdict is not None
    ]
    return f"<details><summary>scores</summary>{''.join(shown)}</details>" if shown else ""


def results_files(work: Path) -> list[Path]:
    """results.json files: those of this folder's runs, newest first, then the committed ones."""
    own = sorted(work.glob("runs/**/results*.json"), key=lambda p: p.stat().st_mtime, reverse=True)
    return own + sorted((_ROOT / "docs" / "results").glob("*.json"))


def scorecard(paths: Sequence[Path]) -> str:
    """The scorecards of results files, one after the other."""
    from core_llm.errors import UserError
    from evals import report, results

    shown = []
    for path in paths:
        try:
            entries = results.read(path)
        except UserError as error:
            shown.append(f"<p>{html.escape(str(error))}</p>")
            continue
        if not entries:
            continue
        made = entries[0].get("provenance", {})
        facts = [str(made[key]) for key in ("model", "date", "command") if made.get(key)]
        shown.append(
            f'<p class="facts">{html.escape(path.name)} · {html.escape(" · ".join(facts))}</p>'
            f'<div class="scorecard">{report.table(entries)}</div>'
        )
    return "".join(shown) or (
        '<p class="facts">No results yet: <code>make quickstart</code> measures the model.</p>'
    )
