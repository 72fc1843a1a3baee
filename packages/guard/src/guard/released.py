"""Released guards: Llama Guard 2 and 3, by what ships in their folders.

Their prompt is their own chat template's, their categories are those that it lists.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from core_llm.adapters import Adapter
from core_llm.errors import CheckpointError
from core_llm.files import read_json
from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer
from guard.calibration import stored_beside
from guard.chat_template import ChatTemplate, template_of
from guard.policy import Categories, Policy
from guard.prompter import Prompter
from guard.taxonomy import RELEASED_NAMES

# Tokens of policy, frame and answer that a prompt needs beside the conversation.
_BESIDE = 2048
_WINDOW = 4096

# Reads core, tokenizer and adapters of a folder, as `vision_adapter.mllama_checkpoint.load_fused` does.
Loader = Callable[[Path], tuple[Llama, Tokenizer, Sequence[Adapter]]]


def find_template(folder: Path) -> tuple[str, Path] | None:
    """The chat template of a checkpoint and the file that holds it; None where there is none.

    In the order in which the hub's own reader looks: a file of its own, then the tokenizer's configuration.
    """
    own = folder / "chat_template.jinja"
    if own.is_file():
        try:
            return own.read_text(encoding="utf-8"), own
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{own}: not readable ({error})") from error
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            found = template_of(read_json(folder / name))
            if found is not None:
                return found, folder / name
    return None


def released_prompter(folder: Path, tokenizer: Tokenizer | None = None) -> Prompter:
    """How the guard in a folder is asked; reads no weights.

    Raises `CheckpointError` where it has no chat template, or one that is not a guard's.
    """
    found = find_template(folder)
    if found is None:
        raise CheckpointError(
            f"{folder}: no guard here (neither guard.json nor a chat template); train one with `guard train`"
        )
    source, path = found
    tokenizer = tokenizer or Tokenizer.load(folder)
    template = ChatTemplate(source, tokenizer, str(path))
    categories = [
        replace(c, hazard=RELEASED_NAMES.get(" ".join(c.name.lower().split()))) for c in template.categories
    ]
    window = max(8, min(_WINDOW, (_context(folder) - _BESIDE) // 2))
    policy = Policy(Categories(categories), window=window, context=window, name=folder.resolve().name[:200])
    return Prompter(tokenizer, policy, temperature=stored_beside(folder), form=template)


def _context(folder: Path) -> int:
    """Positions of the model, from its configuration; a vision model has a part for its text."""
    values: dict[str, Any] = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    text = values.get("text_config")
    found = (text if isinstance(text, dict) else values).get("max_position_embeddings", 8192)
    return found if isinstance(found, int) else 8192


def check_is_core(folder: Path) -> None:
    """Raise `CheckpointError` where a checkpoint is more than a core, and so needs a loader of its own."""
    path = folder / "config.json"
    kind = read_json(path).get("model_type") if path.is_file() else None
    if kind == "mllama":
        raise CheckpointError(
            f"{folder}: a vision checkpoint (mllama), which needs its adapter; give `Guard.load` a loader "
            "as in docs/guard.md"
        )
