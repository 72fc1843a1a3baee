"""The adapter in a tiny random core, its gates opened so that pictures matter."""

import random
from pathlib import Path

import pytest
import torch

from core_llm.adapters import Assistant, Spans
from core_llm.chat import Image, Message, Text
from core_llm.checkpoint import core_hash
from core_llm.data.scenes import sample_scene
from core_llm.errors import CheckpointError, MediaError, UserError
from core_llm.model import Llama
from core_llm.sampling import Sampling
from core_llm.testing import tiny_core
from core_llm.tokenizer import Tokenizer
from vision_adapter.adapter import ImageMemory, VisionAdapter, load
from vision_adapter.config import VisionConfig, cross_attention_schedule
from vision_adapter.scenes import draw

CONFIG = VisionConfig(
    stem_channels=(8, 8), encoder_dim=32, encoder_layers=1, encoder_heads=2, encoder_ffn_dim=48,
    token_rows=3, cross_ffn_dim=32, cross_layers=(0, 1),
)  # fmt: skip
Family = tuple[Llama, Tokenizer, VisionAdapter]


@pytest.fixture(scope="module")
def family() -> Family:
    core, tokenizer = tiny_core()
    return core, tokenizer, open_adapter(core)


def open_adapter(core: Llama, gate: float = 1.5) -> VisionAdapter:
    torch.manual_seed(1)
    adapter = VisionAdapter(CONFIG, core.config).eval().requires_grad_(False)
    for name, parameter in adapter.named_parameters():
        if name.endswith("_gate"):
            parameter.fill_(gate)
        elif "stem" in name or "projector" in name:  # pictures far apart, so that a mix-up shows
            parameter.mul_(4)
    return adapter


def picture(seed: int) -> Image:
    rng = random.Random(seed)
    return Image(draw(sample_scene(rng, "several"), rng))


def ask(*content: Image | str) -> list[Message]:
    return [Message("user", [Text(part) if isinstance(part, str) else part for part in content])]


def test_schedule_follows_the_released_models_and_reaches_every_small_core() -> None:
    assert cross_attention_schedule(32) == (3, 7, 11, 15, 19, 23, 27, 31)
    assert len(cross_attention_schedule(80)) == 20 and cross_attention_schedule(80)[-1] == 79
    assert cross_attention_schedule(8) == (1, 3, 5, 7)
    assert cross_attention_schedule(6) == (0, 1, 2, 3, 4, 5)
    assert cross_attention_schedule(2) == (0, 1) and cross_attention_schedule(1) == (0,)


def test_text_only_request_equals_bare_core_bit_for_bit(family: Family) -> None:
    core, tokenizer, adapter = family
    conversation = ask("what color is the circle?")
    bare = Assistant(core, tokenizer).logits([conversation])[0]
    assert torch.equal(Assistant(core, tokenizer, [adapter]).logits([conversation])[0], bare)


def test_text_row_in_mixed_batch_equals_core_bit_for_bit(family: Family) -> None:
    core, tokenizer, adapter = family
    text = ask("how many red shapes are there?")
    request = Assistant(core, tokenizer, [adapter]).prepare([text, ask(picture(0), "what is it?"), text])
    assert request.embeddings is not None and request.interleave is not None
    positions = torch.arange(request.width).expand(3, -1)
    layers = request.interleave(positions)
    mixed = core.hidden(embeddings=request.embeddings, interleaved=layers)
    bare = core.hidden(embeddings=request.embeddings)
    assert torch.equal(mixed[0], bare[0]) and torch.equal(mixed[2], bare[2])
    assert not torch.allclose(mixed[1], bare[1], atol=1e-3)


def test_positions_before_the_image_do_not_see_it(family: Family) -> None:
    core, tokenizer, adapter = family
    request = Assistant(core, tokenizer, [adapter]).prepare([ask("look here: ", picture(0), "what is it?")])
    assert request.embeddings is not None and request.interleave is not None
    layers = request.interleave(torch.arange(request.width)[None])
    before = int((request.targets[0] == tokenizer.image_id).nonzero()[0])
    mixed = core.hidden(embeddings=request.embeddings, interleaved=layers)[0]
    bare = core.hidden(embeddings=request.embeddings)[0]
    assert torch.equal(mixed[:before], bare[:before])
    assert (mixed[before:] - bare[before:]).abs().amax(dim=-1).min() > 1e-3


def test_closed_gates_leave_the_hidden_states_alone(family: Family) -> None:
    core, _, _ = family
    adapter = VisionAdapter(CONFIG, core.config).requires_grad_(False)
    assert set(adapter.gates().values()) == {0.0}
    memory = adapter.encode(adapter.preprocess([picture(0)]))
    zero, never = torch.tensor([0]), torch.tensor([10_000])
    hidden = torch.randn(1, 5, core.config.dim)
    layers = adapter.interleave(memory, Spans(zero, zero, never, torch.arange(5)[None]))
    assert sorted(layers) == [0, 1]
    assert all(torch.equal(layer(hidden), hidden) for layer in layers.values())


def test_cached_decoding_equals_uncached(family: Family) -> None:
    core, tokenizer, adapter = family
    assistant = Assistant(core, tokenizer, [adapter])
    conversations = [
        ask(picture(1), "what is it?"),
        ask("hello"),
        ask(picture(2), "so: ", picture(3), "how many?"),
    ]
    greedy = Sampling(max_new_tokens=6)
    for conversation, answer in zip(conversations, assistant.generate(conversations, greedy), strict=True):
        request = assistant.prepare([conversation])
        said: list[int] = []
        for _ in range(greedy.max_new_tokens):  # no cache: everything again for every token
            embeddings = torch.cat(
                [embedded(request, core), core.embed(torch.tensor([said], dtype=torch.long))], dim=1
            )
            layers = (
                request.interleave(torch.arange(embeddings.shape[1])[None]) if request.interleave else None
            )
            hidden = core.hidden(embeddings=embeddings, interleaved=layers)
            token = int(core.logits(hidden[0, -1]).argmax())
            if token in tokenizer.stop_ids:
                break
            said.append(token)
        assert tokenizer.decode(said).strip() == answer


def embedded(request: object, core: Llama) -> torch.Tensor:
    embeddings, tokens = request.embeddings, request.tokens  # type: ignore[attr-defined]
    return embeddings if embeddings is not None else core.embed(tokens)


def test_batch_equals_one_by_one(family: Family) -> None:
    core, tokenizer, adapter = family
    assistant = Assistant(core, tokenizer, [adapter])
    conversations = [
        ask(picture(1), "what is it?"),
        ask(picture(2), "and now ", picture(3), " a much longer question than before?"),
        ask("no picture"),
    ]
    for together, conversation in zip(assistant.logits(conversations), conversations, strict=True):
        alone = assistant.logits([conversation])[0]
        assert torch.allclose(together, alone, atol=1e-4)


def test_each_question_reads_the_image_of_its_own_span(family: Family) -> None:
    core, _, adapter = family
    memory = adapter.encode(adapter.preprocess([picture(seed) for seed in range(3)]))
    # Row 0: none. Row 1: picture 0 from position 1, picture 1 from 4. Row 2: picture 2 from 2.
    rows, starts, ends = torch.tensor([1, 1, 2]), torch.tensor([1, 4, 2]), torch.tensor([4, 99, 99])
    hidden = torch.randn(3, 7, core.config.dim)
    together = adapter.interleave(memory, Spans(rows, starts, ends, torch.arange(7).expand(3, -1)))

    def alone(number: int, layer: int, row: int, positions: slice) -> torch.Tensor:
        single = memory.select(torch.tensor([number]))
        zero, never = torch.tensor([0]), torch.tensor([99])
        spans = Spans(zero, zero, never, torch.arange(7)[None])
        return adapter.interleave(single, spans)[layer](hidden[row : row + 1])[0, positions]

    for layer in (0, 1):
        out = together[layer](hidden)
        assert torch.equal(out[0], hidden[0]) and torch.equal(out[1, :1], hidden[1, :1])
        for number, row, positions in [(0, 1, slice(1, 4)), (1, 1, slice(4, 7)), (2, 2, slice(2, 7))]:
            expected = alone(number, layer, row, positions)
            assert torch.allclose(out[row, positions], expected, atol=1e-5)
            assert not torch.allclose(
                out[row, positions], alone((number + 1) % 3, layer, row, positions), atol=1e-3
            )


def test_two_images_without_text_between_are_both_read(family: Family) -> None:
    core, tokenizer, adapter = family
    assistant = Assistant(core, tokenizer, [adapter])
    first = assistant.logits([ask(picture(1), picture(2), "compare")])[0][-1]
    for other in (ask(picture(3), picture(2), "compare"), ask(picture(1), picture(3), "compare")):
        assert not torch.allclose(assistant.logits([other])[0][-1], first, atol=1e-4)


def test_image_keys_are_computed_once_and_never_repeated(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, tokenizer, adapter = family
    calls = []
    encode = adapter.encode

    def counted(inputs: torch.Tensor) -> ImageMemory:
        calls.append(len(inputs))
        memory = encode(inputs)
        shape = (len(inputs), core.config.n_kv_heads, CONFIG.n_patches, core.config.head_dim)
        assert all(tensor.shape == shape for tensor in (*memory.keys.values(), *memory.values.values()))
        return memory

    monkeypatch.setattr(adapter, "encode", counted)
    conversations = [ask(picture(1), "what?"), ask(picture(2), picture(3), "what?")]
    Assistant(core, tokenizer, [adapter]).generate(conversations, Sampling(max_new_tokens=5))
    assert calls == [3]


def test_only_the_adapter_gets_gradients(family: Family) -> None:
    core, tokenizer, _ = family
    adapter = open_adapter(core).requires_grad_(True)
    before = core_hash(core)
    turn = [*ask(picture(1), "what is it?"), Message("assistant", "red")]
    text_row = [*ask("hello"), Message("assistant", "yes")]
    Assistant(core, tokenizer, [adapter]).loss([turn, text_row]).backward()
    assert all(parameter.grad is None for parameter in core.parameters())
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
    assert core_hash(core) == before


def test_placeholders_and_images_must_agree(family: Family) -> None:
    core, _, adapter = family
    memory = adapter.encode(adapter.preprocess([picture(1), picture(2)]))
    one = torch.tensor([0])
    with pytest.raises(MediaError, match="1 image placeholders but 2 images"):
        adapter.interleave(memory, Spans(one, one, one + 9, torch.arange(4)[None]))


def test_bad_picture_is_named_before_the_core_runs(family: Family, tmp_path: Path) -> None:
    core, tokenizer, adapter = family
    with pytest.raises(MediaError, match="absent.png"):
        Assistant(core, tokenizer, [adapter]).generate([ask(Image(tmp_path / "absent.png"), "what?")])
    with pytest.raises(UserError, match="no adapter for image"):
        Assistant(core, tokenizer).generate([ask(picture(1), "what?")])


def test_saved_adapter_comes_back_and_belongs_to_one_core(family: Family, tmp_path: Path) -> None:
    core, tokenizer, adapter = family
    adapter.save(tmp_path / "eyes", core, "card")
    loaded = load(tmp_path / "eyes", core)
    assert loaded.config == adapter.config and not any(p.requires_grad for p in loaded.parameters())
    for name, tensor in adapter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16().float())
    other, _ = tiny_core(seed=5)
    with pytest.raises(CheckpointError, match="another core"):
        load(tmp_path / "eyes", other)
    weights = tmp_path / "eyes" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="truncated"):
        load(tmp_path / "eyes", core)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load(tmp_path / "nowhere", core)


def test_configuration_refuses_what_it_does_not_know() -> None:
    assert VisionConfig.from_dict(VisionConfig().to_dict()) == VisionConfig()
    with pytest.raises(CheckpointError, match="colour_space"):
        VisionConfig.from_dict({"colour_space": "lab"})
    with pytest.raises(CheckpointError, match="multiple"):
        VisionConfig(image_size=60)
    with pytest.raises(CheckpointError, match="divisible"):
        VisionConfig(encoder_dim=30, encoder_heads=4)
