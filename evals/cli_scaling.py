"""`evals scaling`: the best size for a compute budget, and a score predicted from compute."""

from pathlib import Path


def scaling(
    runs: Path = Path("runs/scaling"),
    csv: Path | None = None,
    output: Path | None = None,
    budgets: tuple[float, ...] = (2e10, 4e10, 8e10, 1.6e11, 3.2e11),
    held_out: float = 1.28e12,
    questions: int = 400,
    seed: int = 0,
    threads: int = 1,
) -> None:
    """Fit scaling laws to small runs and hold the prediction against a larger one.

    Trains cores of several sizes on the project's own scenes, on the CPU, offline: minutes in all. The same
    command run again continues where it stopped; finished runs are reused.

    Args:
        runs: Folder of the runs; what is there already is not trained again.
        csv: Take the runs from this table instead of training: columns parameters, tokens, loss, and where
            known compute, budget, nll, accuracy, questions, name. The largest budget is held out.
        output: Folder for scaling.json, scaling.png and index.html; the folder of the runs by default.
        budgets: FLOPs; each is spent on every size that fits.
        held_out: FLOPs of the run that the prediction is held against.
        questions: Questions of the benchmark text-qa that every run answers, at most 400.
        seed: Seed of the weights, the text and the intervals.
        threads: Processor threads for training.
    """
    from core_llm import provenance
    from core_llm.errors import UserError
    from core_llm.files import check_writable, write_bytes, write_text
    from evals import scaling_plots, scaling_runs
    from evals.scaling import analyse

    if questions < 1 or threads < 1:
        raise UserError("--questions and --threads must be at least 1")
    folder = output or (csv.parent if csv else runs)
    for name in ("scaling.json", "scaling.png", "index.html"):
        check_writable(folder / name)
    if csv is not None:
        found = analyse(scaling_runs.read_csv(csv), seed)
    else:
        import torch

        torch.set_num_threads(threads)
        plan = scaling_runs.Plan(budgets=budgets, held_out=held_out, questions=questions, seed=seed)
        found = analyse(scaling_runs.train_all(plan, runs), seed)
    about = provenance.collect("scaling", {}, seed)
    picture = scaling_plots.png(scaling_plots.draw(found))
    write_text(folder / "scaling.json", _json({**found.as_json(), "provenance": about}))
    write_bytes(folder / "scaling.png", picture)
    write_text(folder / "index.html", scaling_plots.page(found, picture, str(about["command"])))
    print("\n".join(scaling_plots.lines(found)))
    print(f"page:    {folder / 'index.html'}\nresults: {folder / 'scaling.json'}")


def _json(values: object) -> str:
    """JSON in which what is undefined is null."""
    import json
    import math

    def clean(value: object) -> object:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, dict):
            return {key: clean(each) for key, each in value.items()}
        return [clean(each) for each in value] if isinstance(value, list | tuple) else value

    return json.dumps(clean(values), indent=1) + "\n"
