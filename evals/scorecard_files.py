"""The scorecard's three files: a table in Markdown, values in JSON, and one page."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core_llm.files import write_text
from evals import report, scorecard, scorecard_rows, scorecard_sections
from evals.judge import default_judge
from evals.runner import Scored, metrics_json
from evals.scorecard_answers import Gap, effects
from evals.scorecard_calibration import Calibrated

if TYPE_CHECKING:
    from evals.scorecard_run import Measured

# Of the JSON's layout.
FORMAT = 1
COMPARISONS = (
    "Each interval is of its own score: among {n} rows about {expected:.0f} would leave a control by chance "
    "alone if none had a skill. Read a single surprising row with that in mind."
)


def write(measured: "Measured", out: Path) -> None:
    """Write all three; the JSON last, so that it is there when everything is."""
    from evals.scorecard_run import PAGE, TABLE, VALUES

    rows = scorecard_rows.rows(measured)
    sections = scorecard_sections.sections(measured)
    write_text(out / PAGE, report.page(measured.entries, measured.evaluations, sections, rows))
    write_text(out / TABLE, markdown(measured, rows))
    text = json.dumps(values(measured), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(out / VALUES, text + "\n")


def markdown(measured: "Measured", rows: Sequence[scorecard.Row]) -> str:
    """One table of everything, with what stands above and below it."""
    made = measured.provenance
    facts = [f"model {made['model']}", made["date"], made["hardware"], f"seed {made['seed']}"]
    lines = [f"# Scorecard of {made['model']}", "", " · ".join(facts), ""]
    lines += [f"| section | {' | '.join(scorecard.COLUMNS)} |", "|---" * (len(scorecard.COLUMNS) + 1) + "|"]
    section = ""
    for row in rows:
        cells = [row.section if row.section != section else "", *row.cells()]
        section = row.section
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    lines += ["", comparisons(rows), "", scorecard_sections.judge_line(measured)]
    trivial = scorecard_sections.trivial_line(measured)
    lines += ["", trivial] if trivial else []
    if measured.left_out:
        lines += ["", "Left out:", *(f"- {what}: {why}" for what, why in measured.left_out.items())]
    return "\n".join(lines) + "\n"


def comparisons(rows: Sequence[scorecard.Row]) -> str:
    """The note on many comparisons at once."""
    compared = sum(1 for row in rows if row.verdict)
    return COMPARISONS.format(n=compared, expected=compared * 0.05)


def values(measured: "Measured") -> dict[str, Any]:
    """The JSON: `tasks` is a list as in results.json, so that all readers of that one read it."""
    seed = measured.plan.options.seed
    return {
        "scorecard": FORMAT,
        "quick": measured.plan.quick,
        "guard": Path(measured.guard).name if measured.guard else None,
        "judge": default_judge().error.as_json(),
        "provenance": measured.provenance,
        "tasks": measured.entries,
        "guard_effect": {
            who: metrics_json(changes)
            for who, changes in (effects(measured.answers, seed) if measured.answers else {}).items()
        },
        "modality_gaps": [_gap(gap) for gap in measured.gaps],
        "calibration": [_calibration(each) for each in measured.calibration],
        "speed": [asdict(figure) for figure in measured.speed],
        "sizes": {
            kind: {"parameters": count, "bytes": size} for kind, (count, size) in measured.sizes.items()
        },
        "left_out": measured.left_out,
    }


def _gap(gap: Gap) -> dict[str, Any]:
    return {
        "setting": gap.setting,
        "who": gap.who,
        "form": gap.form,
        "metric": gap.metric,
        "n": gap.rows,
        "text": _number(gap.typed),
        "value": _number(gap.other),
        "gap": metrics_json({"gap": gap.estimate})["gap"],
        "seen": gap.seen,
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _calibration(each: Calibrated) -> dict[str, Any]:
    def scored(one: Scored | None) -> dict[str, Any] | None:
        return metrics_json(one.estimates) if one else None

    return {
        "task": each.task,
        "n": each.rows,
        "unsafe": each.unsafe,
        "metrics": scored(each.scored),
        "base_rate": scored(each.base_rate),
        "no_evidence": each.no_evidence,
        "after_temperature": scored(each.tempered),
        "temperatures": list(each.temperatures),
        "no_temperature": each.why,
        "bins": [asdict(b) for b in each.bins],
    }
