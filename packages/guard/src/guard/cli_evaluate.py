"""`guard evaluate`: how good and how well calibrated a guard is, beside what needs no guard."""

from pathlib import Path

from core_llm.cli_tools import Positional


def evaluate(
    sets: Positional[tuple[str, ...]] = (),
    model: str = "nano",
    data: Path | None = None,
    data_root: Path | None = None,
    out: Path = Path("runs/guard_evaluation"),
    save: Path | None = None,
    core: str = "nano",
    baseline_rows: int = 10_000,
    limit: int | None = None,
    batch_size: int = 32,
    resamples: int = 2000,
    seed: int = 0,
) -> None:
    """Measure a guard on labelled conversations, fit its temperature, print and draw both.

    A share of the held-out rows, chosen by a hash of their context, is for the temperature alone; every
    figure is of the other rows. Scores are kept in --out as they come: the same command goes on where it
    stopped.

    Args:
        sets: Datasets by name: diasafety, openai_moderation, ailuminate, simple_safety_tests, mitre_frr, ...
            Without --data the default is all of these but ailuminate.
        model: The guard: nano, or a folder with a checkpoint.
        data: Your own rows, one JSON object per line: "label" (0, 1, "safe" or "unsafe") beside "text",
            "context" and "response", or "messages"; optionally "group" (what must stay together), "kind",
            and "split" (train, validation or test).
        data_root: Folder with local copies of the public datasets; without it they come from the hub.
        out: Folder for report.html, evaluation.json, the figures and the scores.
        save: Write the fitted temperature into the guard in this folder; a folder that does not exist becomes
            a copy of --model.
        core: The core whose embeddings the linear baseline reads: nano, or a folder with a checkpoint.
        baseline_rows: Train rows that the baselines learn from at most; embedding them takes the longest.
        limit: At most this many held-out rows of each set, spread evenly; whole sets by default.
        batch_size: Conversations per forward pass.
        resamples: Bootstrap resamples of each interval.
        seed: Seed of the resamples.
    """
    from guard.evaluation.run import Settings, run

    settings = Settings(
        sets, model, data, data_root, out, save, core, baseline_rows, limit, batch_size, resamples, seed
    )
    run(settings)
