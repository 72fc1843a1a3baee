"""Several processes under torchrun: which one this is, which one writes, and sums over all of them.

In a program that runs alone every function here does nothing, or returns what it was given.
"""

import atexit
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_BUCKET = 1 << 24  # fp32 elements that are summed at a time: 64 MiB


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ


def gpu_for_each() -> bool:
    """Whether this machine has a CUDA GPU for every process that runs on it."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() else 1
    return torch.cuda.is_available() and torch.cuda.device_count() >= here


def start() -> None:
    """Join the other processes, once: gloo for tensors on a CPU, nccl for those on a GPU.

    Where there is a GPU for each process of this machine, it takes the one of its local rank as its current
    device; where there are fewer, all train on the CPU.
    """
    if not launched() or dist.is_initialized():
        return
    backend = "gloo"
    if gpu_for_each():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    atexit.register(_stop)


def _stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_writer() -> bool:
    """Whether this process writes files and talks to the user: one does."""
    return rank() == 0


@contextmanager
def writer_first() -> Iterator[None]:
    """Let the writer pass through the block before the others: what it leaves on disk, they find."""
    start()
    if not is_writer():
        dist.barrier()
    yield
    if is_writer() and count() > 1:
        dist.barrier()


def gathered(value: Any) -> list[Any]:
    """What each process gives, in the order of their ranks. Any object; all processes must call it."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, value)
    return found


def all_rows(rows: Tensor) -> Tensor:
    """Rows [n, ...] of each process, one behind the other in the order of ranks, without gradients.

    n may differ between processes.
    """
    if count() == 1:
        return rows
    sizes = gathered(len(rows))
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    found = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(found, padded)
    return torch.cat([part[:size] for part, size in zip(found, sizes, strict=True)])


def weighted_means(figures: Mapping[str, float], weight: float) -> dict[str, float]:
    """The mean of every figure over processes, `weight` being this process's."""
    if count() == 1:
        return dict(figures)
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    for own, share in gathered((dict(figures), weight)):
        for name, value in own.items():
            sums[name] = sums.get(name, 0.0) + share * value
            weights[name] = weights.get(name, 0.0) + share
    return {name: total / weights[name] for name, total in sums.items() if weights[name]}


def same_everywhere(tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors with those of the first process."""
    if count() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace every gradient by its sum over processes, taken in fp32.

    A parameter that has a gradient in one process alone gets it in all; one that has none anywhere keeps
    none, so that the optimizer leaves it as it is, as it would in a single process.
    """
    if count() == 1:
        return
    has = torch.tensor(
        [p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device
    )
    dist.all_reduce(has, op=dist.ReduceOp.MAX)
    bucket: list[Tensor] = []
    size = 0
    for parameter in (p for p, known in zip(parameters, has.tolist(), strict=True) if known):
        if bucket and (size + parameter.numel() > _BUCKET or parameter.device != bucket[0].device):
            _sum_bucket(bucket)
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(parameters: Sequence[Tensor]) -> None:
    parts = [
        torch.zeros(p.numel(), device=p.device) if p.grad is None else p.grad.float().flatten()
        for p in parameters
    ]
    flat = torch.cat(parts)
    dist.all_reduce(flat)
    for parameter, own in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = own.view_as(parameter).to(parameter.dtype)
