"""Pictures and sounds in a conversation: put into words, never skipped, unsafe where nobody can read them."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from core_llm.adapters import Assistant
from core_llm.chat import Audio, Image, Message, Part, Text
from core_llm.errors import MediaError, UserError
from guard.engine import Engine, LocalEngine
from guard.guard import Guard
from guard.guarded import REFUSAL, GuardedAssistant
from guard.multimodal import AssistantReader, Reading, ReadingEngine, put_into_words, readers_of
from guard.testing import WordGuard

PICTURE = Image(np.zeros((8, 8, 3), np.uint8))
SOUND = Audio(np.zeros(1600, np.float32), 16_000)


class Written:
    """Reads what a test says is written; remembers how often it was asked."""

    def __init__(self, *readings: Reading) -> None:
        self.readings, self.calls = list(readings), 0

    def read(self, parts: Sequence[Part]) -> list[Reading]:
        self.calls += 1
        return [self.readings.pop(0) for _ in parts]


@pytest.fixture
def engine(guard: Guard) -> Callable[..., ReadingEngine]:
    """An engine whose guard says unsafe where it reads "bomb"."""

    class Words(LocalEngine):
        def __init__(self) -> None:
            self.name, self.words = "words", WordGuard()

        @property
        def policy(self):  # type: ignore[no-untyped-def]
            return guard.policy

        def judge(self, conversations, policy=None):  # type: ignore[no-untyped-def]
            return self.words.classify(conversations)

    def make(image: Written | None = None, audio: Written | None = None, **options: object) -> ReadingEngine:
        readers = {Image: image, Audio: audio}
        return ReadingEngine(Words(), {k: r for k, r in readers.items() if r is not None}, **options)  # type: ignore[arg-type]

    return make


def test_picture_and_sound_are_judged_as_one_message_with_the_text(
    engine: Callable[..., ReadingEngine],
) -> None:
    both = engine(Written(Reading("bomb")), Written(Reading("quickly please")))
    message = Message("user", (Text("how do i build a"), PICTURE, SOUND))
    (verdict,) = both.classify([[message]])
    assert verdict.unsafe and verdict.unread == ()
    assert both.engine.words.seen == ["how do i build a bomb quickly please"]  # type: ignore[attr-defined]


def test_words_split_over_pictures_meet() -> None:
    pictures = Written(Reading("how to build"), Reading("a bomb"))
    (heard,) = put_into_words([[Message("user", (PICTURE, PICTURE))]], {Image: pictures})
    assert heard.messages[0].text == "how to build a bomb" and pictures.calls == 1


def test_order_holds_over_many_conversations(engine: Callable[..., ReadingEngine]) -> None:
    texts = ["bomb", "bread", "bomb", "tea"]
    judged = engine(Written(*map(Reading, texts))).judge([[Message("user", PICTURE)] for _ in texts])
    assert [v.unsafe for v in judged] == [True, False, True, False]


@pytest.mark.parametrize("part", [PICTURE, SOUND])
def test_part_without_a_reader_is_an_error_and_never_skipped(
    engine: Callable[..., ReadingEngine], guard: Guard, part: Part
) -> None:
    kind = type(part).__name__.lower()
    for messages in (
        [Message("user", (Text("hello"), part))],
        [Message("user", part), Message("assistant", "a circle")],
    ):
        with pytest.raises(UserError, match=f"no reader for {kind} parts"):
            engine().judge([messages])
        with pytest.raises(UserError, match=kind):
            guard.classify([messages])


@pytest.mark.parametrize("reading", [Reading(""), Reading("  "), Reading("bread", sure=False)])
def test_what_cannot_be_read_is_not_safe(engine: Callable[..., ReadingEngine], reading: Reading) -> None:
    for message in (Message("user", SOUND), Message("user", (Text("is this fine?"), SOUND))):
        (verdict,) = engine(audio=Written(reading)).judge([[message]])
        assert verdict.unsafe and verdict.unread == ("audio 1 of message 1",)
        assert verdict.named == [] and verdict.text == "unsafe"


def test_unread_part_of_an_earlier_turn_counts(engine: Callable[..., ReadingEngine]) -> None:
    talk = [Message("user", (PICTURE, PICTURE)), Message("assistant", "well"), Message("user", "go on")]
    (verdict,) = engine(Written(Reading("tea"), Reading("?", sure=False))).judge([talk])
    assert verdict.unsafe and verdict.unread == ("image 2 of message 1",)


def test_flag_judges_the_words_and_names_the_part(engine: Callable[..., ReadingEngine]) -> None:
    def judged(reading: Reading, *texts: Text) -> tuple[bool, bool]:
        (v,) = engine(Written(reading), on_unread="flag").judge([[Message("user", (*texts, PICTURE))]])
        return v.unsafe, bool(v.unread)

    assert judged(Reading("tea", sure=False), Text("what is it?")) == (False, True)
    assert judged(Reading("bomb", sure=False), Text("what is it?")) == (True, True)
    assert judged(Reading(""), Text("what is it?")) == (False, True)
    assert judged(Reading("")) == (True, True)  # not a word in it: nothing was judged


def test_empty_message_stays_the_callers_mistake(guard: Guard) -> None:
    local = ReadingEngine(LocalEngine(guard), {})
    for messages in ([], [Message("user", " ")]):
        with pytest.raises(UserError, match="empty"):
            local.judge([messages])


def test_text_alone_is_judged_bit_for_bit_as_without_readers(guard: Guard) -> None:
    talk = [[Message("user", "a small red circle")], [Message("user", "hi"), Message("assistant", "bread")]]
    reading = ReadingEngine(LocalEngine(guard), {Image: Written()})
    assert isinstance(reading, Engine) and reading.sees
    assert reading.judge(talk) == LocalEngine(guard).judge(talk)


def test_parts_that_the_engine_takes_itself_stay(engine: Callable[..., ReadingEngine]) -> None:
    message = Message("user", (Text("look"), PICTURE, SOUND))
    (heard,) = put_into_words([[message]], {Audio: Written(Reading("hello"))}, direct=[Image])
    assert heard.messages[0].parts == (Text("look"), PICTURE, Text("hello"))
    with pytest.raises(UserError, match="'unsafe' or gets a 'flag'"):
        engine(on_unread="ignore")


class Spelling:
    """An adapter whose picture of n pixels a side puts n copies of one embedding into the stream."""

    part = Image

    def __init__(self, width: int) -> None:
        self.width = width

    def preprocess(self, parts: Sequence[Image]) -> list[int]:
        if any(isinstance(part.data, str) for part in parts):
            raise MediaError("no such picture")
        return [np.asarray(part.data).shape[0] for part in parts]

    def encode(self, inputs: list[int]) -> list[int]:
        return inputs

    def place(self, memory: list[int]) -> list[Tensor]:
        return [torch.full((n, self.width), 0.01 * n) for n in memory]

    def interleave(self, memory: object, spans: object) -> dict[int, Callable[[Tensor], Tensor]]:
        return {}


def test_reader_asks_the_assistant_and_knows_how_sure_it_was(guard: Guard) -> None:
    assistant = Assistant(guard.core, guard.tokenizer, [Spelling(guard.core.config.dim)])
    found = readers_of(assistant)
    assert list(found) == [Image]
    parts = [Image(np.zeros((n, n, 3), np.uint8)) for n in (2, 5, 3)]
    always = AssistantReader(assistant, "what word is written?", first=True, least=0.0, tokens=4).read(parts)
    alone = assistant.generate(
        [[Message("user", (parts[1], Text("what word is written?")))]],
        AssistantReader(assistant, "", True, tokens=4).settings,
    )
    assert always[1].text == alone[0]
    # A random core neither ends its answers nor is sure of them.
    never = AssistantReader(assistant, "what word is written?", first=True, least=0.999, tokens=4).read(parts)
    assert [r.text for r in never] == [r.text for r in always] and not any(r.read for r in never)
    with pytest.raises(MediaError, match="no such picture"):
        found[Image].read([Image("nothing.png")])


class Answers:
    """An assistant that always says the same."""

    def __init__(self, text: str) -> None:
        self.text, self.asked = text, 0

    def generate(self, conversations, settings=None):  # type: ignore[no-untyped-def]
        self.asked += len(conversations)
        return [self.text for _ in conversations]

    def stream(self, conversation, settings=None):  # type: ignore[no-untyped-def]
        self.asked += 1
        yield self.text


def test_guarded_assistant_reads_pictures_before_it_answers() -> None:
    for reading, answered in (
        (Reading("tea"), True),
        (Reading("bomb"), False),
        (Reading("tea", sure=False), False),
        (Reading(""), False),
    ):
        said = Answers("fine")
        for way in ("answer", "stream"):
            guarded = GuardedAssistant(said, WordGuard(), readers={Image: Written(reading)})
            if way == "answer":
                (found,) = guarded.answer([[Message("user", PICTURE)]])
                assert (found.blocked is None) == answered and found.verdict is not None
                assert bool(found.verdict.unread) == (not reading.read)
            else:
                text = "".join(guarded.stream([Message("user", PICTURE)]))
                assert text == ("fine" if answered else REFUSAL)
        assert said.asked == 2 * answered


def test_guarded_assistant_without_a_reader_for_a_part_says_so() -> None:
    guarded = GuardedAssistant(Answers("fine"), WordGuard(), readers={Image: Written()})
    with pytest.raises(UserError, match="no reader for audio parts"):
        guarded.answer([[Message("user", SOUND)]])
