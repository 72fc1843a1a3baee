"""The Assistant with adapters of the test's own: the seams, not any real adapter."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from core_llm.adapters import Assistant, Spans
from core_llm.chat import Audio, Image, Message, Text
from core_llm.errors import UserError
from core_llm.sampling import Sampling
from core_llm.testing import tiny_core


class Shift:
    """Adds each image's number to every position that sees the image."""

    part = Image
    encoded = 0

    def preprocess(self, parts: Sequence[Any]) -> Tensor:
        return torch.tensor([float(len(p.data)) for p in parts])

    def encode(self, inputs: Tensor) -> Tensor:
        self.encoded += 1
        return inputs

    def place(self, memory: Tensor) -> list[Tensor] | None:
        return None

    def interleave(self, memory: Tensor, spans: Spans) -> Mapping[int, Callable[[Tensor], Tensor]]:
        amount = (spans.visible() * memory).sum(-1, keepdim=True)
        return {1: lambda hidden: torch.where(spans.visible().any(-1, keepdim=True), hidden + amount, hidden)}


class Stream:
    """Places three vectors per sound."""

    part = Audio

    def preprocess(self, parts: Sequence[Any]) -> int:
        return len(parts)

    def encode(self, inputs: int) -> int:
        return inputs

    def place(self, memory: int) -> list[Tensor] | None:
        return [torch.full((3, 64), 0.1 * (i + 1)) for i in range(memory)]

    def interleave(self, memory: int, spans: Spans) -> Mapping[int, Callable[[Tensor], Tensor]]:
        return {}


CORE, TOKENIZER = tiny_core()
TEXT = [Message("user", "how many circles are there?")]
IMAGE = [Message("user", [Image(b"12345"), Text("what color is the shape?")])]
SOUND = [Message("user", [Text("Repeat after me:"), Audio(b"1"), Text("now")])]


def test_without_media_logits_equal_the_bare_core_bit_for_bit() -> None:
    bare = Assistant(CORE, TOKENIZER).logits([TEXT, TEXT * 2])
    for logits, expected in zip(
        Assistant(CORE, TOKENIZER, [Shift(), Stream()]).logits([TEXT, TEXT * 2]), bare
    ):
        assert torch.equal(logits, expected)


def test_text_row_in_mixed_batch_equals_core() -> None:
    assistant = Assistant(CORE, TOKENIZER, [Shift(), Stream()])
    mixed = assistant.logits([TEXT, IMAGE, SOUND])[0]
    # The same padded shape for the bare core: matrix products may round differently at other shapes.
    request = assistant.prepare([TEXT, IMAGE, SOUND])
    with torch.inference_mode():
        bare = CORE(request.targets)[0, : len(mixed)]
    assert torch.equal(mixed, bare)


def test_batch_equals_one_by_one() -> None:
    assistant = Assistant(CORE, TOKENIZER, [Shift(), Stream()])
    together = assistant.logits([SOUND, TEXT, IMAGE])
    for logits, conversation in zip(together, [SOUND, TEXT, IMAGE]):
        torch.testing.assert_close(logits, assistant.logits([conversation])[0], atol=1e-5, rtol=1e-4)
    settings = Sampling(max_new_tokens=8)
    answers = [assistant.generate([c], settings)[0] for c in (SOUND, TEXT, IMAGE)]
    assert assistant.generate([SOUND, TEXT, IMAGE], settings) == answers


def test_encoder_runs_once_per_request() -> None:
    shift = Shift()
    Assistant(CORE, TOKENIZER, [shift]).generate([IMAGE, IMAGE], Sampling(max_new_tokens=6))
    assert shift.encoded == 1


def test_placed_vectors_stand_where_the_placeholder_stood() -> None:
    request = Assistant(CORE, TOKENIZER, [Stream()]).prepare([SOUND])
    at = (request.targets[0] == TOKENIZER.audio_id).nonzero()[:, 0]
    assert request.embeddings is not None
    assert len(at) == 3 and torch.equal(request.embeddings[0, at], torch.full((3, 64), 0.1))


def test_a_later_image_takes_over_after_text_and_adjacent_images_share() -> None:
    seen: list[Tensor] = []

    class Look(Shift):
        def interleave(self, memory: Tensor, spans: Spans) -> Mapping[int, Callable[[Tensor], Tensor]]:
            seen.append(spans.visible())
            return {}

    parts = [Image(b"1"), Text("a"), Image(b"2"), Image(b"3"), Text("b")]
    assistant = Assistant(CORE, TOKENIZER, [Look()])
    assistant.logits([[Message("user", parts)]])
    visible, starts = seen[0][0], []
    request = assistant.prepare([[Message("user", parts)]])
    starts = (request.targets[0] == TOKENIZER.image_id).nonzero()[:, 0].tolist()
    assert visible[starts[0] + 1].tolist() == [True, False, False]
    assert visible[starts[1]].tolist() == [False, True, False]
    assert visible[-1].tolist() == [False, True, True]
    assert not visible[: starts[0]].any()


def test_loglikelihood_equals_a_recomputation_in_float64() -> None:
    assistant = Assistant(CORE, TOKENIZER)
    answer = TOKENIZER.encode("two") + [TOKENIZER.eot_id]
    prompt = assistant.prepare([TEXT]).targets[0]
    tokens = torch.cat([prompt, torch.tensor(answer)])[None]
    with torch.inference_mode():
        logp = CORE(tokens)[0].double().log_softmax(-1)
    expected = sum(logp[len(prompt) - 1 + i, t].item() for i, t in enumerate(answer))
    assert assistant.loglikelihood([TEXT, IMAGE[:0] + TEXT], ["two", "four"])[0] == pytest.approx(
        expected, abs=1e-4
    )


def test_stream_yields_the_generated_text() -> None:
    assistant = Assistant(CORE, TOKENIZER)
    settings = Sampling(max_new_tokens=12, temperature=1.0, seed=3)
    assert "".join(assistant.stream(TEXT, settings)).strip() == assistant.generate([TEXT], settings)[0]


def test_prefill_in_chunks_meets_the_same_pictures_and_sounds() -> None:
    assistant = Assistant(CORE, TOKENIZER, [Shift(), Stream()])
    settings = Sampling(max_new_tokens=8)
    plain = assistant.complete([SOUND, TEXT, IMAGE], settings, logprobs=0)
    for a, b in zip(assistant.complete([SOUND, TEXT, IMAGE], settings, logprobs=0, chunk=5), plain):
        assert a.tokens == b.tokens
        assert [x.logprob for x in a.logprobs] == pytest.approx([x.logprob for x in b.logprobs], abs=1e-4)
    fixed = assistant.complete([SOUND, TEXT, IMAGE], settings, engine="static")
    assert [c.tokens for c in fixed] == [c.tokens for c in plain]


def test_shared_messages_change_no_answer_with_or_without_media() -> None:
    assistant = Assistant(CORE, TOKENIZER, [Shift(), Stream()])
    system = [Message("system", "You name the shapes in a picture, and their colors.")]
    conversations = [system + SOUND, system + TEXT, system + IMAGE]
    settings = Sampling(max_new_tokens=8)
    prefix = assistant.share(system)
    shared = assistant.complete(conversations, settings, prefix=prefix)
    plain = assistant.complete(conversations, settings)
    assert [c.text for c in shared] == [c.text for c in plain]
    assert [c.usage.prompt_tokens for c in shared] == [c.usage.prompt_tokens for c in plain]
    assert {c.usage.cached_tokens for c in shared} == {len(prefix)}
    assert "".join(assistant.stream(conversations[0], settings, prefix=prefix)) == plain[0].text


def test_conversations_that_do_not_begin_with_the_prefix_are_refused() -> None:
    assistant = Assistant(CORE, TOKENIZER, [Shift(), Stream()])
    prefix = assistant.share([Message("system", "You name the shapes in a picture.")])
    with pytest.raises(UserError, match="shared prefix"):
        assistant.complete([TEXT], prefix=prefix)
    with pytest.raises(UserError, match="text only"):
        assistant.share(IMAGE)


def test_part_without_adapter_is_refused() -> None:
    with pytest.raises(UserError, match="no adapter for image"):
        Assistant(CORE, TOKENIZER, [Stream()]).generate([IMAGE])
