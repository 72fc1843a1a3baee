"""The only door to attention. `attend` chooses a backend; nothing else in the project calls one.
`attend_shared` is its form for keys that all rows share.

Axes: B batch, H query heads, G key/value heads, T query positions, S key positions, D head dim.
"""

from core_llm.kernels.attention import BACKENDS, attend
from core_llm.kernels.mask import Mask
from core_llm.kernels.shared import attend_shared

__all__ = ["BACKENDS", "Mask", "attend", "attend_shared"]
