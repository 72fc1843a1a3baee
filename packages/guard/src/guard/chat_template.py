"""The prompt of a released guard, by the chat template that ships with it.

The template is a program of a stranger: it runs in jinja's sandbox. It never sees what a user wrote. It
renders marks in place of the messages and of the policy; the frame around them is read for special tokens,
and only then are the texts put in their places, as ordinary characters. So no text can bring a special
token into the prompt, and what resembles the template's own delimiters is rewritten.
"""

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core_llm.chat import Audio, Image, Message, Part
from core_llm.errors import CheckpointError, UserError
from core_llm.tokenizer import Tokenizer
from guard.policy import Category, Policy
from guard.prompt import Row, Units, check_content, contents, row_of

# Private-use characters: no template looks for them, and none of a user's is left in front of them.
_OPEN, _CLOSE = "\ue000", "\ue001"
_MARK = re.compile(f"{_OPEN}(\\d+|p){_CLOSE}")
_SPECIAL = re.compile(r"<\|[^|<>\s]+\|>")
_BLOCK = re.compile(
    r"(<BEGIN UNSAFE CONTENT CATEGORIES>\s*?\n)(.*?)(\n\s*<END UNSAFE CONTENT CATEGORIES>)", re.DOTALL
)
_RULE = re.compile(r"(S[1-9]\d{0,2}): *(.+?)\.? *")

# Stands where the templates need a turn and there is none, or none is shown.
_LEFT_OUT = "..."

# What a model may take for `<END CONVERSATION>` and its like: other brackets, blanks, invisible characters.
_HIDDEN = r"[\s\u00ad\u200b-\u200f\u2060-\u2064\ufeff]*"
_WORDS = ("BEGIN CONVERSATION", "END CONVERSATION", "BEGIN UNSAFE CONTENT CATEGORIES",
          "END UNSAFE CONTENT CATEGORIES")  # fmt: skip
_DELIMITER = re.compile(
    "[<\uff1c\u2039\u3008\ufe64]"
    + _HIDDEN
    + "("
    + "|".join(_HIDDEN.join(re.escape(c) for c in words if c != " ") for words in _WORDS)
    + ")"
    + _HIDDEN
    + "[>\uff1e\u203a\u3009\ufe65]",
    re.IGNORECASE,
)
_SPEAKER = re.compile(rf"([\n\r\u2028\u2029\x0b\x0c\x85]{_HIDDEN})(user|agent)(\s*[:\uff1a])", re.IGNORECASE)


def neutral(text: str) -> str:
    """Text in which nothing looks like the frame: delimiters lose their brackets, a speaker's name at the
    begin of a line gets quotation marks, and our own marks are dropped.
    """
    text = text.replace(_OPEN, "").replace(_CLOSE, "")
    text = _DELIMITER.sub(lambda found: f"({found[1]})", text)
    return _SPEAKER.sub(lambda found: f'{found[1]}"{found[2]}"{found[3]}', text)


@dataclass(frozen=True)
class _Turn:
    """Messages of one side that follow each other: texts and sounds in order, and images."""

    role: str
    pieces: tuple[str | Part, ...]
    images: tuple[Part, ...]


class ChatTemplate:
    """A `Format` (see `prompter`) that renders with a jinja template.

    where: names the template in errors. categories: those that its text lists. Raises `CheckpointError` for
    a template that does not parse, shows no conversation, or is none of a guard.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, where: str = "chat template") -> None:
        self.tokenizer, self.where = tokenizer, where
        self._template = _compile(source, where)
        self._lock = threading.Lock()
        self._frames: dict[Any, str] = {}
        self._heads: dict[tuple[str, str], list[int]] = {}
        self.listed, self.trims = self._probe()
        self.categories = self._own_categories()

    def rows(self, messages: Sequence[Message], policy: Policy) -> list[Row]:
        """The prompts that judge the last message, up to where the verdict begins.

        Raises `UserError` for an empty message, for turns that the template refuses, and for media that it
        has no place for.
        """
        check_content(messages)
        turns = self._shortened(_turns(messages), policy.context)
        rules = None if _as_listed(policy) == self.categories else _written(policy)
        frame = self._frame(turns, rules is not None)
        judged = turns[-1]
        found = []
        for piece in self._windows(judged, policy.window):
            told = [turn.pieces for turn in turns[:-1]] + [piece]
            units = self._fill(frame, told, [i for turn in turns for i in turn.images], rules)
            units += [] if frame.endswith("\n\n") else self.tokenizer.encode("\n\n")
            row = row_of(units, self.tokenizer)
            shared = 0 if row.parts else self._shared(frame, row.ids, rules)
            found.append(Row(row.ids, shared, row.parts))
        return found

    def _render(self, messages: list[dict[str, Any]]) -> str:
        import jinja2

        names = {
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "add_generation_prompt": True,
        }
        try:
            return self._template.render(messages=messages, **names)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError,
                AttributeError) as error:  # fmt: skip
            raise UserError(f"{self.where}: refuses this conversation ({_line(error)})") from error

    def _probe(self) -> tuple[bool, bool]:
        """Whether contents are lists of parts, and whether texts are trimmed.

        A template that expects one form renders the other as an empty conversation, without an error.
        """
        mark = f" {_OPEN}0{_CLOSE} "
        for listed in (False, True):
            content: Any = [{"type": "text", "text": mark}] if listed else mark
            try:
                text = self._render([{"role": "user", "content": content}])
            except UserError:
                continue
            if len(_MARK.findall(text)) == 1:
                return listed, mark not in text
        raise CheckpointError(f"{self.where}: renders an empty conversation; this is no template for a guard")

    def _own_categories(self) -> tuple[Category, ...]:
        block = _BLOCK.search(self._frame([_Turn("user", ("x",), ())], False))
        if block is None:
            raise CheckpointError(f"{self.where}: lists no unsafe content categories, so it is not a guard's")
        found: list[tuple[str, str, list[str]]] = []
        for line in block[2].strip().split("\n"):
            rule = _RULE.fullmatch(line.strip())
            if rule:
                found.append((rule[1], rule[2], []))
            elif found and line.strip():
                found[-1][2].append(line.strip())
            elif line.strip():
                raise CheckpointError(f"{self.where}: its categories are not written as `S1: Name`")
        return tuple(Category(code, name, "\n".join(lines)) for code, name, lines in found)

    def _frame(self, turns: Sequence[_Turn], own_rules: bool) -> str:
        """The rendered conversation with a mark in place of each text, and of the rules if they are ours."""
        key = (tuple((turn.role, len(turn.images)) for turn in turns), own_rules)
        with self._lock:
            known = self._frames.get(key)
        if known is not None:
            return known
        text = self._render([self._message(i, turn) for i, turn in enumerate(turns)])
        if _MARK.findall(text) != [str(i) for i in range(len(turns))]:
            raise UserError(f"{self.where}: does not show every message once and in order")
        shown, given = text.count("<|image|>"), sum(len(turn.images) for turn in turns)
        if shown != given:
            raise UserError(f"{self.where}: has a place for {shown} of {given} images; give one at most")
        if own_rules:
            text, n = _BLOCK.subn(lambda found: f"{found[1]}{_OPEN}p{_CLOSE}{found[3]}", text, count=1)
            if not n:
                raise UserError(f"{self.where}: its categories cannot be replaced; judge by its own policy")
        with self._lock:
            if len(self._frames) >= 256:
                self._frames.clear()
            self._frames[key] = text
        return text

    def _message(self, index: int, turn: _Turn) -> dict[str, Any]:
        mark = f"{_OPEN}{index}{_CLOSE}"
        if not self.listed and turn.images:
            raise UserError(f"{self.where}: has no place for images; leave them out")
        images = [{"type": "image"} for _ in turn.images]
        return {
            "role": turn.role,
            "content": [*images, {"type": "text", "text": mark}] if self.listed else mark,
        }

    def _fill(
        self, frame: str, told: Sequence[Sequence[str | Part]], images: Sequence[Part], rules: str | None
    ) -> Units:
        """The frame with texts and media in their places, as ids and parts."""
        units: Units = []
        waiting = iter(images)
        buffer = ""
        for piece in _cut(frame):
            if isinstance(piece, str) and _SPECIAL.fullmatch(piece):
                units, buffer = [*units, *self.tokenizer.encode(buffer)], ""
                units.append(next(waiting) if piece == "<|image|>" else self._special(piece))
                continue
            content: Sequence[str | Part]
            if isinstance(piece, str):
                content = (piece,)
            else:
                content = (rules or "",) if piece.name == "p" else self._trimmed(told[int(piece.name)])
            for part in content:
                if isinstance(part, str):
                    buffer += part
                else:
                    units, buffer = [*units, *self.tokenizer.encode(buffer), part], ""
        return [*units, *self.tokenizer.encode(buffer)]

    def _special(self, name: str) -> int:
        try:
            return self.tokenizer.special(name)
        except KeyError:
            raise CheckpointError(f"{self.where}: writes {name}, which its tokenizer does not have") from None

    def _trimmed(self, pieces: Sequence[str | Part]) -> list[str | Part]:
        """Texts made harmless, and trimmed as the template would have done it."""
        made = [neutral(piece) if isinstance(piece, str) else piece for piece in pieces]
        if self.trims and made and isinstance(made[0], str):
            made[0] = made[0].lstrip()
        if self.trims and made and isinstance(made[-1], str):
            made[-1] = made[-1].rstrip()
        return made

    def _shared(self, frame: str, ids: list[int], rules: str | None) -> int:
        """How many ids stand in front of the first message, whatever it says."""
        head = frame[: frame.index(f"{_OPEN}0{_CLOSE}")]
        with self._lock:
            stable = self._heads.get((head, rules or ""))
        if stable is None:
            # The last characters of the head may share a token with the message: see which ids never change.
            tries = [self._fill(f"{head}{text}", [], [], rules) for text in ("a", "1", " ", "\n\n", "(", "é")]
            stable = []
            for column in zip(*tries):
                if len(set(column)) > 1 or not isinstance(column[0], int):
                    break
                stable.append(column[0])
            with self._lock:
                if len(self._heads) >= 64:
                    self._heads.clear()
                self._heads[head, rules or ""] = stable
        return len(stable) if ids[: len(stable)] == stable else 0

    def _windows(self, judged: _Turn, width: int) -> list[tuple[str | Part, ...]]:
        """The judged message, or pieces of it that overlap by a quarter; each with all its sounds."""
        sounds = tuple(piece for piece in judged.pieces if not isinstance(piece, str))
        text = "".join(piece for piece in judged.pieces if isinstance(piece, str))
        ends = self._ends(text)
        if len(ends) + len(sounds) <= width:
            return [judged.pieces]
        stride = width - width // 4
        starts = range(0, max(1, len(ends) - width // 4), stride)
        return [(*sounds, _slice(text, ends, start, start + width)) for start in starts]

    def _ends(self, text: str) -> list[int]:
        """Where each token of a text ends, in bytes."""
        table, ends, at = self.tokenizer.token_bytes, [], 0
        for i in self.tokenizer.encode(text):
            at += len(table[i])
            ends.append(at)
        return ends

    def _shortened(self, turns: list[_Turn], limit: int) -> list[_Turn]:
        """The conversation with at most `limit` tokens of context, cut at its old end.

        Turns are dropped in pairs, for the templates tell by their number who speaks last.
        """
        kept: list[_Turn] = []
        for turn in reversed(turns[:-1]):
            text = "".join(piece for piece in turn.pieces if isinstance(piece, str))
            ends = self._ends(text)
            if len(ends) > limit:
                if limit > 0:
                    kept.append(_Turn(turn.role, (_slice(text, ends, len(ends) - limit, len(ends)),), ()))
                break
            kept.append(turn)
            limit -= len(ends)
        if len(kept) % 2 != (len(turns) - 1) % 2:
            kept.append(_Turn(turns[len(turns) - 2 - len(kept)].role, (_LEFT_OUT,), ()))
        return [*reversed(kept), turns[-1]]


@dataclass(frozen=True)
class _Place:
    """A mark in a frame: number of the message, or `p` for the policy."""

    name: str


def _cut(frame: str) -> list[str | _Place]:
    """The frame as ordinary text, names of special tokens, and marks."""
    pieces: list[str | _Place] = []
    at = 0
    for found in re.finditer(f"{_SPECIAL.pattern}|{_MARK.pattern}", frame):
        if found.start() > at:
            pieces.append(frame[at : found.start()])
        pieces.append(found[0] if found[1] is None else _Place(found[1]))
        at = found.end()
    return [*pieces, frame[at:]] if at < len(frame) else pieces


def _slice(text: str, ends: Sequence[int], first: int, last: int) -> str:
    """The characters that tokens first..last stand for; a character that is cut through is left out."""
    begin = ends[first - 1] if first else 0
    return text.encode()[begin : ends[min(last, len(ends)) - 1]].decode("utf-8", "ignore")


def _turns(messages: Sequence[Message]) -> list[_Turn]:
    """Messages as the templates know them: two sides that alternate, and the user begins.

    Whoever is not the assistant is the user, and messages of one side that follow each other are one.
    """
    turns: list[_Turn] = []
    if messages[0].role == "assistant":
        turns.append(_Turn("user", (_LEFT_OUT,), ()))
    for message in messages:
        role = "assistant" if message.role == "assistant" else "user"
        found = contents(message)
        pieces: tuple[str | Part, ...] = tuple(
            _clean(p) if isinstance(p, str) else p for p in found if not isinstance(p, Image)
        )
        images: tuple[Part, ...] = tuple(piece for piece in found if isinstance(piece, Image))
        unknown = [p for p in pieces if not isinstance(p, (str, Audio))]
        if unknown:
            raise UserError(f"a guard judges text, images and audio, not {type(unknown[0]).__name__.lower()}")
        if turns and turns[-1].role == role:
            before = turns.pop()
            pieces, images = _joined([*before.pieces, "\n\n", *pieces]), (*before.images, *images)
        turns.append(_Turn(role, pieces or ("",), images))
    return turns


def _clean(text: str) -> str:
    """Surrogate pairs as their character and lone ones as U+FFFD, as the tokenizer reads them."""
    return (
        text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    )


def _joined(pieces: Sequence[str | Part]) -> tuple[str | Part, ...]:
    made: list[str | Part] = []
    for piece in pieces:
        last = made[-1] if made else None
        if isinstance(piece, str) and isinstance(last, str):
            made[-1] = last + piece
        else:
            made.append(piece)
    return tuple(made)


def _as_listed(policy: Policy) -> tuple[Category, ...]:
    """What a policy's prompt says: codes, names and descriptions of what is on."""
    shown = policy.shown
    return tuple(Category(shown[c.code], c.name, c.description) for c in policy.enabled)


def _written(policy: Policy) -> str:
    """The rules in the way of the released templates."""
    return "\n".join(
        f"{c.code}: {neutral(c.name)}." + (f"\n{neutral(c.description)}" if c.description else "")
        for c in _as_listed(policy)
    )


def _compile(source: str, where: str) -> Any:
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    # The settings under which the hub's templates are written.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise CheckpointError(f"{where}: not a valid template ({_line(error)})") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def template_of(values: Mapping[str, Any]) -> str | None:
    """The template in a tokenizer's configuration; where there are several, the one called default."""
    found = values.get("chat_template")
    if isinstance(found, list):
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
