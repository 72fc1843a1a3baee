"""Where a model's files are: bundled, in a folder, or on the Hugging Face hub."""

import re
from collections.abc import Sequence
from pathlib import Path

from core_llm.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "LICENSE*", "USE_POLICY*"]


def find_model(where: str | Path, bundled: Path) -> Path:
    """The folder of a model: `bundled` for "nano", an existing folder, or a hub id such as "org/name".

    A hub id is downloaded into the hub's cache (again only when it changed there), with a progress bar.
    Raises `CheckpointError`, one line, where there is nothing of that name or the hub does not answer.
    """
    if str(where) == "nano":
        return bundled
    folder = Path(where)
    if folder.is_dir():
        return folder
    if not folder.exists() and _HUB_ID.fullmatch(str(where)):
        return download(str(where))
    raise CheckpointError(
        f"unknown model '{where}'; known: nano, a folder with a checkpoint, or a hub id such as "
        "meta-llama/Llama-3.2-1B"
    )


def download(name: str, files: Sequence[str] = _FILES) -> Path:
    """Fetch a model by its hub id: safetensors, or the original layout where a repository has only that.

    files: patterns of what to fetch beside the original layout.
    Raises `CheckpointError` that says what to do when offline, gated or not found.
    """
    from httpx2 import HTTPError  # the client that huggingface_hub itself uses
    from huggingface_hub import errors

    try:
        # Sub-folders hold other formats of the same weights.
        folder = _snapshot(name, allow_patterns=list(files), ignore_patterns=["*/*"])
        if any(folder.glob("*.safetensors")):
            return folder
        return _snapshot(name, allow_patterns=["original/*"]) / "original"
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{name}: a gated model; accept its licence on its page of the hub, then run `hf auth login`"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise CheckpointError(
            f"{name}: neither a folder here nor a repository on the hub that you may read; check the "
            "spelling, or run `hf auth login` if it is private"
        ) from None
    except (HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk, not the hub
        raise CheckpointError(
            f"{name}: no such folder, and the hub cannot be reached ({_reason(error)}); connect once to "
            "download it, or give the folder of a copy"
        ) from None


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return f"it answered with status {error.response.status_code}"
    return "offline?"


def _snapshot(name: str, allow_patterns: list[str], ignore_patterns: list[str] | None = None) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
