"""`evals`: measure a model, print the scorecard, write the report."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from core_llm import cli_tools
from evals.cli_compare import compare as compare_runs
from evals.cli_compare import export_inspect
from evals.cli_safety import attacked, attacks, judge
from evals.cli_scaling import scaling
from evals.cli_scorecard import scorecard
from evals.cli_tasks import contamination, list_tasks


def run(
    tasks: Annotated[list[str], tyro.conf.Positional],
    model: str = "nano",
    data_root: Path | None = None,
    split: Literal["train", "dev", "all"] = "dev",
    limit: int | None = None,
    output: Path | None = None,
    report: Path | None = None,
    seed: int = 0,
    records: Path = Path("runs/evals"),
    quantize: Literal["int8", "int4", "fp8"] | None = None,
    guard: str | None = None,
    guard_on: str = "input,output",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    attack: str | None = None,
) -> None:
    """Run tasks with their controls; the same command run again continues where it stopped.

    Args:
        tasks: Names of tasks; `evals list` shows them.
        model: nano; a folder with core/, vision_adapter/, speech_adapter/ and guard/; a folder or hub id of a
            Llama; hf:ID is any model of transformers; openai:URL[#NAME] a server that speaks OpenAI's
            protocol; whisper:NAME or whisper:PATH.pt openai-whisper, for transcription.
        data_root: Folder with local copies of the datasets; without it they come from the hub.
        split: Which rows: dev is a fixed part that no trainer sees, all is every row there.
        limit: Ask at most this many rows per task (a fixed random choice).
        output: Write results.json here, and every answer with its score beside it (.samples.jsonl).
        report: Write an HTML report into this folder.
        seed: Seed of the subset, the shuffled controls and the bootstrap.
        records: Folder where every single answer is kept, for resuming and re-scoring.
        quantize: Bring the core into this form first; `evals quantization` compares all of them.
        guard: Ask through this guard: nano, a folder, or a hub id.
        guard_on: Where it checks: input, output, or both with a comma.
        device: Where the model stands: cpu, cuda, or auto (a GPU where there is one for each process).
        attack: Ask the requests of a safety task also in other forms, and give the difference to plain on the
            same rows: names with commas, or a+b for a, then b; `evals attacks` shows them.
    """
    from evals.run import run_tasks
    from evals.tasks import Options, find

    chosen = attacked(find(tasks), attack, seed)
    options = Options(data_root, split, limit, seed)
    sides = tuple(side.strip() for side in guard_on.split(",")) if guard else ()
    path = run_tasks(chosen, model, options, records, output, report, quantize, guard, sides, device)
    if output is not None:
        print(f"results: {output}")
    if path is not None:
        print(f"report:  {path}")


def quickstart(model: str = "nano", out: Path = Path("runs/quickstart"), seed: int = 0) -> None:
    """Run the bundled samples over text, vision, speech and safety: no data, no network, no GPU.

    Args:
        model: nano, or a model's folder.
        out: Folder for the report, results.json and the single answers.
        seed: Seed of the controls and the bootstrap.
    """
    from evals.run import run_tasks
    from evals.tasks import QUICKSTART, Options, find

    path = run_tasks(
        find(list(QUICKSTART)), model, Options(seed=seed), out / "records", out / "results.json", out
    )
    assert path is not None
    print(
        f"report:  {path}  (open it in a browser)\n"
        f"results: {out / 'results.json'}\n\n"
        "What to do next:\n"
        "  make demo                            talk to the model: text, images, your voice\n"
        "  make serve                           the guard behind POST /v1/moderations\n"
        "  .venv/bin/evals list                 every task, with source and licence\n"
        "  .venv/bin/evals run easy-vqa fsdd guard-diasafety --data-root DIR --report runs/full"
    )


def quantization(
    tasks: Annotated[list[str], tyro.conf.Positional],
    output: Path,
    model: str = "nano",
    data_root: Path | None = None,
    split: Literal["train", "dev", "all"] = "dev",
    limit: int | None = None,
    seed: int = 0,
    records: Path = Path("runs/evals"),
) -> None:
    """Measure what int8, int4 and fp8 cost: the same rows asked of each, and the paired difference.

    Args:
        tasks: Names of tasks that ask the core, such as text-perplexity and text-qa.
        output: Write the results here (JSON).
        model: nano, or a model's folder.
        data_root: Folder with local copies of the datasets; without it they come from the hub.
        split: Which rows: dev is a fixed part that no trainer sees, all is every row there.
        limit: Ask at most this many rows per task (a fixed random choice).
        seed: Seed of the subset and the bootstrap.
        records: Folder where every single answer is kept; the same command continues an interrupted run.
    """
    from evals.quantization import compare
    from evals.tasks import Options, find

    compare(find(tasks), model, Options(data_root, split, limit, seed), records, output)
    print(f"results: {output}")


def reproduce_nano(
    data_root: Path | None = None, out: Path = Path("runs/nano"), seed: int = 0, install: bool = True
) -> None:
    """Train the nano family from scratch, install its weights, write its model cards and results.

    Args:
        data_root: Folder with local copies of the public datasets; without it they come from the hub.
        out: Folder for the stages; the same command continues an interrupted run.
        seed: Seed of every stage.
        install: Copy the weights into the packages and write docs/model_cards and docs/results.
    """
    from evals.reproduce import reproduce

    reproduce(data_root, out, seed, install)


def main() -> None:
    """Entry point of the console script."""
    cli_tools.run(
        "evals",
        "One harness for text, vision, speech and safety.",
        {
            "run": run,
            "quickstart": quickstart,
            "list": list_tasks,
            "contamination": contamination,
            "compare": compare_runs,
            "export-inspect": export_inspect,
            "scorecard": scorecard,
            "attacks": attacks,
            "judge": judge,
            "scaling": scaling,
            "quantization": quantization,
            "reproduce-nano": reproduce_nano,
        },
    )
