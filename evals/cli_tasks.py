"""Commands about tasks: what there is, and how much of one stands in a training set."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table

    from evals.tasks import Task


def list_tasks(section: Literal["text", "vision", "speech", "safety"] | None = None) -> None:
    """Show the tasks by section; with a section also prompt, source, licence and paper of each.

    Args:
        section: Only this one, in full.
    """
    from rich.console import Console

    from evals.tasks import registry

    console = Console()
    console = console if console.is_terminal else Console(width=170)
    tasks = list(registry().values())
    if section is None:
        for name in dict.fromkeys(task.section for task in tasks):
            console.print(_short([task for task in tasks if task.section == name], name))
        print(
            "`evals list --section SECTION` shows prompts, sources, licences and papers. Beside these:\n"
            "any task of lm_eval as lm:NAME; one language as fleurs:de_de, mls:german, covost:de_en;\n"
            "your own training text as memorisation:FILE."
        )
        return
    for task in tasks:
        if task.section == section:
            _in_full(console, task)


def _short(tasks: "Sequence[Task]", section: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=section, title_justify="left")
    for column in ("task", "what", "metrics", "needs", "rows"):
        table.add_column(column, no_wrap=column == "task")
    for task in tasks:
        rows = "bundled" if task.bundled else task.source.partition(" (")[0].partition(",")[0]
        table.add_row(task.name, task.title, ", ".join(task.metrics[:2]), ", ".join(task.needs), rows)
    return table


def _in_full(console: "Console", task: "Task") -> None:
    """All that a task states about itself, one fact per line."""
    facts = {
        "what": task.title,
        "prompt": task.prompt_format.replace("\n", " / "),
        "solved examples": str(task.fewshot) if task.fewshot else "",
        "metrics": ", ".join(task.metrics),
        "controls": ", ".join(control.name for control in task.controls),
        "needs": ", ".join(task.needs),
        "rows": "bundled: " * task.bundled + task.source,
        "licence": task.licence,
        "paper": task.citation,
        "install": f"pip install 'llama-herd[{task.extra}]'" if task.extra else "",
    }
    console.print(f"[bold]{task.name}[/bold]")
    for name, fact in facts.items():
        if fact:
            console.print(f"  {name}: {fact}", markup=False, highlight=False, soft_wrap=True)


def contamination(
    task: Annotated[str, tyro.conf.Positional],
    train: str,
    data_root: Path | None = None,
    split: Literal["dev", "all"] = "dev",
    limit: int | None = None,
    seed: int = 0,
    n: int = 8,
    share: float = 0.5,
    output: Path | None = None,
) -> None:
    """Count the rows of a task that stand in a training set: words in n-grams that both have.

    Args:
        task: Name of a task; `evals list` shows them.
        train: The training set: a .jsonl or .txt file, or a dataset's name such as gsm8k (its train split).
        data_root: Folder with local copies of the datasets; without it they come from the hub.
        split: Which rows of the task: dev is the part that is evaluated, all is every row there.
        limit: Look at no more than this many rows (a fixed random choice).
        seed: Seed of that choice.
        n: Length of an n-gram in words.
        share: A row counts as contaminated when this share of its words lies in shared n-grams.
        output: Write the finding with every contaminated row here (JSON).
    """
    from core_llm.errors import UserError
    from core_llm.files import check_writable, write_json
    from evals import contamination as found_in
    from evals.tasks import Options, find

    if not 0 < share <= 1:
        raise UserError(f"--share must lie above 0 and at most at 1, not {share}")
    if output is not None:
        check_writable(output)
    rows = found_in.rows_of(find([task])[0], Options(data_root, split, limit, seed))
    found = found_in.overlap(rows, found_in.texts_of(train, data_root), n)
    finding = found_in.as_json(task, train, found, share)
    for level in sorted({0.2, share, 0.8}):
        count = len(found.contaminated(level))
        print(f"{count:6} of {len(found.rows)} rows have at least {level:.0%} of their words in {train}")
    if found.too_short:
        print(f"{found.too_short:6} rows have fewer than {n} words and cannot be looked for")
    if output is not None:
        write_json(output, finding)
        print(f"finding: {output}")
