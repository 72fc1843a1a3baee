"""`vision-adapter`: train eyes for a core, ask about a picture."""

from pathlib import Path
from typing import Annotated

import tyro

from core_llm import cli_tools


def train(
    out: Path,
    core: str = "nano",
    data_root: Path | None = None,
    steps: int = 0,
    warm_up_steps: int = -1,
    pictures: int = 0,
    lr: float = 0.0,
    seed: int = 0,
) -> None:
    """Train a vision adapter for a core that stays as it is; the same command continues an interrupted run.

    First the encoder learns to name shapes, colours and words alone, then the adapter learns to answer
    through the core, from easy-VQA and drawn scenes.

    Args:
        out: Folder for the adapter, the metrics of both stages and their resumable states.
        core: nano, or a folder with a core's checkpoint.
        data_root: Folder with local copies of the public datasets; without it only drawn scenes are used.
        steps: Optimizer steps of the adapter (0: the recipe's).
        warm_up_steps: Optimizer steps of the encoder alone (-1: the recipe's).
        pictures: Pictures per step of the adapter (0: the recipe's).
        lr: Peak learning rate of the adapter (0: the recipe's).
        seed: Seed of weights, pictures and data order.
    """
    from dataclasses import replace

    import torch

    from core_llm.checkpoint import load_core
    from core_llm.errors import UserError
    from vision_adapter import train as training
    from vision_adapter.adapter import VisionAdapter
    from vision_adapter.config import VisionConfig

    if steps < 0 or pictures < 0 or lr < 0 or warm_up_steps < -1:
        raise UserError("--steps, --pictures and --lr must not be negative")
    given = {
        "steps": steps or None,
        "warm_up_steps": warm_up_steps if warm_up_steps >= 0 else None,
        "pictures": pictures or None,
        "lr": lr or None,
    }
    recipe = replace(training.Recipe(), **{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
    model, tokenizer = load_core(core)
    if data_root is None:
        print("no --data-root: training on drawn scenes alone, without easy-VQA", flush=True)
    torch.manual_seed(seed)
    adapter = VisionAdapter(VisionConfig(), model.config)
    figures = training.train(model, tokenizer, adapter, out / "state", data_root, seed, recipe)
    command = f"vision-adapter train --out DIR --steps {recipe.steps} --seed {seed}"
    if data_root is not None:
        command += " --data-root DATA"
    adapter.save(out, model, training.card(adapter, figures, command, easy=data_root is not None))
    print(f"adapter saved in {out}")
    for name, value in figures.items():
        print(f"  {name:20} {value:.3f}")


def answer(
    image: Annotated[Path, tyro.conf.Positional],
    question: Annotated[str, tyro.conf.Positional],
    core: str = "nano",
    adapter: str = "nano",
    max_new_tokens: int = 64,
) -> None:
    """Answer a question about a picture.

    Args:
        image: A picture file.
        question: What to ask about it.
        core: nano, or a folder with a core's checkpoint.
        adapter: nano, or a folder with a vision adapter trained on that core.
        max_new_tokens: Length limit of the answer.
    """
    from core_llm.adapters import Assistant
    from core_llm.chat import Image, Message, Text
    from core_llm.checkpoint import load_core
    from core_llm.errors import UserError
    from core_llm.sampling import Sampling
    from vision_adapter.adapter import load

    if not question.strip():
        raise UserError("the question is empty: ask something about the picture")
    model, tokenizer = load_core(core)
    assistant = Assistant(model, tokenizer, [load(adapter, model)])
    conversation = [Message("user", [Image(image), Text(question)])]
    print(assistant.generate([conversation], Sampling(max_new_tokens=max_new_tokens))[0])


def explain(
    image: Annotated[Path, tyro.conf.Positional],
    question: Annotated[str, tyro.conf.Positional],
    out: Path = Path("overlay.png"),
    core: str = "nano",
    adapter: str = "nano",
    max_new_tokens: int = 64,
) -> None:
    """Answer a question about a picture and draw where each token of the answer looked.

    Args:
        image: A picture file.
        question: What to ask about it.
        out: The picture to write: its ending says in which format.
        core: nano, or a folder with a core's checkpoint.
        adapter: nano, or a folder with a vision adapter trained on that core.
        max_new_tokens: Length limit of the answer.
    """
    from core_llm.adapters import Assistant
    from core_llm.checkpoint import load_core
    from core_llm.errors import UserError
    from vision_adapter import overlay
    from vision_adapter.adapter import load
    from vision_adapter.explain import explain as explained

    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out {out}: the picture must end in .png, .jpg or .webp")
    model, tokenizer = load_core(core)
    assistant = Assistant(model, tokenizer, [load(adapter, model)])
    found = explained(assistant, image, question, max_new_tokens)
    out.parent.mkdir(parents=True, exist_ok=True)
    overlay.draw(found).save(out)
    print(found.answer)
    print(f"overlay saved in {out}")


def main() -> None:
    """Entry point of the console script."""
    cli_tools.run(
        "vision-adapter",
        "Pictures for a frozen core: train, answer, explain.",
        {"train": train, "answer": answer, "explain": explain},
    )
