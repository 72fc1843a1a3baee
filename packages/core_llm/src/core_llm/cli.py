"""`core-llm`: pre-train a core, generate text."""

from pathlib import Path

from core_llm import cli_tools


def pretrain(
    out: Path,
    preset: str = "nano",
    data_root: Path | None = None,
    steps: int = 1300,
    lr: float = 3e-3,
    seed: int = 0,
    resume: bool = True,
) -> None:
    """Train a tokenizer and a core from scratch; the same command continues an interrupted run.

    Args:
        out: Folder for the checkpoint, metrics.jsonl and the resumable state.
        preset: Shape of the core, such as nano.
        data_root: Folder with local copies of the public datasets; without it they come from the hub.
        steps: Optimizer steps of the general stage; the nano recipe adds a stage on presence.
        lr: Peak learning rate.
        seed: Seed of weights and data order.
        resume: Continue from the state in --out if there is one.
    """
    from core_llm.checkpoint import save_core
    from core_llm.config import preset as find_preset
    from core_llm.train.fit import FitConfig
    from core_llm.train.pretrain import PretrainConfig
    from core_llm.train.pretrain import pretrain as train

    settings = FitConfig(
        out / "state", steps=steps, lr=lr, seed=seed, warmup=100, resume=resume, save_every=250
    )
    model, tokenizer, figures = train(find_preset(preset), data_root, settings, PretrainConfig(seed=seed))
    save_core(out, model, tokenizer)
    print(f"core saved in {out}; held-out loss {figures['held_out_loss']:.3f} nats per token")


def generate(
    prompt: cli_tools.Positional[str],
    model: str = "nano",
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int = 0,
) -> None:
    """Answer a prompt, streamed to stdout.

    Args:
        prompt: What the user says; "-" reads it from standard input.
        model: nano, or a folder with a checkpoint.
        max_new_tokens: Length limit of the answer.
        temperature: 0 takes the most probable token; higher values draw more freely.
        top_p: Draw from the smallest set of tokens with this probability mass.
        top_k: Draw from this many tokens at most (0: no limit).
        min_p: Leave out tokens below this share of the most probable one.
        seed: Seed of the draws.
    """
    import sys

    from core_llm.adapters import Assistant
    from core_llm.chat import Message
    from core_llm.checkpoint import load_core
    from core_llm.sampling import Sampling

    text = sys.stdin.read() if prompt == "-" else prompt
    settings = Sampling(max_new_tokens, temperature, top_p, top_k, min_p, seed)
    assistant = Assistant(*load_core(model))
    for piece in assistant.stream([Message("user", text)], settings):
        print(piece, end="", flush=True)
    print()


def main() -> None:
    """Entry point of the console script."""
    cli_tools.run(
        "core-llm", "The Llama core: pre-train, generate.", {"pretrain": pretrain, "generate": generate}
    )
