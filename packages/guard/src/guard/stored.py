"""The weights of a guard in a folder: a core, whole or quantised, with all it needs beside it.

config.json, model.safetensors   a core in the Hugging Face layout, or `quantized.safetensors`
head.safetensors                 the rows of a head that is cut to the verdict's tokens
lora/ and base in guard.json     updates kept apart from the core, and where that core is
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core_llm.checkpoint import load_core, save_core
from core_llm.errors import CheckpointError
from core_llm.files import CONFIG, WEIGHTS, read_json, write_json
from core_llm.lora import LoRA
from core_llm.model import Llama
from core_llm.quantize import WEIGHTS as QUANTIZED
from core_llm.quantize import save_quantized, scheme_of
from core_llm.quantized_embedding import NoHead
from core_llm.stored import DType
from core_llm.tokenizer import Tokenizer
from guard.head import VerdictHead
from guard.prompter import SETTINGS

HEAD = "head.safetensors"
LORA = "lora"


def load(folder: Path, dtype: DType = torch.float32) -> tuple[Llama, Tokenizer]:
    """The core of a guard in `folder`, frozen.

    Raises `CheckpointError` for anything missing, truncated or mismatched.
    """
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    base = settings.get("base")
    if base is not None:
        if not isinstance(base, str):
            raise CheckpointError(f"{folder}: base in guard.json is {base!r}, not the name of a core")
        core, tokenizer = load_core(_found_from(folder, base), dtype, mapped=False)
        LoRA.load(folder / LORA, core)  # attached, and so kept alive, by its hooks
        return core, tokenizer
    core, tokenizer = load_core(folder, dtype)
    path = folder / HEAD
    if path.is_file():
        core.lm_head = VerdictHead.load(_tensors(path), core, path)  # type: ignore[assignment]
    elif isinstance(core.lm_head, NoHead):
        raise CheckpointError(f"{path}: no such file, but this guard has no other head")
    return core.eval().requires_grad_(False), tokenizer


def _found_from(folder: Path, base: str) -> str:
    """A relative base is looked up from the guard's folder, so that the two can move together."""
    beside = folder / base
    return str(beside) if beside.is_dir() else base


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from error


def save(folder: Path, core: Llama, tokenizer: Tokenizer, card: str | None = None) -> None:
    """Write a guard's core: quantised where it is, with its own head where that is cut.

    An older guard in the folder is replaced: of its weights nothing is left.
    """
    head = core.lm_head
    cut = isinstance(head, VerdictHead)
    quantized = scheme_of(core) is not None
    folder.mkdir(parents=True, exist_ok=True)
    if cut or (folder / HEAD).is_file():
        # Without its config.json the folder holds no checkpoint: nobody reads new weights with an old head.
        (folder / CONFIG).unlink(missing_ok=True)
        (folder / HEAD).unlink(missing_ok=True)
    if cut:
        _write_head(folder / HEAD, head)
    try:
        if quantized:
            core.lm_head = NoHead() if cut else head  # type: ignore[assignment]
            save_quantized(folder, core, tokenizer)
            if card is not None:
                (folder / "README.md").write_text(card)
        else:
            with _tied(core, cut):
                save_core(folder, core, tokenizer, card)
            (folder / QUANTIZED).unlink(missing_ok=True)
    finally:
        core.lm_head = head


class _tied:
    """For as long as it is entered, a core whose head is cut is one that shares head and embedding."""

    def __init__(self, core: Llama, needed: bool) -> None:
        self.core, self.needed = core, needed
        self.before = core.config

    def __enter__(self) -> None:
        if self.needed:
            self.core.config = replace(self.before, tied_embeddings=True)
            tied = nn.Linear(1, 1, bias=False)
            tied.weight = self.core.embed_tokens.weight
            self.core.lm_head = tied  # type: ignore[assignment]

    def __exit__(self, *error: object) -> None:
        self.core.config = self.before


def _write_head(path: Path, head: nn.Module) -> None:
    from safetensors.torch import save_file

    stored = {
        name: (t.to(torch.bfloat16) if t.is_floating_point() else t).cpu().contiguous()
        for name, t in head.state_dict().items()
    }
    temporary = path.with_name(f"{path.name}.tmp")
    save_file(stored, temporary)
    os.replace(temporary, path)


def save_apart(
    folder: Path,
    lora: LoRA,
    base: str,
    tokenizer: Tokenizer,
    settings: Mapping[str, Any],
    card: str | None = None,
) -> None:
    """Write updates alone; `settings` are those of guard.json, to which the name of the core is added."""
    folder.mkdir(parents=True, exist_ok=True)
    lora.save(folder / LORA)
    tokenizer.save(folder / "tokenizer.json")
    if card is not None:
        (folder / "README.md").write_text(card)
    temporary = folder / f"{SETTINGS}.tmp"
    write_json(temporary, {**settings, "base": base})
    os.replace(temporary, folder / SETTINGS)
    # A whole core in the same folder would be another guard's.
    for name in (CONFIG, WEIGHTS, QUANTIZED, HEAD):
        (folder / name).unlink(missing_ok=True)
