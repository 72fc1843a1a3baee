"""Tile sizes that the Triton kernels may choose from; the first call of each kind measures them.

The times of a first call (some seconds) are kept between runs with TRITON_CACHE_AUTOTUNING=1.
Axes: M rows of a query tile, N rows of a key tile, D head dim.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton

from core_llm.kernels.triton_tiles import INTERPRETED

# Per kernel, bytes of an element and D: (M, N, warps, pipeline stages). For compute capability 9.0 none
# needs more than 163 KiB of shared memory or spills more than a few registers, which a test checks; a device
# with less drops what does not fit. Elements of 4 bytes are multiplied without tensor cores, in small tiles.
TILES: dict[tuple[str, int, int], list[tuple[int, int, int, int]]] = {
    ("forward", 2, 64): [(128, 128, 8, 3), (128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3)],
    ("forward", 2, 128): [(128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3)],
    ("forward", 4, 64): [(64, 32, 4, 2)],
    ("forward", 4, 128): [(64, 32, 8, 2)],
    ("keys", 2, 64): [(64, 128, 8, 3), (64, 64, 4, 3), (32, 128, 4, 3)],
    ("keys", 2, 128): [(64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 8, 2), (32, 64, 4, 2)],
    ("keys", 4, 64): [(32, 64, 8, 2)],
    ("keys", 4, 128): [(16, 64, 8, 1)],
    ("queries", 2, 64): [(128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3)],
    ("queries", 2, 128): [(128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2)],
    ("queries", 4, 64): [(64, 32, 8, 2)],
    ("queries", 4, 128): [(64, 16, 8, 1)],
}
# Small and unequal: short texts then span several tiles.
_INTERPRETED = {"forward": (64, 32, 1, 1), "keys": (32, 64, 1, 1), "queries": (32, 32, 1, 1)}


def _config(tile: tuple[int, int, int, int]) -> triton.Config:
    m, n, warps, stages = tile
    return triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)


def configs(kernel: str) -> list[triton.Config]:
    """All configurations of a kernel: "forward", "keys" (their gradient) or "queries" (theirs)."""
    if INTERPRETED:
        return [_config(_INTERPRETED[kernel])]
    tiles = {tile: None for (name, _, _), group in TILES.items() if name == kernel for tile in group}
    return [_config(tile) for tile in tiles]


def keep_fitting(kernel: str) -> Callable[..., list[triton.Config]]:
    """Drops the configurations of other element sizes and head dims before anything is compiled."""

    def keep(found: list[triton.Config], arguments: dict[str, Any], **constants: Any) -> list[triton.Config]:
        tiles = TILES[kernel, arguments["q"].element_size(), constants["HEAD_DIM"]]
        return [c for c in found if _tile(c) in tiles]

    return keep


def _tile(config: triton.Config) -> tuple[int, int, int, int]:
    return (
        config.kwargs["BLOCK_M"],
        config.kwargs["BLOCK_N"],
        config.num_warps,
        config.num_stages,
    )


def length_class(n_queries: int, n_keys: int) -> int:
    """Lengths that share a measurement: up to 1,024, up to 8,192, beyond."""
    longest = max(n_queries, n_keys)
    return 0 if longest <= 1024 else 1 if longest <= 8192 else 2


def on_device(tensor: torch.Tensor) -> Any:
    """Context in which a kernel runs on the device of `tensor`, which need not be the current one."""
    return torch.cuda.device_of(tensor)
