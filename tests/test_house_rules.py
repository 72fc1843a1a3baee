"""The rules of the house that a program can check: direction of imports, sizes, start-up time."""

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {
    **{
        name: ROOT / "packages" / name / "src" / name
        for name in ("core_llm", "vision_adapter", "speech_adapter", "guard")
    },
    "evals": ROOT / "evals",
    "demo": ROOT / "demo",
}
MAY_IMPORT = {
    "core_llm": set(),
    "vision_adapter": {"core_llm"},
    "speech_adapter": {"core_llm"},
    "guard": {"core_llm"},
    "evals": {"core_llm", "vision_adapter", "speech_adapter", "guard"},
    "demo": {"core_llm", "vision_adapter", "speech_adapter", "guard", "evals"},
}


def files() -> Iterator[tuple[str, Path]]:
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            yield package, path


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", sorted(SOURCES))
def test_imports_point_one_way(package: str) -> None:
    allowed = MAY_IMPORT[package] | {package}
    for path in sorted(SOURCES[package].rglob("*.py")):
        wrong = {
            name for name in imported(ast.parse(path.read_text())) if name in SOURCES and name not in allowed
        }
        assert not wrong, f"{path} imports {wrong}"


def test_files_and_functions_stay_short() -> None:
    for _, path in files():
        text = path.read_text()
        assert text.count("\n") <= 500, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


def test_only_the_kernels_call_torch_attention() -> None:
    for package, path in files():
        if "kernels" not in path.parts:
            assert "scaled_dot_product_attention" not in path.read_text(), f"{package}: {path}"


HEAVY = ["torch", "transformers", "gradio", "whisper", "open_clip", "datasets", "sklearn", "fastapi"]


@pytest.mark.parametrize("package", sorted(SOURCES))
def test_command_lines_start_without_heavy_imports(package: str) -> None:
    code = f"import sys, {package}.cli; print([m for m in {HEAVY} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_unknown_command_fails_with_usage() -> None:
    started = time.monotonic()
    code = "import guard.cli, sys; sys.argv = ['guard', 'nope']; guard.cli.main()"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 2 and "Traceback" not in out.stderr + out.stdout
    assert time.monotonic() - started < 60  # only that it ends; start-up speed is measured in benchmarks/
