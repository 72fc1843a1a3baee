"""Which device a command runs on."""

from typing import Literal

import torch

from core_llm import processes
from core_llm.errors import UserError


def chosen_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device that a `--device` names; "auto" is a GPU where this machine has one for each process.

    Under torchrun it is the GPU of this process's local rank. Raises `UserError` where there is none.
    """
    if name == "cuda" and not processes.gpu_for_each():
        raise UserError("--device cuda: there is no CUDA GPU for each process here; take --device cpu")
    if name == "cpu" or not processes.gpu_for_each():
        return torch.device("cpu")
    processes.start()
    return torch.device("cuda", torch.cuda.current_device())
