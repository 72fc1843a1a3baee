"""A growing text, and how much of it may be shown: the one rule for every stream that a guard watches.

Text is released only when it was judged together with at least `hold_back` characters behind it, or with
the end of the text: no phrase of up to that length gets out in two halves that are each harmless.
"""

from core_llm.errors import UserError

EVERY = 120
HOLD_BACK = 40
SPAN = 4096


class Window:
    """Pieces in, text to judge, text to release.

    every: characters beyond the last check at which the next one is due. hold_back: characters at the end of
    a checked text that wait for the next check. span: characters before the unchecked ones that are judged
    with them; what is older was judged before, so the cost of a long text grows with its length only.
    """

    def __init__(self, every: int = EVERY, hold_back: int = HOLD_BACK, span: int = SPAN) -> None:
        if every < 1 or hold_back < 0 or span < hold_back:
            raise UserError(
                "every must be at least 1 character, hold_back not negative, span at least hold_back"
            )
        self.every, self.hold_back, self.span = every, hold_back, span
        self.text = ""
        self.checked = 0
        self.released = 0

    def add(self, piece: str) -> bool:
        """Take a piece; true when a check is due."""
        self.text += piece
        return len(self.text) - self.checked >= self.every

    @property
    def unchecked(self) -> bool:
        """Whether something was never judged."""
        return self.checked < len(self.text)

    @property
    def to_judge(self) -> str:
        """All that was never judged, with what stands before it."""
        return self.text[max(0, self.checked - self.span) :]

    def passed(self, end: bool = False) -> str:
        """`to_judge` was judged safe: what may be shown now. end: nothing more will come."""
        self.checked = len(self.text)
        until = self.checked if end else max(self.released, self.checked - self.hold_back)
        shown = self.text[self.released : until]
        self.released = until
        return shown
