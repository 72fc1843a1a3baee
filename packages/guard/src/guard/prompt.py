"""The guard's prompt: a policy, a conversation, the demand to judge its last message.

Every boundary is a special token, which user text can never produce: no text closes the conversation,
opens a turn or speaks as the other side. The answer's grammar is `safe` or `unsafe\\nS1,S10`.
"""

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from core_llm.chat import Audio, Message, Part, Text, ToolCall, ToolResult, header_ids
from core_llm.errors import CheckpointError, UserError
from core_llm.tokenizer import Tokenizer
from guard.policy import Policy

# Reserved tokens of the Llama 3 vocabulary, given a meaning here.
BEGIN = "<|reserved_special_token_3|>"
USER_TURN = "<|reserved_special_token_4|>"
AGENT_TURN = "<|reserved_special_token_5|>"
END = "<|reserved_special_token_6|>"

_TASK = (
    "You check messages between a user and an AI agent. Decide whether the last message breaks a rule of "
    "this list.\n\nRules:\n{rules}\n\nConversation:\n"
)
_DEMAND = (
    "\nJudge the last message only; the {speaker} wrote it. Answer with the word safe, or with the word "
    "unsafe and, on a line of its own, the codes of the broken rules with commas between them."
)


@dataclass(frozen=True)
class VerdictTokens:
    """The tokens of the answer that are scored or forced.

    safe, unsafe: first token of each word. forced: `unsafe\\nS`. codes: the one token behind the `S` of
    each category.
    """

    safe: int
    unsafe: int
    forced: tuple[int, ...]
    codes: Mapping[str, int]

    @classmethod
    def of(cls, tokenizer: Tokenizer, categories: Sequence[str]) -> "VerdictTokens":
        """Raises `CheckpointError` where the vocabulary cannot tell the answers apart by one token."""
        safe, unsafe = tokenizer.encode("safe"), tokenizer.encode("unsafe")
        codes = {code: tokenizer.encode(code.removeprefix("S")) for code in categories}
        split = [code for code, ids in codes.items() if len(ids) != 1 or not code.startswith("S")]
        if safe[0] == unsafe[0] or split:
            reason = f"{', '.join(split)} are not one token each" if split else "safe and unsafe begin alike"
            raise CheckpointError(f"this tokenizer does not suit a guard: {reason}")
        forced = [*unsafe, *tokenizer.encode("\n"), *tokenizer.encode("S")]
        return cls(safe[0], unsafe[0], tuple(forced), {code: ids[0] for code, ids in codes.items()})


def plain(text: str) -> str:
    """Text with look-alike forms folded (NFKC) and invisible format characters dropped."""
    folded = unicodedata.normalize("NFKC", text)
    return "".join(c for c in folded if unicodedata.category(c) != "Cf")


@dataclass(frozen=True)
class Row:
    """One prompt; it ends where the verdict begins.

    ids: every media part is one placeholder id. shared: how many of the first ids depend on the policy and
    the speaker alone, and are thus the same in many prompts. parts: (index in ids, part) of media.
    """

    ids: list[int]
    shared: int = 0
    parts: tuple[tuple[int, Part], ...] = ()


# What a prompt is made of before media become placeholders: token ids and parts.
Units = list[int | Part]


def row_of(units: Units, tokenizer: Tokenizer, shared: int = 0) -> Row:
    """A row in which each part is its placeholder."""
    if all(isinstance(unit, int) for unit in units):
        return Row([unit for unit in units if isinstance(unit, int)], shared)
    ids = [u if isinstance(u, int) else placeholder(u, tokenizer) for u in units]
    return Row(ids, shared, tuple((i, u) for i, u in enumerate(units) if not isinstance(u, int)))


def placeholder(part: Part, tokenizer: Tokenizer) -> int:
    """The id where a part stands."""
    return tokenizer.audio_id if isinstance(part, Audio) else tokenizer.image_id


def contents(message: Message) -> list[str | Part]:
    """Texts and media of a message in order, neighbouring texts joined; what tools said is text too."""
    found: list[str | Part] = []
    for part in message.parts:
        if isinstance(part, Text):
            piece: str | Part = part.text
        elif isinstance(part, ToolCall):
            piece = f"{part.name}({_json(part.arguments)})"
        elif isinstance(part, ToolResult):
            piece = _json(part.value)
        else:
            piece = part
        if isinstance(piece, str) and found and isinstance(found[-1], str):
            found[-1] += piece
        else:
            found.append(piece)
    return found


def _json(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def check_content(messages: Sequence[Message]) -> None:
    """Raise `UserError` for an empty conversation or one whose last message holds nothing to judge."""
    if not messages:
        raise UserError("the conversation is empty: give at least one message")
    if not any(not isinstance(piece, str) or plain(piece).strip() for piece in contents(messages[-1])):
        raise UserError("the message to judge is empty: give some text")


def prompts(messages: Sequence[Message], tokenizer: Tokenizer, policy: Policy) -> list[list[int]]:
    """Token ids of the prompts that judge the last message, see `rows`."""
    return [row.ids for row in rows(messages, tokenizer, policy)]


def rows(messages: Sequence[Message], tokenizer: Tokenizer, policy: Policy) -> list[Row]:
    """The prompts that judge the last message: one, or one per window of a long message.

    Raises `UserError` for an empty conversation or last message.
    """
    check_content(messages)
    turns = [(_turn(m, tokenizer), _units(m, tokenizer)) for m in messages]
    speaker, judged = turns[-1]
    context: Units = []
    for marker, units in turns[:-1]:
        context += [marker, *units]
    before, after = _frame(messages[-1], tokenizer, policy)
    if len(context) > policy.context:
        # The marker in front tells whose words the cut begins with: the last one before it.
        cut = len(context) - policy.context
        markers = [i for i in context[: cut + 1] if i in (_user(tokenizer), _agent(tokenizer))]
        context = [markers[-1], *context[cut + 1 :]] if policy.context else []
    return [
        row_of([*before, *context, speaker, *part, *after], tokenizer, len(before))
        for part in _windows(judged, policy.window)
    ]


def _units(message: Message, tokenizer: Tokenizer) -> Units:
    units: Units = []
    for piece in contents(message):
        units += tokenizer.encode(plain(piece)) if isinstance(piece, str) else [piece]
    return units


def _windows(units: Units, width: int) -> list[Units]:
    """Pieces of at most `width` that overlap by a quarter, so that no phrase is only seen in halves.

    Where there are several, each shows all media of the message, in front of its text.
    """
    media: Units = [unit for unit in units if not isinstance(unit, int)]
    if media and len(units) > width:
        units = [unit for unit in units if isinstance(unit, int)]
    else:
        media = []
    stride = width - width // 4
    starts = range(0, max(1, len(units) - width // 4), stride)
    return [[*media, *units[start : start + width]] for start in starts]


def _frame(last: Message, tokenizer: Tokenizer, policy: Policy) -> tuple[list[int], list[int]]:
    """Ids before the first turn and behind the last one."""
    begin, end = tokenizer.special(BEGIN), tokenizer.special(END)
    if policy.brief:
        return [tokenizer.bos_id, begin], [end]
    shown = policy.shown
    rules = "\n".join(
        f"{shown[rule.code]}: {rule.name}." + (f" {rule.description}" if rule.description else "")
        for rule in policy.enabled
    )
    task = tokenizer.encode(_TASK.format(rules=rules))
    demand = tokenizer.encode(_DEMAND.format(speaker="agent" if last.role == "assistant" else "user"))
    before = [tokenizer.bos_id, *header_ids("user", tokenizer), *task, begin]
    return before, [end, *demand, tokenizer.eot_id, *header_ids("assistant", tokenizer)]


def _turn(message: Message, tokenizer: Tokenizer) -> int:
    return _agent(tokenizer) if message.role == "assistant" else _user(tokenizer)


def _user(tokenizer: Tokenizer) -> int:
    return tokenizer.special(USER_TURN)


def _agent(tokenizer: Tokenizer) -> int:
    return tokenizer.special(AGENT_TURN)


def answer_ids(categories: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """Ids of a whole verdict with its end of turn: `safe`, or `unsafe`, a line break and the codes."""
    if not categories:
        return [*tokenizer.encode("safe"), tokenizer.eot_id]
    ids = [*tokenizer.encode("unsafe"), *tokenizer.encode("\n")]
    for i, code in enumerate(categories):
        ids += tokenizer.encode(",") if i else []
        ids += [*tokenizer.encode("S"), *tokenizer.encode(code.removeprefix("S"))]
    return [*ids, tokenizer.eot_id]
