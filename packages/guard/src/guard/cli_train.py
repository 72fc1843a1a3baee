"""`guard train` and `guard prune`: a guard out of a core, and a smaller guard out of a guard."""

from pathlib import Path
from typing import Literal

from core_llm.cli_tools import Positional

_SETS = (
    "diasafety",
    "openai_moderation",
    "hate_speech",
    "ailuminate",
    "simple_safety_tests",
    "mitre_frr",
    "gsm8k",
    "templates",
)


def train(
    out: Path,
    core: str = "nano",
    data_root: Path | None = None,
    sets: tuple[str, ...] = _SETS,
    data: tuple[Path, ...] = (),
    held_out: float = 0.1,
    near_duplicates: float = 0.8,
    drop_repeated: bool = False,
    policy: Path | None = None,
    rules: bool = False,
    lora_rank: int = 0,
    keep_apart: bool = False,
    teacher: str | None = None,
    temperature: float = 2.0,
    steps: int = 700,
    language_steps: int | None = None,
    lr: float = 1e-3,
    batch: int = 32,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "cpu",
    resume: bool = True,
) -> None:
    """Fine-tune a copy of a core to be a guard; the same command continues an interrupted run.

    Args:
        out: Folder for the guard, metrics and the resumable state.
        core: The core to start from: nano, a folder with a checkpoint, or a hub id.
        data_root: Folder with local copies of the public datasets; without it they come from the hub.
        sets: Public sets by name, and templates for the requests that the project generates; no name: none.
        data: JSONL files of your own: {"conversation": ..., "verdict": "unsafe", "categories": ["S1"]}.
        held_out: Share of the contexts of each such file that is held out and measured on.
        near_duplicates: Overlap from which a row repeats a held-out one and is dropped; 0 drops none.
        drop_repeated: Drop rows that so repeat another one of their set and verdict, too.
        policy: YAML file with the categories to train on; by default the standard ones.
        rules: Make a guard that reads its policy: the rules stand in its prompt, and vary in training.
        lora_rank: Train low-rank updates of this rank beside the core instead of all its weights; 0: all.
        keep_apart: Save these updates alone with the name of the core, not merged into it.
        teacher: Learn from this guard's probabilities instead of the labels: a folder, a hub id, or nano.
        temperature: Softens the teacher's probabilities.
        steps: Optimizer steps of the verdict stage.
        language_steps: Steps of next-token prediction on the same conversations before it; by default 250,
            with --rules or --lora-rank none.
        lr: Peak learning rate of the verdict stage; for large cores about 2e-6, with LoRA about 1e-4.
        batch: Conversations per step.
        seed: Seed of the data order, of dropout and of the rules.
        device: Where to train; auto takes a GPU where there is one.
        resume: Continue from the state in --out if there is one.
    """
    given = dict(locals())
    from guard.runs import TrainRun

    TrainRun(**given).run()


def prune(
    model: Positional[str],
    out: Positional[Path],
    layers: int | None = None,
    ffn: int | None = None,
    head: Literal["full", "verdict"] = "full",
    quantize: Literal["none", "int8", "int4"] = "none",
    qat: bool = False,
    data_root: Path | None = None,
    sets: tuple[str, ...] = _SETS,
    data: tuple[Path, ...] = (),
    held_out: float = 0.1,
    near_duplicates: float = 0.8,
    drop_repeated: bool = False,
    rows: int = 256,
    steps: int = 300,
    lr: float = 1e-3,
    batch: int = 32,
    temperature: float = 2.0,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "cpu",
    resume: bool = True,
) -> None:
    """Make a guard smaller: leave out layers and neurons, cut its head, heal it, quantise it.

    Layers and neurons are chosen by what changes the verdicts on training conversations least. The healing
    distils the guard as it was into what is left. The same command continues an interrupted run. Sizes and
    AUPRC of every stage are printed and written beside the guard.

    Args:
        model: The guard to start from: nano, or a folder.
        out: Folder for the smaller guard, which `--model` takes wherever it takes a guard.
        layers: Layers to keep; by default all.
        ffn: Neurons to keep in each feed-forward block; by default all.
        head: verdict keeps the rows of the output head that a verdict can name, and no others.
        quantize: Weights in int8 or int4; the embedding's table too where the head is cut.
        qat: Heal with weights that are rounded as --quantize will round them.
        data_root: Folder with local copies of the public datasets; without it they come from the hub.
        sets: Public sets by name, and templates for the requests that the project generates; no name: none.
        data: JSONL files of your own, as `guard train` reads them.
        held_out: Share of the contexts of each such file that is held out and measured on.
        near_duplicates: Overlap from which a row repeats a held-out one and is dropped; 0 drops none.
        drop_repeated: Drop rows that so repeat another one of their set and verdict, too.
        rows: Conversations by which the importance of layers and neurons is measured.
        steps: Optimizer steps of the healing; 0 leaves it out.
        lr: Peak learning rate of the healing; for large guards about 1e-5.
        batch: Conversations per step.
        temperature: Softens the probabilities of the guard as it was.
        seed: Seed of the choice of rows and of the data order.
        device: Where to compute; auto takes a GPU where there is one.
        resume: Continue from the state in --out if there is one.
    """
    given = dict(locals())
    from guard.runs import PruneRun

    PruneRun(**given).run()
