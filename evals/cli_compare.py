"""`evals compare`: a paired test of two runs."""

from pathlib import Path
from typing import Annotated

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
