"""Generated sound and a small adapter for tests."""

import numpy as np

from speech_adapter.config import SpeechConfig


def chirp(seconds: float, rate: int = 16_000, seed: int = 0) -> np.ndarray:
    """A rising tone in a little noise, float32 mono [seconds · rate]."""
    time = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(seed).standard_normal(len(time))
    return (0.3 * np.sin(2 * np.pi * (200 + 300 * time) * time) + 0.01 * noise).astype(np.float32)


def small_config(core_dim: int = 64, merge: bool = True) -> SpeechConfig:
    """An adapter that runs in milliseconds, for `core_llm.testing.tiny_core`."""
    return SpeechConfig(
        core_dim,
        dim=32,
        n_layers=2,
        n_heads=2,
        ffn_dim=48,
        adapter_dim=48,
        adapter_heads=2,
        adapter_ffn_dim=64,
        merge=merge,
    )
