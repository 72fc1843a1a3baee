"""Compile the C sources of this folder for the processor at hand and load them.

The library is kept in the user's cache folder under a name made of the sources, the flags and the processor:
a changed source, or another machine that shares the folder, compiles anew.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = ("linear.c", "attention.c", "elementwise.c", "block.c")
HEADERS = ("common.h",)
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC")
OFF = "CORE_LLM_CPU_KERNELS"  # set to 0 to do without
COMPILE_SECONDS = 60.0

log = logging.getLogger(__name__)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None (said once, with the reason) where they cannot be had."""
    if os.environ.get(OFF) == "0":
        return None
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        log.warning("no C compiler found: decoding on the CPU uses torch alone, which is slower; install gcc")
        return None
    try:
        path = _cache_folder() / f"kernels-{_fingerprint(compiler)}.so"
        if not path.exists():
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        log.warning("the CPU kernels did not compile, torch alone decodes, slower: %s", reason.strip()[-300:])
        return None


def _cache_folder() -> Path:
    """A folder of the user's own: a library in a shared one could be anyone's."""
    root = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(root) if root else Path.home() / ".cache") / "core_llm"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _fingerprint(compiler: str) -> str:
    here = Path(__file__).parent
    digest = hashlib.sha256(" ".join((compiler, *FLAGS, platform.machine())).encode())
    for name in (*HEADERS, *SOURCES):
        digest.update((here / name).read_bytes())
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():  # -march=native means the features of this very processor
        lines = (line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features")))
        digest.update(next(lines, "").encode())
    return digest.hexdigest()[:16]


def _compile(compiler: str, path: Path) -> None:
    """Compile beside the target and move it there: two processes at once do not disturb each other."""
    sources = [str(Path(__file__).parent / name) for name in SOURCES]
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(handle)
    try:
        # Apple's compiler has no -fopenmp: one thread is better than none.
        for threads in (("-fopenmp",), ()):
            command = [compiler, *FLAGS, *threads, *sources, "-o", temporary, "-lm"]
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False
            )
            if done.returncode == 0:
                os.replace(temporary, path)
                return
        done.check_returncode()
    finally:
        Path(temporary).unlink(missing_ok=True)
