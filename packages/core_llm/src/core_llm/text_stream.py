"""Token ids → text, piece by piece, cut before the first stop string."""

from collections.abc import Sequence

from core_llm.errors import UserError
from core_llm.tokenizer import Tokenizer


class TextStream:
    """The text of one growing answer.

    A piece never ends inside a character, nor inside what may still become a stop string. Once a stop
    string is there, `stopped` is true; it and all behind it are left out.
    Raises `UserError` for an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if not all(stop):
            raise UserError("a stop string is empty: leave it out")
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []  # since the last whole character
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token makes certain."""
        if self.stopped:
            return ""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd"):
            return ""  # a character still lacks bytes
        self._ids.clear()
        return self._release(text)

    def finish(self) -> str:
        """What was held back, once it is clear that no further token comes."""
        if self.stopped:
            return ""
        text = self._release(self._tokenizer.decode(self._ids))
        self._ids.clear()
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        text = self._held + text
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
