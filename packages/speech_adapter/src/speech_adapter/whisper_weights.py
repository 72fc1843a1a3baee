"""openai-whisper's checkpoints: by the name of a released model, or from a file in its format."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from core_llm.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from whisper import Whisper

PREFIX = "whisper:"


def load_whisper(name: str) -> Whisper:
    """A whole Whisper on the CPU in fp32: a released model's name such as "tiny.en", or a .pt file.

    A released model is downloaded once into the cache folder. Raises UserError for an unknown name, and
    CheckpointError, one line, where the weights cannot be had, are damaged, or are no Whisper's.
    """
    import pickle
    from http.client import HTTPException
    from urllib.error import URLError

    import whisper

    known = whisper.available_models()
    path = Path(name).expanduser()
    if name not in known and not path.is_file():
        raise UserError(
            f"whisper:{name}: neither a file nor a model's name; known names: {', '.join(known)}; "
            "a file is given as whisper:PATH.pt"
        )
    try:
        return whisper.load_model(name if name in known else str(path), device="cpu").eval()
    except (URLError, TimeoutError, ConnectionError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise CheckpointError(
            f"whisper:{name}: its weights are not here and cannot be downloaded ({reason}); put "
            f"{_file_name(name)} into {cache_folder()}, or give a file as whisper:PATH.pt"
        ) from None
    except (KeyError, TypeError, AttributeError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"whisper:{name}: damaged, or no checkpoint in openai-whisper's format ({lines[0]})"
        ) from None


def cache_folder() -> Path:
    """Where openai-whisper keeps what it has downloaded."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "whisper"


def _file_name(name: str) -> str:
    import whisper

    return Path(whisper._MODELS[name]).name
