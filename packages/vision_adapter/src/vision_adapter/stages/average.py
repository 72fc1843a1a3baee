"""Averages of weights: of the best checkpoints of a run, and of adapters in folders.

After SFT the paper averages models of several runs and checkpoints, chosen by how well they do
(arXiv 2407.21783, section 7.5). All sums are fp32.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core_llm import processes
from core_llm.checkpoint import read_config, read_tensors
from core_llm.errors import CheckpointError, UserError
from core_llm.files import CONFIG, WEIGHTS, read_json, replacing, write_json
from core_llm.hf_layout import save_tensors
from core_llm.model import Llama
from vision_adapter.updates import FOLDER, has_own_updates

SCORE = "held_out_loss"  # lower is better
_INDEX = "scores.json"


class BestCheckpoints:
    """The K best states of a module so far, each an adapter's folder of its own in fp32.

    A folder is complete before the index names it, and leaves the index before it goes: a run that is
    interrupted anywhere continues with those that the index names.
    """

    def __init__(self, folder: Path, keep: int, module: nn.Module, config: Mapping[str, Any]) -> None:
        if keep < 1:
            raise UserError("--average-top needs at least one checkpoint")
        self.folder, self.keep, self.module, self.config = folder, keep, module, dict(config)

    def scores(self) -> dict[int, float]:
        """Held-out loss by step, best first."""
        path = self.folder / _INDEX
        found = read_json(path) if path.is_file() else {}
        known = {int(step): float(score) for step, score in found.items()}
        return dict(sorted(known.items(), key=lambda item: (item[1], item[0])))

    def path(self, step: int) -> Path:
        """The folder of a step."""
        return self.folder / f"step-{step:07}"

    def offer(self, step: int, figures: Mapping[str, float]) -> None:
        """Keep the module's weights at this step if they are among the best; `fit` calls it."""
        if not processes.is_writer():
            return
        scores = self.scores() | {step: figures[SCORE]}
        best = sorted(scores, key=lambda each: (scores[each], each))[: self.keep]
        if step in best:
            lora = getattr(self.module, "lora", None)
            if lora is not None:  # frozen, the same in all: without them the folder would not load
                lora.save(self.path(step) / FOLDER)
            write_adapter(self.path(step), self.config, self.module.state_dict(), torch.float32)
        self._name({each: scores[each] for each in best})
        for path in self.folder.glob("step-*"):
            if path.name not in {self.path(each).name for each in best}:
                shutil.rmtree(path)

    def _name(self, scores: Mapping[int, float]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"{_INDEX}.tmp"
        temporary.write_text(json.dumps(scores))
        os.replace(temporary, self.folder / _INDEX)

    def load_average(self) -> None:
        """Fill the module with the mean of the kept states."""
        folders = [self.path(step) for step in self.scores()]
        if not folders:
            raise UserError(f"{self.folder}: no checkpoint was kept; --average-top needs held-out examples")
        own = self.module.state_dict()
        mean = averaged(folders)
        self.module.load_state_dict({name: mean[name].to(tensor.dtype) for name, tensor in own.items()})


def config_of(adapter: Any, core: Llama) -> dict[str, Any]:
    """What `config.json` of the adapter's folder holds, by its own `save`."""
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(Path(folder) / "adapter", core)
        return read_config(Path(folder) / "adapter") if processes.is_writer() else {}


def write_adapter(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    card: str | None = None,
) -> None:
    """An adapter's folder with these weights, in place of what was there."""
    stored = {name: t.detach().to("cpu", dtype).contiguous() for name, t in tensors.items()}
    with replacing(folder) as temporary:
        save_tensors(temporary / WEIGHTS, stored)
        if card is not None:
            (temporary / "README.md").write_text(card)
        write_json(temporary / CONFIG, dict(config))


def averaged(folders: Sequence[Path]) -> dict[str, Tensor]:
    """The mean, fp32, of the tensors of adapters with the same names and shapes, read one after the other."""
    total: dict[str, Tensor] = {}
    for folder in folders:
        tensors = read_tensors(folder / WEIGHTS)
        if not total:
            total = {name: torch.zeros(tensor.shape) for name, tensor in tensors.items()}
        _same_shapes(tensors, total, folder, folders[0])
        for name, tensor in tensors.items():
            total[name] += tensor.float()
    return {name: tensor / len(folders) for name, tensor in total.items()}


def _same_shapes(
    tensors: Mapping[str, Tensor], others: Mapping[str, Tensor], folder: Path, first: Path
) -> None:
    for name in sorted(tensors.keys() | others.keys()):
        if name not in tensors or name not in others:
            owner = folder if name in tensors else first
            raise CheckpointError(f"{folder} and {first}: only {owner} has a tensor {name}")
        if tensors[name].shape != others[name].shape:
            raise CheckpointError(
                f"{folder} and {first}: {name} has shape {tuple(tensors[name].shape)} in one and "
                f"{tuple(others[name].shape)} in the other"
            )


def average_folders(folders: Sequence[Path], out: Path) -> None:
    """Write the mean of adapters of one kind and one core to `out`.

    Raises `UserError` for fewer than two folders or an `out` among them, `CheckpointError` where they differ
    in kind, core, configuration or shapes, or have low-rank updates of their core: each was trained with its
    own, and the mean of products is not the product of means.
    """
    if len(folders) < 2:
        raise UserError("give at least two adapter folders to average")
    if out.resolve() in [folder.resolve() for folder in folders]:
        raise UserError(f"{out}: is one of the folders to average; give another --out")
    configs = [read_config(folder) for folder in folders]
    first = configs[0]
    if "kind" not in first or "core_hash" not in first:
        raise CheckpointError(f"{folders[0]}: holds no adapter")
    for folder, config in zip(folders, configs, strict=True):
        if has_own_updates(config):
            raise CheckpointError(
                f"{folder}: has low-rank updates of its core, which cannot be averaged; leave it out"
            )
    for folder, config in zip(folders[1:], configs[1:], strict=True):
        for key, what in (("kind", "kind"), ("core_hash", "core"), ("adapter", "configuration")):
            if config.get(key) != first[key]:
                raise CheckpointError(
                    f"{folder} and {folders[0]}: adapters of another {what} cannot be averaged"
                )
    names = "\n".join(f"- {folder.name}" for folder in folders)
    card = f"# Average of {len(folders)} adapters\n\nThe mean of their weights, taken in fp32:\n\n{names}\n"
    write_adapter(out, first, averaged(folders), torch.bfloat16, card)
