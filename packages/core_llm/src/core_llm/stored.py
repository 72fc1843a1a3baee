"""Weights on disk under our names, whatever the layout, read one tensor at a time."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from core_llm.config import LlamaConfig
from core_llm.errors import CheckpointError
from core_llm.model import Llama

DType = torch.dtype | Literal["auto"]
Module = TypeVar("Module", bound=nn.Module)


class StoredWeights(ABC):
    """A checkpoint whose configuration is read and whose tensors wait on the disk.

    `dtypes` maps our names to the stored dtypes; it is filled by `open`.
    """

    def __init__(self, folder: Path, config: LlamaConfig) -> None:
        self.folder = folder
        self.config = config
        self.dtypes: dict[str, torch.dtype] = {}

    def open(self) -> None:
        """Check names, shapes and dtypes of all tensors; raises `CheckpointError` that names file and key."""
        if not self.dtypes:
            self.check()

    @abstractmethod
    def check(self) -> None:
        """What `open` does the first time; fills `dtypes`."""

    @abstractmethod
    def read(self, name: str, dtype: torch.dtype, mapped: bool = True) -> Tensor:
        """One tensor by our name. Where nothing has to be converted and `mapped`, its memory is the file's.

        Such a tensor takes no memory until it is used, and the system may drop its pages and read them
        again. The mapping is private: writing to the tensor changes a copy of the page, never the file.
        """

    def resolve(self, dtype: DType) -> torch.dtype:
        """The dtype to read in: the given one, or for "auto" the one that all tensors are stored in.

        Raises `CheckpointError` where the stored dtypes differ.
        """
        self.open()
        if isinstance(dtype, torch.dtype):
            return dtype
        first_name, first = next(iter(self.dtypes.items()))
        for name, other in self.dtypes.items():
            if other != first:
                raise CheckpointError(
                    f"{self.folder}: {name} is stored in {other}, {first_name} in {first}; choose one dtype"
                )
        return first


class _WithoutMemory(TorchFunctionMode):
    """Parameters on the meta device, never initialised; other tensors as usual.

    `torch.device("meta")` would initialise them all, for which torch imports its compiler: seconds.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        if func in (torch.empty, torch.ones):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def skeleton(config: LlamaConfig) -> Llama:
    """A core whose parameters have shapes but no memory yet; its rotary frequencies are ready."""
    return without_memory(lambda: Llama(config))


def without_memory(build: Callable[[], Module]) -> Module:
    """What `build` returns, its parameters without memory: for modules that use torch.empty and nn.init."""
    with _WithoutMemory():
        return build()


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Our name → shape of every tensor that a checkpoint of this shape must hold, in the model's order."""
    # named_parameters lists a tied head once, under the embedding's name.
    return {name: tuple(parameter.shape) for name, parameter in skeleton(config).named_parameters()}


def check_keys(where: Path, wanted: set[str], found: set[str], spelling: Callable[[str], str]) -> None:
    """Raise `CheckpointError` for missing and unknown names, spelled as in the file."""
    missing, unknown = sorted(wanted - found), sorted(found - wanted)
    if missing or unknown:
        parts = [
            f"{label}: {', '.join(spelling(name) for name in names[:5])}"
            for label, names in (("missing", missing), ("unknown", unknown))
            if names
        ]
        raise CheckpointError(f"{where}: keys do not fit the model ({'; '.join(parts)})")
