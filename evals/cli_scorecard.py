"""`evals scorecard`: one model, everything that is known about it."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from core_llm.cli_tools import Switch

LIMIT = 500


def scorecard(
    model: Annotated[str, tyro.conf.Positional] = "nano",
    quick: Switch = 0,
    tasks: tuple[str, ...] = (),
    guard: str | None = None,
    data_root: Path | None = None,
    split: Literal["train", "dev", "all"] = "dev",
    limit: int = LIMIT,
    out: Path | None = None,
    records: Path | None = None,
    seed: int = 0,
) -> None:
    """Measure capability, safety, calibration, speed: one HTML page, one Markdown table, one JSON.

    The same command run again continues where it stopped. What the model or this machine cannot
    do is named on the page.

    Args:
        model: nano, a folder, a hub id, or what else `evals run --model` takes.
        quick: Bundled samples alone, about two minutes on two cores: no data, no network.
        tasks: Only these tasks; by default all that the model can do.
        guard: Guard whose effect is measured: nano, a folder or a hub id; by default the model's own.
        data_root: Folder with local copies of the datasets; without it they come from the hub.
        split: Which rows: dev is a fixed part that no trainer sees, all is every row there.
        limit: Ask at most this many rows per task (a fixed random choice).
        out: Folder for index.html, scorecard.md and scorecard.json; by default runs/scorecard/MODEL.
        records: Folder where every single answer is kept; by default OUT/records.
        seed: Seed of the subsets, the controls and the bootstrap.
    """
    from evals import scorecard_run
    from evals.tasks import Options

    plan = scorecard_run.Plan(model, Options(data_root, split, limit, seed), bool(quick), tasks, guard)
    folder = out or Path("runs/scorecard") / Path(model.rstrip("/")).name.replace(":", "-")
    measured = scorecard_run.run(plan, folder, records)
    for name in (scorecard_run.PAGE, scorecard_run.TABLE, scorecard_run.VALUES):
        print(folder / name)
    if measured.left_out:
        print(f"left out: {len(measured.left_out)}; the page says why")
