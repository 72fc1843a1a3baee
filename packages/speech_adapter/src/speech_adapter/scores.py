"""Word error rates of held-out clips, each beside its control."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def word_error_rates(wanted: Sequence[str], heard: Sequence[str]) -> dict[str, float]:
    """`wer`, and `wer_shuffled` with every clip's text exchanged for another's; the same exchange every time.

    Not for the neighbour's: datasets often put clips that say the same side by side. In a random ring each
    takes the text of the next, so that none keeps its own.
    """
    import jiwer

    ring = np.random.default_rng(0).permutation(len(heard))
    exchanged = dict(zip(ring.tolist(), np.roll(ring, -1).tolist(), strict=True))
    return {
        "wer": jiwer.wer(list(wanted), list(heard)),
        "wer_shuffled": jiwer.wer(list(wanted), [heard[exchanged[i]] for i in range(len(heard))]),
    }
