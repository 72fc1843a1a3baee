"""The README's numbers are those of the committed results files."""

import json
from pathlib import Path

import pytest

from core_llm.errors import UserError
from evals import readme

ROOT = Path(__file__).parent.parent.parent


def test_committed_readme_shows_the_committed_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    results = sorted((ROOT / "docs" / "results").glob("nano_*.json"))
    assert len(results) == 2
    assert readme.with_table(text, results) == text


def test_table_is_renewed_between_its_marks(tmp_path: Path) -> None:
    path = tmp_path / "nano_x.json"
    entry = {
        "task": "fsdd",
        "n": 1200,
        "section": "speech",
        "metrics": {"wer": {"value": 0.12, "ci95": [0.1, 0.14]}, "cer": {"value": 0.1, "ci95": [0.1, 0.1]}},
        "controls": {"shuffled audio": {"role": "control", "metrics": {"wer": {"value": 0.9}}}},
        "provenance": {"command": "evals run fsdd"},
    }
    path.write_text(json.dumps([entry]))
    text = readme.with_table(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter", [path])
    assert "| fsdd | 1,200 | wer ↓ | 0.120 | 0.100 – 0.140 | 0.900 shuffled audio |  |" in text
    assert "old" not in text and text.startswith("before") and text.endswith("after") and "cer" not in text
    assert "`docs/results/nano_x.json` by `evals run fsdd`" in text
    with pytest.raises(UserError, match="lost its marks"):
        readme.with_table("nothing", [path])
