"""From the model's log-probabilities to a verdict: one rule for every engine.

Axes: B prompts, K categories that the model tells apart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from guard.policy import Policy
from guard.prompt import VerdictTokens

# Below this P(safe) + P(unsafe) the answer is not a verdict: it is read as unsafe.
MIN_MASS = 0.5


@dataclass(frozen=True)
class Verdict:
    """Judgement of the last message of a conversation.

    probability: P(unsafe) / (P(safe) + P(unsafe)) in the most suspicious window; where categories that the
    guard always tells are off, only the part that falls on the others. mass: P(safe) + P(unsafe) there; where
    it is below one half the answer is no verdict and counts as unsafe. categories: code → probability that
    the message is unsafe and this is the first category named; they add up to `probability`. flagged: the
    categories named, where the policy has thresholds of their own for some; else None. policy: digest of the
    policy that was judged by. unread: pictures and sounds that nobody could read, see `multimodal`; a verdict
    that is unsafe for that alone names no category.
    """

    unsafe: bool
    probability: float
    mass: float
    categories: dict[str, float]
    flagged: tuple[str, ...] | None = None
    policy: str = ""
    unread: tuple[str, ...] = ()

    @property
    def named(self) -> list[str]:
        """The categories of an unsafe verdict: the strongest one, and all above a quarter of the verdict.

        With thresholds per category: those that passed theirs, and so chosen ones of the others where these
        together passed the overall threshold.
        """
        if not self.unsafe:
            return []
        if self.flagged is not None:
            return list(self.flagged)
        return list(strongest(self.categories, self.probability))

    @property
    def text(self) -> str:
        """The verdict in the guard's own grammar."""
        if not self.unsafe:
            return "safe"
        return f"unsafe\n{','.join(self.named)}" if self.named else "unsafe"


def strongest(scores: dict[str, float], whole: float) -> tuple[str, ...]:
    """The code with the highest score, and all with at least a quarter of the whole."""
    if not scores:
        return ()
    top = max(scores, key=lambda code: scores[code])
    return tuple(code for code, p in scores.items() if code == top or (p >= whole / 4 and p > 0))


@dataclass(frozen=True)
class Reading:
    """How the answers of one guard are read under one policy.

    policy: as its prompts are written. tokens: of all codes that the model tells apart, in its own codes.
    columns: the code of the policy at each of them, None where it is off. threshold: P(unsafe) that is
    unsafe. temperature: divides the difference of the logits of `unsafe` and `safe`. digest: of the policy.
    """

    policy: Policy
    tokens: VerdictTokens
    columns: tuple[str | None, ...]
    threshold: float
    temperature: float
    digest: str

    def verdicts(self, pairs: Tensor, codes: Tensor) -> list[Verdict]:
        """Verdicts from log-probabilities of `safe` and `unsafe` [B, 2] and of the codes' tokens [B, K]."""
        pairs = pairs.double()
        masses = pairs.exp().sum(-1).tolist()
        probabilities = (pairs / self.temperature).softmax(-1)[:, 1].tolist()
        shares = codes.double().softmax(-1).tolist()
        return [self.verdict(*row) for row in zip(probabilities, masses, shares, strict=True)]

    def verdict(self, probability: float, mass: float, shares: Sequence[float]) -> Verdict:
        """One verdict; numbers that are not finite are read as unsafe."""
        if not all(map(math.isfinite, [probability, mass, *shares])):
            # Broken weights or overflow: nothing was judged, so nothing may pass.
            probability, mass, shares = 1.0, 0.0, [1 / len(shares)] * len(shares)
        scores = {
            code: probability * share
            for code, share in zip(self.columns, shares, strict=True)
            if code is not None
        }
        readable = mass >= MIN_MASS
        # Without a verdict there is nothing that a category which is off could explain.
        if readable and None in self.columns:
            probability = sum(scores.values())
        unsafe, flagged = self._decide(probability, scores)
        return Verdict(unsafe or not readable, probability, mass, scores, flagged, self.digest)

    def _decide(self, probability: float, scores: dict[str, float]) -> tuple[bool, tuple[str, ...] | None]:
        """Whether it is unsafe, and why, where some categories have a threshold of their own.

        Those are judged by their own score alone, the others by their sum and the overall threshold.
        """
        own = {code: c.threshold for code, c in self.policy.categories.items() if c.threshold is not None}
        if not any(code in own for code in scores):
            return probability >= self.threshold, None
        passed = tuple(code for code, score in scores.items() if code in own and score >= own[code])
        others = {code: score for code, score in scores.items() if code not in own}
        rest = sum(others.values())
        if others and rest >= self.threshold:
            chosen = {*passed, *strongest(others, rest)}
            return True, tuple(code for code in scores if code in chosen)
        return bool(passed), passed or strongest(scores, probability)


def worse(first: Verdict | None, second: Verdict) -> Verdict:
    """The verdict that a message of several windows gets."""
    if first is None:
        return second
    return max(first, second, key=lambda verdict: (verdict.unsafe, verdict.probability))
