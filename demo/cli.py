"""`demo`: talk to a model in the browser."""

import os

from core_llm import cli_tools


def demo(model: str = "nano", host: str = "127.0.0.1", port: int = 7860) -> None:
    """Open the demo: chat with text, images and sound, transcription, moderation, scorecard.

    Args:
        model: nano, or a folder with core/, vision_adapter/, speech_adapter/ and guard/.
        host: Address to listen on; 0.0.0.0 lets other machines in.
        port: Port to listen on.
    """
    # Nothing leaves this machine: no usage statistics, no look-up of newer versions.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    from core_llm.errors import UserError
    from demo.app import build, launch
    from evals.models import folders, load_assistant, load_guard

    guard = load_guard(model) if "guard" in folders(model) else None
    app = build(load_assistant(model), guard)
    try:
        launch(app, host, port, wait=True)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port} ({error}); choose another --port") from error


def main() -> None:
    """Entry point of the console script."""
    cli_tools.run("demo", "Talk to a model in the browser.", demo)
