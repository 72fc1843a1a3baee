"""What is done with runs that are there: `evals compare`, a paired test of two; `evals export-inspect`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro


def compare(
    first: Annotated[Path, tyro.conf.Positional],
    second: Annotated[Path, tyro.conf.Positional],
    tasks: tuple[str, ...] = (),
    output: Path | None = None,
    seed: int = 0,
) -> None:
    """Compare two runs sample by sample: wins and losses, p-values, and what could not have been seen.

    Args:
        first: results.json of a run that was made with --output.
        second: The other one's; every difference is the second minus the first.
        tasks: Only these tasks.
        output: Write all figures here (JSON).
        seed: Seed of the bootstrap and of the permutations.
    """
    from evals.compare import run

    run(first, second, output, tasks, seed)
    if output is not None:
        print(f"comparison: {output}")


def export_inspect(
    results: Annotated[Path, tyro.conf.Positional],
    out: Path,
    tasks: tuple[str, ...] = (),
    data_root: Path | None = None,
    media: Literal["inside", "none"] = "inside",
) -> None:
    """Write a run as logs of Inspect, one per task: `inspect view --log-dir DIR` shows them.

    Args:
        results: results.json of a run that was made with --output.
        out: Folder for the logs.
        tasks: Only these tasks.
        data_root: Where the run had its datasets, for what was asked; without it they come from the hub.
        media: Put pictures and sounds inside the logs, or leave them out.
    """
    from evals.inspect_export import export

    for path in export(results, out, tasks, data_root, media == "inside"):
        print(path)
