"""LoRA (arXiv 2106.09685): low-rank updates of linear layers, applied to a core from outside.

The core's own modules and weights stay as they are: hooks add `scale · B A x` to what a layer gives, so a
core with LoRA attached has the hash, the state dict and, while B is zero, the outputs of the bare core.

Axes: K inputs and N outputs of a linear layer, R rank.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from core_llm.checkpoint import load_adapter, load_strict, save_adapter
from core_llm.errors import CheckpointError, UserError
from core_llm.model import Llama

KIND = "lora"
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers are updated, and how.

    targets: names of layers inside the blocks (`ALL_LINEAR` for every one). The update is scaled by
    alpha / rank. dropout: share of a layer's inputs that the update does not see while it trains.
    Raises `UserError` for a rank below 1, a dropout outside [0, 1) or an unknown target.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))  # JSON gives a list
        unknown = [name for name in self.targets if name not in ALL_LINEAR]
        if unknown or not self.targets:
            what = f"unknown LoRA target '{unknown[0]}'" if unknown else "LoRA has no target"
            raise UserError(f"{what}; known: {', '.join(ALL_LINEAR)}")
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise UserError(
                f"LoRA needs a rank of at least 1 and a dropout in [0, 1), not {self.rank} and {self.dropout}"
            )

    @property
    def scale(self) -> float:
        """Factor of B A x."""
        return self.alpha / self.rank


class LowRank(nn.Module):
    """One update. a [R, K] begins random, b [N, R] zero; both are fp32 whatever the core is in."""

    def __init__(self, n_inputs: int, n_outputs: int, config: LoRAConfig) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(config.rank, n_inputs))
        self.b = nn.Parameter(torch.zeros(n_outputs, config.rank))
        self.scale, self.dropout = config.scale, config.dropout

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N], in the dtype of x."""
        x = F.dropout(x, self.dropout, self.training)
        return F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype)) * self.scale

    def delta(self) -> Tensor:
        """What is to be added to the weight: [N, K], fp32."""
        return (self.b @ self.a) * self.scale


class LoRA(nn.Module):
    """Low-rank updates for the blocks of one core; its parameters are the updates and nothing else.

    Making one freezes the core and attaches the updates. `detach` gives the bare core back, bit for bit.
    """

    def __init__(self, core: Llama, config: LoRAConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        # Plain containers, not modules: the core's weights are no part of this module's state.
        self._core = (core,)
        self._hooks: list[RemovableHandle] = []
        self._kept: dict[str, Tensor] = {}
        core.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for name, linear in self._linears().items():
            update = LowRank(linear.in_features, linear.out_features, config)
            # Uniform with the bound of nn.Linear's default, as in the paper's code.
            bound = 1 / math.sqrt(linear.in_features)
            nn.init.uniform_(update.a, -bound, bound, generator=generator)
            _place(self, name, update)
        self.to(core.embed_tokens.weight.device)
        self.attach()

    @property
    def core(self) -> Llama:
        """The core that the updates belong to."""
        return self._core[0]

    @property
    def merged(self) -> bool:
        """Whether the core's weights hold the updates now."""
        return bool(self._kept)

    def _linears(self) -> dict[str, Any]:
        """The target layers of the core by name."""
        return {
            name: module
            for name, module in self.core.named_modules()
            if name.startswith("layers.") and name.rsplit(".", 1)[-1] in self.config.targets
        }

    def attach(self) -> None:
        """Let the core's layers give their output plus the update; twice is once."""
        if self.merged:
            raise UserError("these updates are merged into the core: unmerge before attaching them")
        if not self._hooks:
            for name, linear in self._linears().items():
                self._hooks.append(linear.register_forward_hook(_Adding(self._update(name))))

    def detach(self) -> None:
        """Give the bare core back; what was merged is taken out again, bit for bit."""
        self.unmerge()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _update(self, name: str) -> LowRank:
        update = self.get_submodule(name)
        assert isinstance(update, LowRank)
        return update

    @torch.no_grad()
    def merge(self) -> None:
        """Put the updates into the core's weights: it then runs as fast as without them.

        The weights are replaced, not overwritten, and the old ones kept for `unmerge`. Raises `UserError`
        for a quantised core.
        """
        if self.merged:
            return
        linears = self._linears()
        for name, linear in linears.items():
            weight = getattr(linear, "weight", None)
            if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
                raise UserError(f"{name} is quantised: merge into the unquantised core, then quantise that")
        self.detach()
        for name, linear in linears.items():
            old = linear.weight.data
            self._kept[name] = old
            linear.weight.data = (old.float() + self._update(name).delta().to(old.device)).to(old.dtype)

    def unmerge(self) -> None:
        """Put the core's own weights back, bit for bit; the updates stay detached."""
        linears = self._linears()
        for name, old in self._kept.items():
            linears[name].weight.data = old
        self._kept.clear()

    def save(self, folder: Path, card: str | None = None) -> None:
        """Write the updates alone, in bf16, with the hash of the core. Raises `UserError` while merged."""
        if self.merged:
            raise UserError("these updates are merged into the core: unmerge before saving them")
        save_adapter(folder, KIND, asdict(self.config), self.state_dict(), self.core, card)

    @classmethod
    def load(cls, folder: str | Path, core: Llama) -> "LoRA":
        """Updates from a folder, attached to their core.

        Raises `CheckpointError` for another core, an unknown setting, or a key that is missing, unknown or
        misshapen.
        """
        values, tensors = load_adapter(folder, KIND, core)
        lora = cls(core, _config(values, folder))
        try:
            load_strict(lora, tensors, folder)
        except CheckpointError:
            lora.detach()
            raise
        return lora.eval()


def _config(values: Mapping[str, Any], folder: str | Path) -> LoRAConfig:
    try:
        return LoRAConfig(**values)
    except (TypeError, UserError) as error:
        raise CheckpointError(f"{folder}: not the settings of a LoRA adapter ({error})") from error


def has_updates(core: Llama) -> bool:
    """Whether the updates of some LoRA are attached to a core."""
    hooks = (hook for module in core.modules() for hook in module._forward_hooks.values())
    return any(isinstance(hook, _Adding) for hook in hooks)


@dataclass(frozen=True, eq=False)
class _Adding:
    """The hook of a layer."""

    update: LowRank

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + self.update(inputs[0]).to(output.dtype)


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    """Register a module under a dotted name, so that its keys read like those of the core."""
    *parents, last = name.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(last, module)
