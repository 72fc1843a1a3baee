"""Command line of `speech-adapter`. Heavy modules load inside the commands."""

from __future__ import annotations

from pathlib import Path

from core_llm import cli_tools
from core_llm.errors import UserError
from speech_adapter.cli_stages import stage
from speech_adapter.cli_synthesize import synthesize
from speech_adapter.cli_transcribe import transcribe


def train(
    core: str = "nano",
    data_root: Path | None = None,
    out: Path = Path("runs/speech_adapter"),
    steps: int = 6400,
    lr: float = 3e-3,
    seed: int = 0,
    encoder: str = "conformer",
) -> None:
    """Train a speech adapter for a frozen core, on recorded digits and espeak speech.

    Args:
        core: "nano" (bundled) or a folder with a core.
        data_root: folder with local copies of the datasets (it holds fsdd/); the hub where absent.
        out: where the adapter, its training state and the synthesised speech go; a second call resumes.
        steps: training steps.
        lr: peak learning rate.
        seed: of the synthesised texts, the augmentation and the initial weights.
        encoder: "conformer", or "whisper:NAME" for openai-whisper's pretrained encoder of that name (or .pt
            file) to begin with.
    """
    if steps < 1 or lr <= 0:
        raise UserError("--steps must be at least 1 and --lr positive")
    from speech_adapter import train as training

    figures = training.train(core, data_root, out, steps, lr, seed, encoder=encoder)
    for name, value in figures.items():
        print(f"{name}: {value:.4f}")
    print(f"adapter: {out}")


def main() -> None:
    """Entry point of the console script."""
    cli_tools.run(
        "speech-adapter",
        "Ears for a frozen Llama core.",
        {"train": train, "stage": stage, "synthesize": synthesize, "transcribe": transcribe},
    )


if __name__ == "__main__":
    main()
