"""Low-rank updates of the core that were trained together with an image adapter, stored beside it.

An adapter never holds parameters of the core; neither do its updates: they hang on the core by hooks
(`core_llm.lora`), and without them it answers text as the bare core does, bit for bit.
"""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from core_llm import processes
from core_llm.checkpoint import read_config, save_adapter
from core_llm.errors import CheckpointError, UserError
from core_llm.files import WEIGHTS
from core_llm.lora import LoRA, has_updates
from core_llm.model import Llama

FOLDER = "lora"
_SETTING = "core_updates"  # among the adapter's: the digest of the updates that it was trained with


@dataclass(frozen=True, eq=False)
class _Held:
    """A reference that is not a part: neither a sub-module, nor copied with the adapter."""

    lora: LoRA | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Held":
        return self


class WithUpdates(nn.Module):
    """An adapter that may have updates of its core beside it; they are no part of its own state."""

    _held = _Held()

    @property
    def lora(self) -> LoRA | None:
        """The updates, if there are any; `detach` them for the bare core, `merge` them for speed."""
        return self._held.lora

    def hold(self, lora: LoRA | None) -> None:
        """Keep updates beside the adapter, to be saved with it."""
        self._held = _Held(lora)

    def store(
        self, directory: Path, kind: str, settings: Mapping[str, Any], core: Llama, card: str | None
    ) -> None:
        """Write the adapter with the hash of its core and, in a sub-folder, the updates.

        The adapter's config.json says which updates are its own, so that a save that was interrupted never
        pairs new ones with old weights unnoticed.
        """
        named: dict[str, str] = {}
        if self.lora is not None:
            self.lora.save(directory / FOLDER)
        if self.lora is not None and processes.is_writer():
            named = {_SETTING: _digest(directory / FOLDER / WEIGHTS)}
        save_adapter(directory, kind, {**settings, **named}, dict(self.state_dict()), core, card)
        if self.lora is None and processes.is_writer():  # those of an adapter that stood here before
            shutil.rmtree(directory / FOLDER, ignore_errors=True)


def without_updates(values: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's settings without the one that names its updates."""
    return {key: value for key, value in values.items() if key != _SETTING}


def has_own_updates(config: Mapping[str, Any]) -> bool:
    """Whether the adapter with this config.json was saved with updates of its core."""
    return _SETTING in config.get("adapter", {})


def load_updates(directory: Path, core: Llama) -> LoRA | None:
    """The updates of the adapter in a folder, frozen and attached to the core; None where it has none.

    Raises `CheckpointError` where they are missing, not those that the adapter was saved with, or of another
    core, and `UserError` where the core has updates attached already.
    """
    digest = read_config(directory).get("adapter", {}).get(_SETTING)
    if digest is None:
        return None
    folder = directory / FOLDER
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder}: the core's updates that belong to this adapter are missing")
    if _digest(folder / WEIGHTS) != digest:
        raise CheckpointError(f"{folder}: these updates are not those that the adapter was saved with")
    if has_updates(core):
        raise UserError(f"{directory}: the core has low-rank updates attached already; load it anew")
    return LoRA.load(folder, core).requires_grad_(False)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
