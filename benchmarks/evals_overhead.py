"""Which part of an evaluation is not the model's: a log-likelihood run of the bundled model, 10,000 rows.

The rows are generated (scenes told in words, a question, its answer), written in the layout of GSM8K, and
asked as `evals run text-perplexity --data-root DIR --output FILE` asks them: data read, prompts digested,
every answer synced to disk, scores with their intervals and the control, files written. What is inside
`Model.loglikelihood` (chat format, tokens, forward passes) is the model's; all else is the harness's. Both
are of one run, so the share sees one machine. A second run in another folder must give the same files; a
third one in the first's folder asks nothing and is all harness.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from reporting import provenance, save, show  # noqa: E402

from core_llm.chat import Message  # noqa: E402
from core_llm.data.scenes import describe, questions, sample_scene  # noqa: E402
from evals import models, run  # noqa: E402
from evals.tasks import Options, find  # noqa: E402

LIMIT = 0.15  # share of the time that may be spent outside the model
TASK = "text-perplexity"


class Timed(models.Subject):
    """The bundled model, with the time that it takes."""

    seconds = 0.0
    asked = 0

    def loglikelihood(
        self, conversations: Sequence[Sequence[Message]], answers: Sequence[str]
    ) -> list[tuple[float, int]]:
        started = time.perf_counter()
        found = super().loglikelihood(conversations, answers)
        self.seconds += time.perf_counter() - started
        self.asked += len(answers)
        return found


def write_rows(root: Path, count: int) -> None:
    """`count` questions in the layout of GSM8K's test split."""
    folder = root / "gsm8k"
    folder.mkdir(parents=True)
    lines = []
    for i in range(count):
        rng = random.Random(f"evals overhead {i}")
        scene = sample_scene(rng, rng.choice(("single", "several", "word")))
        question = questions(scene, rng, 1)[0]
        told = f"Scene {i}. {describe(scene, rng)} {question.text}"
        lines.append(json.dumps({"question": told, "answer": f"The answer is {question.answer}."}))
    (folder / "train.jsonl").write_text("")
    (folder / "test.jsonl").write_text("\n".join(lines) + "\n")


def measure(name: str, folder: Path, data: Path, profile: bool) -> dict[str, Any]:
    """One run: its seconds, the model's, and the share of the rest."""
    subject = Timed("nano")
    subject.bare  # noqa: B018  (weights are read before the clock starts)
    run.open_model = lambda spec, **more: subject  # type: ignore[assignment, misc]
    watch = cProfile.Profile()
    started = time.perf_counter()
    if profile:
        watch.enable()
    run.run_tasks(find([TASK]), "nano", Options(data, "all"), folder / "records", folder / "out.json")
    watch.disable()
    total = time.perf_counter() - started
    if profile:
        pstats.Stats(watch).sort_stats("cumulative").print_stats(45)
    return {
        "run": name,
        "rows": subject.asked,
        "seconds": round(total, 2),
        "in_model": round(subject.seconds, 2),
        "outside": round(total - subject.seconds, 2),
        "share_outside": round(1 - subject.seconds / total, 4),
    }


def main() -> None:
    """Measure, check and write results/evals_overhead.csv; exit status 1 where a promise is not kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--profile", action="store_true", help="print where the time goes; write no results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        write_rows(root / "data", arguments.rows)
        first, second = root / "first", root / "second"
        table = [measure("first", first, root / "data", arguments.profile)]
        if not arguments.profile:
            table.append(measure("second", second, root / "data", False))
            table.append(measure("again", first, root / "data", False))
        show(table)
        if arguments.profile:
            return
        files = ("out.samples.jsonl", f"records/{TASK}.jsonl")
        equal = all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
    print(f"two runs give equal files: {equal}")
    save(HERE / "results" / "evals_overhead.csv", table, provenance(("torch", "numpy")))
    if not equal or table[0]["share_outside"] > LIMIT:
        sys.exit(1)


if __name__ == "__main__":
    main()
