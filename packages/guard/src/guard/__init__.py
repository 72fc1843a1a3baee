"""A safety classifier on a Llama core: conversation in, P(unsafe) and hazard categories out.

`Guard` judges conversations, `GuardedAssistant` lets an assistant speak only what was judged safe.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guard.guard import Guard, Verdict
    from guard.guarded import GuardedAssistant

__all__ = ["Guard", "GuardedAssistant", "Verdict"]

_HOMES = {"Guard": "guard.guard", "Verdict": "guard.guard", "GuardedAssistant": "guard.guarded"}


def __getattr__(name: str) -> Any:
    # Loaded on first use: `guard --help` must not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'guard' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
