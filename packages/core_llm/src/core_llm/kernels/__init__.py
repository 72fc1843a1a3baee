"""The only door to attention. `attend` chooses a backend; nothing else in the project calls one.

Axes: B batch, H query heads, G key/value heads, T query positions, S key positions, D head dim.
"""

from core_llm.kernels.attention import BACKENDS, attend
from core_llm.kernels.mask import Mask

__all__ = ["BACKENDS", "Mask", "attend"]
