"""From one checkpoint to another: layout, dtype, number of files; in memory is what goes into one of them."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from core_llm.checkpoint import NANO, open_weights
from core_llm.errors import CheckpointError, UserError
from core_llm.files import TOKENIZER_FILES, parse_size, replacing, write_text
from core_llm.hf_layout import HFWeights, config_to_hf, write_hf
from core_llm.hub import find_model
from core_llm.original_layout import OriginalWeights, params_from_config, write_original
from core_llm.stored import DType, StoredWeights, expected_shapes
from core_llm.tokenizer import Tokenizer

Layout = Literal["hf", "original"]

# What belongs to the weights and stays true for them in any layout.
_COMPANIONS = ("LICENSE*", "USE_POLICY*", "NOTICE*")
_TOKENIZER: dict[Layout, str] = {"hf": "tokenizer.json", "original": "tokenizer.model"}
_HF_COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)

_RELEASED_SPECIAL = 128_000  # the first special token of Llama 3; a smaller vocabulary is of our own
# `ChatFormat("plain")` for transformers.
_PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>"
    "{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def convert_checkpoint(
    source: str | Path,
    target: Path,
    layout: Layout = "hf",
    dtype: DType = "auto",
    max_shard_size: str = "5GB",
    n_shards: int = 1,
    rope_factor: float | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Write the checkpoint `source` (a folder, a hub id, or "nano") to the folder `target`.

    `max_shard_size` applies to the layout "hf", `n_shards` to "original". Tokenizer files are copied, and
    the form that the layout usually has is added where it is missing. Memory: what is written into one
    file, of which unconverted weights are the source's own pages. Raises `CheckpointError` for a bad
    source and `UserError` for a target that is not empty.
    """
    folder = find_model(source, NANO)
    check_target(folder, target, overwrite)
    limit = parse_size(max_shard_size)
    weights = open_weights(folder, rope_factor)
    stored = weights.resolve(dtype)
    tokenizer = find_tokenizer(weights.folder)
    copies = n_shards if layout == "original" else 1
    with replacing(target) as temporary, _reader(weights, stored, copies, progress) as (sizes, read):
        if layout == "hf":
            write_hf(temporary, _hf_config(weights, tokenizer, stored), sizes, read, limit)
        else:
            write_original(temporary, _params(weights), weights.config, read, n_shards)
        carry_over(weights.folder, temporary, layout, tokenizer)


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Raise `UserError` where `target` is `source`, or holds something that is not to be replaced."""
    if target.resolve() == source.resolve():
        raise UserError(f"{target}: source and target are the same folder; give another target")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UserError(
            f"{target}: is not empty; give another folder, or --overwrite to replace what is there"
        )


def carry_over(source: Path, target: Path, layout: Layout, tokenizer: Tokenizer | None) -> None:
    """Copy what belongs to weights in any layout: licence, tokenizer and, for "hf", generation settings.

    tokenizer: the source's, written in the form that the layout usually has where that file is missing.
    """
    _copy_companions(source, target, _HF_COMPANIONS if layout == "hf" else ())
    _complete_tokenizer(tokenizer, target / _TOKENIZER[layout])
    if layout == "hf" and tokenizer is not None and tokenizer.eot_id < _RELEASED_SPECIAL:
        _complete_settings(target / "tokenizer_config.json")


def _complete_settings(path: Path) -> None:
    """What transformers has to know of a tokenizer of our own, where the source does not say it."""
    if not path.exists():
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "clean_up_tokenization_spaces": False,
            "chat_template": _PLAIN_TEMPLATE,
        }
        write_text(path, json.dumps(settings, indent=2) + "\n")


@contextmanager
def _reader(
    weights: StoredWeights, dtype: torch.dtype, n_reads: int, progress: bool
) -> Iterator[tuple[dict[str, int], Callable[[str], Tensor]]]:
    """The bytes of every tensor in `dtype` and a function that reads one; each is read `n_reads` times."""
    from tqdm import tqdm

    shapes = expected_shapes(weights.config)
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in shapes.items()}
    with tqdm(
        total=sum(sizes.values()),
        unit="B",
        unit_scale=True,
        desc="convert",
        disable=None if progress else True,
    ) as bar:

        def read(name: str) -> Tensor:
            # Cut into files, every tensor comes by again: mapped, all pages of the source would stay.
            tensor = weights.read(name, dtype, mapped=n_reads == 1)
            bar.update(sizes[name] / n_reads)
            return tensor

        yield sizes, read


def _hf_config(weights: StoredWeights, tokenizer: Tokenizer | None, dtype: torch.dtype) -> dict[str, Any]:
    values = config_to_hf(weights.config, tokenizer, dtype)
    if not isinstance(weights, HFWeights):
        return values
    # Settings of the source that do not shape the model stay, such as its own stop tokens.
    kept = {key: value for key, value in weights.raw.items() if key != "rope_parameters"}
    own = {
        key: values[key] for key in values if key not in ("bos_token_id", "eos_token_id") or key not in kept
    }
    return {**kept, **own}


def _params(weights: StoredWeights) -> dict[str, Any]:
    return weights.params if isinstance(weights, OriginalWeights) else params_from_config(weights.config)


def find_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer in a folder, None where it has none."""
    return Tokenizer.load(folder) if any((folder / name).is_file() for name in TOKENIZER_FILES) else None


def _copy_companions(source: Path, target: Path, more: tuple[str, ...]) -> None:
    for pattern in (*_COMPANIONS, *more, *TOKENIZER_FILES):
        for path in sorted(source.glob(pattern)):
            shutil.copyfile(path, target / path.name)
    # Hub repositories keep the released tokenizer beside the original weights.
    released = source / "original" / "tokenizer.model"
    if released.is_file() and not (target / "tokenizer.model").exists():
        shutil.copyfile(released, target / "tokenizer.model")


def _complete_tokenizer(tokenizer: Tokenizer | None, path: Path) -> None:
    """Write the tokenizer in the form that other readers of this layout look for, if it has that form."""
    if tokenizer is not None and not path.exists():
        with suppress(CheckpointError):  # a tokenizer.json such as nano's has no tiktoken form
            tokenizer.save(path)
