"""Files of a checkpoint: JSON that is checked, folders that appear whole or not at all, sizes in words."""

import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core_llm.errors import CheckpointError, UserError

CONFIG = "config.json"
PARAMS = "params.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")

# A file that makes the others a checkpoint is moved last, so that a reader never trusts half of one.
_LAST = (INDEX, PARAMS, CONFIG)
_CHECKPOINT_FILE = re.compile(
    r"config\.json|params\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|consolidated\.\d+\.pth"
)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|TB|KIB|MIB|GIB|TIB)?", re.IGNORECASE)
_UNITS = {"": 1, "B": 1} | {f"{u}B": 1000 ** (i + 1) for i, u in enumerate("KMGT")}
_UNITS |= {f"{u}IB": 1024 ** (i + 1) for i, u in enumerate("KMGT")}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises `CheckpointError` that names the file for anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not readable ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}, not a JSON object")
    return values


def write_json(path: Path, values: Any) -> None:
    """Indented, with a line feed at the end."""
    path.write_text(json.dumps(values, indent=2) + "\n")


def check_writable(path: Path) -> None:
    """Raise `UserError` before any work when a file could not be written at `path`."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"{path}: {folder} is not a folder")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot write there ({error.strerror})") from error


def lock(descriptor: int) -> bool:
    """Keep an open file for this program until it is closed; False where another program has it.

    On a file system without locks nothing can be promised, and the answer is True.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    return True


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file or nothing: a neighbour first, then a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def parse_size(text: str) -> int:
    """Bytes of "5GB" (powers of 1000) or "4GiB" (powers of 1024); raises `UserError` for other spellings."""
    found = _SIZE.fullmatch(text.strip())
    size = int(float(found[1]) * _UNITS[(found[2] or "").upper()]) if found else 0
    if size < 1:
        raise UserError(f"'{text}' is not a size; write it like 5GB, 500MB or 4GiB")
    return size


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary neighbour to write into; at the end of the block its files become `folder`'s.

    A new folder appears by one rename. In an existing one every file is replaced by a rename, weights
    that the new checkpoint does not name are removed, and other files stay. When the block fails,
    `folder` is as it was; when the process is killed, only the hidden neighbour is left over. Of several
    processes under torchrun one writes: what the others give is thrown away.
    """
    from core_llm import processes  # imports torch, which readers of small files need not wait for

    folder = folder.absolute()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, not a folder to write a checkpoint into")
    temporary = folder.with_name(f".{folder.name}.{processes.rank()}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if not processes.is_writer():
            return
        for path in temporary.iterdir():
            path.chmod(0o644)  # safetensors creates its files readable by the owner alone
        if folder.exists():
            _publish(temporary, folder)
        else:
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, folder: Path) -> None:
    names = sorted(
        (path.name for path in temporary.iterdir()), key=lambda n: _LAST.index(n) if n in _LAST else -1
    )
    # Shards of two checkpoints under one index would load without a complaint: until the new ones are
    # all in place there must be no index. A lone model.safetensors is replaced in one step.
    for marker in (INDEX, PARAMS):
        if marker in names:
            (folder / marker).unlink(missing_ok=True)
    for name in names:
        os.replace(temporary / name, folder / name)
    for path in folder.iterdir():
        if path.name not in names and _CHECKPOINT_FILE.fullmatch(path.name):
            path.unlink()
