"""Ears for a frozen Llama core: sound becomes vectors in its token stream.

`load("nano" | DIR, core)` gives a `SpeechAdapter` for `core_llm.adapters.Assistant`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speech_adapter.adapter import SpeechAdapter, load
    from speech_adapter.config import SpeechConfig

__all__ = ["SpeechAdapter", "SpeechConfig", "load"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `speech-adapter --help` does not wait for torch.
    if name in ("SpeechAdapter", "load"):
        from speech_adapter import adapter

        return getattr(adapter, name)
    if name == "SpeechConfig":
        from speech_adapter.config import SpeechConfig

        return SpeechConfig
    raise AttributeError(f"module 'speech_adapter' has no attribute '{name}'")
