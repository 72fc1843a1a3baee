"""Command line: `speech-adapter train|transcribe`. Heavy modules load inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from core_llm import cli_tools
from core_llm.errors import MediaError, UserError


def train(
    core: str = "nano",
    data_root: Path | None = None,
    out: Path = Path("runs/speech_adapter"),
    steps: int = 1380,
    lr: float = 3e-3,
    seed: int = 0,
    encoder: str = "conformer",
) -> None:
    """Train a speech adapter for a frozen core, on recorded digits and espeak speech.

    Args:
        core: "nano" (bundled) or a folder with a core.
        data_root: folder with local copies of the datasets (it holds fsdd/); the hub where absent.
        out: where the adapter, its training state and the synthesised speech go; a second call resumes.
        steps: training steps of both stages together.
        lr: peak learning rate of the first stage; the second has half of it.
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


def transcribe(
    files: Annotated[tuple[Path, ...], tyro.conf.Positional],
    core: str = "nano",
    adapter: str = "nano",
    max_new_tokens: int = 64,
) -> None:
    """Write down what is said in audio files (WAV, FLAC, OGG, Opus, MP3): one line per file.

    A file that cannot be read gets an error line on stderr; the others are still transcribed, and the exit
    status is 2.

    Args:
        files: audio files.
        core: "nano" or a folder with a core.
        adapter: "nano" or a folder with a speech adapter for that core.
        max_new_tokens: longest transcript, in tokens of the core.
    """
    if not files:
        raise UserError("give at least one audio file: speech-adapter transcribe FILE...")
    import sys

    from core_llm.checkpoint import load_core
    from speech_adapter.adapter import load
    from speech_adapter.transcribe import transcribe_file

    llama, tokenizer = load_core(core)
    speech = load(adapter, llama)
    failed = 0
    for file in files:
        try:
            print(f"{file}: {transcribe_file(file, llama, tokenizer, speech, max_new_tokens)}", flush=True)
        except MediaError as error:
            failed += 1
            print(f"error: {error}", file=sys.stderr)
    if failed:
        sys.exit(2)


def main() -> None:
    """Entry point of the console script."""
    cli_tools.run(
        "speech-adapter", "Ears for a frozen Llama core.", {"train": train, "transcribe": transcribe}
    )


if __name__ == "__main__":
    main()
