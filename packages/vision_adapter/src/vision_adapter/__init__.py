"""Vision adapter: pictures for a frozen Llama core, by gated cross-attention."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vision_adapter.adapter import VisionAdapter, load

__all__ = ["VisionAdapter", "load"]


def __getattr__(name: str) -> Any:
    """Import on first use: the command line's help must not wait for torch."""
    if name in __all__:
        from vision_adapter import adapter

        return getattr(adapter, name)
    raise AttributeError(f"module 'vision_adapter' has no attribute '{name}'")
