"""Pictures and sounds for a guard that reads text: readers put them into words, the guard judges the words.

A guard whose weights an adapter was trained for takes the parts themselves (`Guard(..., adapters=...)`). A
guard that was fine-tuned from a core cannot: the core's adapters do not fit its weights any more. So the
adapters stay on the core that they were trained for, `core_llm.adapters.Assistant(core, [vision, speech])`,
and what that assistant reads in a picture or hears in a sound stands in the conversation in its place.

What cannot be read is not skipped: the verdict says so (`Verdict.unread`), and by default it is unsafe, for
nobody knows what passed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from core_llm.adapters import Assistant
from core_llm.chat import Audio, Image, Message, Part, Text
from core_llm.data.phrases import REPEAT_PROMPT
from core_llm.errors import UserError
from core_llm.sampling import Sampling
from guard.engine import Engine
from guard.policy import Policy
from guard.verdict import Verdict

READ_PROMPT = "what word is written?"
# Mean probability of a reading's tokens below which it is a guess: see "Images and speech" in docs/guard.md.
LEAST_SURE = 0.95
_BATCH = 16

OnUnread = Literal["unsafe", "flag"]


@dataclass(frozen=True)
class Reading:
    """What a reader found in one part. sure: False where it is a guess or was cut off."""

    text: str
    sure: bool = True

    @property
    def read(self) -> bool:
        """Whether this can stand for the part."""
        return self.sure and bool(self.text.strip())


class Reader(Protocol):
    """Puts parts of one kind into words."""

    def read(self, parts: Sequence[Part]) -> list[Reading]:
        """One reading per part, in order; raises `MediaError` for a file that cannot be decoded."""
        ...


class AssistantReader:
    """Asks an assistant with an adapter for the kind of part that is read.

    prompt: what it is asked. first: the part stands before the prompt. least: mean probability (geometric) of
    the answer's tokens from which it counts as sure; an answer that was cut off at `tokens` never does.
    """

    def __init__(
        self, assistant: Assistant, prompt: str, first: bool, least: float = LEAST_SURE, tokens: int = 64
    ) -> None:
        self.assistant, self.prompt, self.first = assistant, prompt, first
        self.least, self.settings = least, Sampling(max_new_tokens=tokens)

    def read(self, parts: Sequence[Part]) -> list[Reading]:
        """See `Reader.read`."""
        found = []
        for start in range(0, len(parts), _BATCH):
            asked = [[self._ask(part)] for part in parts[start : start + _BATCH]]
            for answer in self.assistant.complete(asked, self.settings, logprobs=0):
                chances = [token.logprob for token in answer.logprobs]
                sure = bool(chances) and math.exp(sum(chances) / len(chances)) >= self.least
                found.append(Reading(answer.text.strip(), sure and answer.finish_reason != "length"))
        return found

    def _ask(self, part: Part) -> Message:
        prompt = Text(self.prompt)
        return Message("user", (part, prompt) if self.first else (prompt, part))


Readers = Mapping[type, Reader]


def readers_of(assistant: Assistant) -> dict[type, Reader]:
    """Readers for what the assistant's adapters take: written words in pictures, spoken words in sounds."""
    kinds = {adapter.part for adapter in assistant.adapters}
    found: dict[type, Reader] = {}
    if Image in kinds:
        found[Image] = AssistantReader(assistant, READ_PROMPT, first=True)
    if Audio in kinds:
        found[Audio] = AssistantReader(assistant, REPEAT_PROMPT, first=False)
    return found


@dataclass(frozen=True)
class Heard:
    """A conversation as text. unread: what could not be read, such as "image 1 of message 2"; the texts of
    guesses are kept in `messages`, for what they may reveal.
    """

    messages: tuple[Message, ...]
    unread: tuple[str, ...] = ()


def put_into_words(
    conversations: Sequence[Sequence[Message]], readers: Readers, direct: Sequence[type] = ()
) -> list[Heard]:
    """Conversations whose parts of `readers`' kinds are replaced by what was read in them.

    Parts of the kinds in `direct` stay as they are. Raises `UserError` for any other part that is no text,
    `MediaError` for a file that cannot be decoded. Every reader is called once, over all conversations.
    """
    places: dict[type, list[tuple[int, int, int]]] = {kind: [] for kind in readers}
    for row, messages in enumerate(conversations):
        for m, message in enumerate(messages):
            for p, part in enumerate(message.parts):
                kind = _kind(part, readers, direct)
                if kind is not None:
                    places[kind].append((row, m, p))
    found: dict[tuple[int, int, int], Reading] = {}
    for kind, where in places.items():
        if where:
            readings = readers[kind].read([conversations[r][m].parts[p] for r, m, p in where])
            found |= dict(zip(where, readings, strict=True))
    return [_heard(row, messages, found) for row, messages in enumerate(conversations)]


def _kind(part: Part, readers: Readers, direct: Sequence[type]) -> type | None:
    """The reader that a part goes to; None where it stays."""
    if isinstance(part, tuple(direct)) or not hasattr(part, "data"):
        return None
    for kind in readers:
        if isinstance(part, kind):
            return kind
    name = type(part).__name__.lower()
    raise UserError(f"this guard has no reader for {name} parts: give it one, or leave the {name} out")


def _heard(row: int, messages: Sequence[Message], found: Mapping[tuple[int, int, int], Reading]) -> Heard:
    unread: list[str] = []
    made: list[Message] = []
    for m, message in enumerate(messages):
        seen: dict[str, int] = {}
        parts: list[Part] = []
        for p, part in enumerate(message.parts):
            reading = found.get((row, m, p))
            if reading is None:
                parts.append(part)
                continue
            name = type(part).__name__.lower()
            seen[name] = seen.get(name, 0) + 1
            if not reading.read:
                unread.append(f"{name} {seen[name]} of message {m + 1}")
            # Words on both sides stay words of their own.
            parts.append(Text(f" {reading.text.strip()} "))
        changed = any((row, m, p) in found for p in range(len(parts)))
        made.append(Message(message.role, _tidy(parts)) if changed else message)
    return Heard(tuple(made), tuple(unread))


def _tidy(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Neighbouring texts as one, with single blanks at the seams."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, Text) and isinstance(last, Text):
            joined[-1] = Text(f"{last.text.rstrip(' ')} {part.text.lstrip(' ')}")
        else:
            joined.append(part)
    return tuple(Text(part.text.strip(" ")) if isinstance(part, Text) else part for part in joined)


class ReadingEngine:
    """An engine that also takes pictures and sounds, by readers; an `Engine` itself.

    on_unread: "unsafe": a conversation with a part that nobody could read is unsafe, whatever else it says;
    "flag": its words, guesses too, are judged, and the verdict only names the part. A last message of which
    no word at all came out is unsafe either way. direct: kinds of parts that `engine` takes itself.
    """

    def __init__(
        self, engine: Engine, readers: Readers, on_unread: OnUnread = "unsafe", direct: Sequence[type] = ()
    ) -> None:
        if on_unread not in ("unsafe", "flag"):
            raise UserError(f"what nobody could read is 'unsafe' or gets a 'flag', not '{on_unread}'")
        self.engine, self.readers = engine, dict(readers)
        self.on_unread, self.direct = on_unread, tuple(direct)
        self.name = engine.name

    @property
    def sees(self) -> bool:
        """Whether images can be judged."""
        return Image in self.readers or Image in self.direct

    @property
    def policy(self) -> Policy:
        """The engine's own policy."""
        return self.engine.policy

    def check(self, policy: Policy) -> None:
        """Raise `UserError` where the engine cannot judge by `policy`."""
        self.engine.check(policy)

    def close(self) -> None:
        """Free what the engine holds."""
        self.engine.close()

    def classify(
        self, conversations: Sequence[Sequence[Message]], batch_size: int = 32, policy: Policy | None = None
    ) -> list[Verdict]:
        """`judge` under the guard's own name for it; the engine chooses its batches."""
        return self.judge(conversations, policy)

    def judge(
        self, conversations: Sequence[Sequence[Message]], policy: Policy | None = None
    ) -> list[Verdict]:
        """One verdict per conversation, in order; see `Engine.judge`."""
        heard = put_into_words(conversations, self.readers, self.direct)
        # Nothing came out of the last message: there is nothing to ask. One that was empty from the start
        # is the caller's mistake, and the engine says so.
        silent = [
            bool(messages) and _speaks(messages[-1]) and not _speaks(h.messages[-1])
            for messages, h in zip(conversations, heard, strict=True)
        ]
        rows = [row for row, nothing in enumerate(silent) if not nothing]
        judged = iter(self.engine.judge([heard[row].messages for row in rows], policy) if rows else [])
        return [
            self._unheard(h, policy) if nothing else marked(next(judged), h, self.on_unread)
            for h, nothing in zip(heard, silent, strict=True)
        ]

    def _unheard(self, heard: Heard, policy: Policy | None) -> Verdict:
        chosen = policy or self.policy
        codes = [category.code for category in chosen.enabled]
        scores = {code: 1 / len(codes) for code in codes}
        return Verdict(True, 1.0, 0.0, scores, (), chosen.digest, heard.unread)


def marked(verdict: Verdict, heard: Heard, on_unread: OnUnread = "unsafe") -> Verdict:
    """The verdict on a conversation's words, with what could not be read in it."""
    if not heard.unread:
        return verdict
    if verdict.unsafe or on_unread == "flag":
        return replace(verdict, unread=heard.unread)
    return replace(verdict, unsafe=True, flagged=(), unread=heard.unread)


def _speaks(message: Message) -> bool:
    return any(not isinstance(part, Text) or part.text.strip() for part in message.parts)
