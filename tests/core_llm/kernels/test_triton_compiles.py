"""Every Triton kernel compiles to machine code for GPUs that need not be present.

The interpreter of the other tests accepts what the compiler does not; this is what a machine without a GPU
can check of the rest.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program may have, by compute capability
INFERENCE = {"document_spans_kernel", "forward_kernel", "split_kernel", "merge_kernel"}
GRADIENTS = {"delta_kernel", "key_gradient_kernel", "query_gradient_kernel"}


def compile_for(capability: int, cache: Path, *options: str) -> list[dict[str, Any]]:
    """What `compile_for.py` reports, compiled anew."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_for.py")), str(capability), *options],
        capture_output=True,
        text=True,
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: list[dict[str, Any]], capability: int) -> None:
    fitting = [variant for variant in found if variant["shared"] <= SHARED_MEMORY[capability]]
    tuned = {"forward_kernel", "key_gradient_kernel", "query_gradient_kernel"}
    for variant in found:
        if capability == 90 or variant["kernel"] not in tuned:  # older devices drop what does not fit
            assert variant in fitting, variant
        if variant["element"] != "torch.float32" and variant["kernel"] in tuned:
            assert variant["wgmma" if capability == 90 else "mma"], variant  # tensor cores at work
            if capability == 90:
                assert variant["stack"] <= 128, variant  # bytes of spilled registers per thread
    problems = {problem(variant) for variant in found}
    assert {problem(variant) for variant in fitting} == problems  # some tile size serves each


def problem(variant: dict[str, Any]) -> tuple[Any, ...]:
    """What is computed, tile sizes aside."""
    settings = variant["settings"]
    shape = tuple(settings.get(name) for name in ("HEAD_DIM", "CAUSAL", "SHARED", "ROWS"))
    return variant["kernel"], variant["element"], tuple(variant["masks"]), shape


def test_the_main_variants_compile_for_a_hopper_gpu(tmp_path: Path) -> None:
    found = compile_for(90, tmp_path)
    check(found, 90)
    assert {variant["kernel"] for variant in found} == INFERENCE


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_variant_compiles(tmp_path: Path, capability: int) -> None:
    found = compile_for(capability, tmp_path, "--all")
    check(found, capability)
    assert {variant["kernel"] for variant in found} == INFERENCE | GRADIENTS and len(found) > 200
