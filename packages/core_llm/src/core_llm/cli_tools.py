"""What every console script of the project shares: sub-commands from typed functions, one-line errors."""

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional as Positional

from core_llm.errors import UserError

# Operating-system failures that are the environment's, not the program's.
_ENVIRONMENT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.EADDRINUSE}
# A file where a folder has to be, or the other way round.
_ENVIRONMENT_ERRORS |= {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}

# A flag that is on by its name alone; the others take a value.
Switch = Annotated[int, tyro.conf.UseCounterAction]

_STYLE = (tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes)


def run(
    prog: str,
    description: str,
    commands: dict[str, Callable[..., Any]] | Callable[..., Any],
    args: Sequence[str] | None = None,
) -> None:
    """Run one of `commands` as a sub-command, or the one function there is without a sub-command, and exit.

    The flags come from each function's signature, the help from its docstring. A `UserError`
    becomes one line on stderr and exit status 2; Ctrl-C exits with 130 and SIGTERM with 143, as shells
    expect, and both let the program clean up (`finally`, `with`) on their way out.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    _join_others()
    try:
        if isinstance(commands, dict):
            tyro.extras.subcommand_cli_from_dict(
                commands, prog=prog, description=description, args=args, config=_STYLE
            )
        else:
            tyro.cli(commands, prog=prog, description=description, args=args, config=_STYLE)
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in _ENVIRONMENT_ERRORS:
            raise
        _fail(f"{error.filename or prog}: {error.strerror}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `... | head` closed our output: not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def print_saved(out: Path, figures: Mapping[str, float]) -> None:
    """Say where a stage saved its adapter, and its held-out figures."""
    print(f"adapter saved in {out}")
    for figure, value in figures.items():
        print(f"  {figure:24} {value:.4f}")


def _join_others() -> None:
    """Under torchrun: join the other processes; only the one that writes also talks."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from core_llm import processes

        processes.start()
        if not processes.is_writer():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
