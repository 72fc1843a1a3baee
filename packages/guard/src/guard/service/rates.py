"""Rate limits: a bucket of inputs per key, refilled steadily.

The buckets live in this process: behind a load balancer with N replicas a key gets up to N times the rate.
"""

import time
from collections import OrderedDict
from collections.abc import Callable

# Buckets that are full again say nothing: the oldest are forgotten beyond this many.
MAX_BUCKETS = 10_000


class Rates:
    """Token buckets by name.

    rate: inputs per minute. burst: inputs that may come at once, by default as many as a minute brings.
    A request is let in while its bucket holds anything, and may then overdraw it: a long list waits no
    longer than its own size is worth, and no request is too big to ever pass.
    """

    def __init__(
        self, rate: float, burst: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.per_second, self.burst = rate / 60, float(burst or max(1.0, rate))
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # level, when

    def take(self, name: str) -> float:
        """Take one input; 0, or the seconds to wait where there is none."""
        level = self._level(name)
        if level < 1:
            return (1 - level) / self.per_second
        self._set(name, level - 1)
        return 0.0

    def charge(self, name: str, inputs: int) -> None:
        """Take inputs that are there whether the bucket holds them or not."""
        if inputs:
            self._set(name, self._level(name) - inputs)

    def _level(self, name: str) -> float:
        level, then = self._buckets.get(name, (self.burst, 0.0))
        return min(self.burst, level + (self._clock() - then) * self.per_second)

    def _set(self, name: str, level: float) -> None:
        self._buckets[name] = (level, self._clock())
        self._buckets.move_to_end(name)
        while len(self._buckets) > MAX_BUCKETS:
            self._buckets.popitem(last=False)
