"""The adapter of the released architecture in an Assistant, its gates opened so that pictures matter."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from core_llm.adapters import Assistant, Spans
from core_llm.chat import Image, Message, Text
from core_llm.checkpoint import core_hash
from core_llm.errors import CheckpointError, MediaError
from core_llm.model import Llama
from core_llm.sampling import Sampling
from core_llm.testing import tiny_core
from core_llm.tokenizer import Tokenizer
from vision_adapter.mllama_adapter import MllamaAdapter
from vision_adapter.mllama_config import MllamaConfig
from vision_adapter.mllama_encoder import Tiles, VisionBlock
from vision_adapter.mllama_memory import plan

CONFIG = MllamaConfig(
    image_size=28, dim=32, n_layers=2, n_global_layers=1, n_heads=4, ffn_dim=48, intermediate_layers=(1,),
    cross_layers=(0, 1),
)  # fmt: skip
Family = tuple[Llama, Tokenizer, MllamaAdapter]


@pytest.fixture(scope="module")
def family() -> Family:
    core, tokenizer = tiny_core()
    return core, tokenizer, open_adapter(core)


def open_adapter(core: Llama) -> MllamaAdapter:
    torch.manual_seed(1)
    adapter = MllamaAdapter(CONFIG, core.config).eval().requires_grad_(False)
    for name, parameter in adapter.named_parameters():
        if parameter.dim() == 0:
            parameter.fill_(1.0)
        elif "projector" in name:
            parameter.mul_(4)
    return adapter


def picture(seed: int, width: int = 28, height: int = 28) -> Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image(Pillow.fromarray(pixels))


def ask(*content: Image | str) -> list[Message]:
    return [Message("user", [Text(part) if isinstance(part, str) else part for part in content])]


BATCH = [
    ask("which is it? ", picture(0, 56, 56), "tell me"),
    ask("how many red shapes are there?"),
    ask(picture(1), picture(2, 28, 84), "what are they? ", picture(3, 112, 28), "and that?"),
]


def test_pictures_of_any_shape_become_tiles_of_their_grid(family: Family) -> None:
    parts = [picture(0), picture(1, 112, 28), picture(2, 28, 84), picture(3, 56, 56)]
    tiles = family[2].preprocess(parts)
    assert tiles.counts == (1, 4, 3, 4) and tiles.ratios == (1, 4, 7, 6)
    assert tiles.pixels.shape == (12, 3, 28, 28)


def test_memory_holds_real_tiles_only_and_every_head_once(family: Family) -> None:
    core, _, adapter = family
    memory = adapter.encode(adapter.preprocess([picture(0), picture(1, 112, 28)]))
    assert memory.bounds == (0, 5, 25)
    for tensor in (*memory.keys.values(), *memory.values.values()):
        assert tensor.shape == (core.config.n_kv_heads, 25, core.config.head_dim)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_rows_read_their_pictures_in_place(family: Family) -> None:
    adapter = family[2]
    memory = adapter.encode(adapter.preprocess([picture(i) for i in range(4)]))
    rows, starts = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2, 0, 2])
    spans = Spans(rows, starts, torch.full((4,), 99), torch.full((2, 1), 7))
    (reading,) = plan(spans, memory.bounds, range(4)).readings
    q = torch.randn(2, 4, 1, 16)
    seen: list[int] = []
    import vision_adapter.mllama_memory as module

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: object) -> torch.Tensor:
        seen.extend((k.data_ptr(), v.data_ptr(), *k.shape))
        return q

    before, module.attend = module.attend, attend  # type: ignore[assignment]
    try:
        reading.read(q, memory.keys[0], memory.values[0])
    finally:
        module.attend = before
    assert seen == [memory.keys[0].data_ptr(), memory.values[0].data_ptr(), 2, 2, 10, 16]  # neither copied


def test_text_only_request_equals_bare_core_bit_for_bit(family: Family) -> None:
    core, tokenizer, adapter = family
    bare = Assistant(core, tokenizer).logits([BATCH[1]])[0]
    assert torch.equal(Assistant(core, tokenizer, [adapter]).logits([BATCH[1]])[0], bare)


def test_text_row_in_mixed_batch_equals_core_bit_for_bit(family: Family) -> None:
    core, tokenizer, adapter = family
    request = Assistant(core, tokenizer, [adapter]).prepare(BATCH)
    assert request.embeddings is not None and request.interleave is not None
    layers = request.interleave(torch.arange(request.width).expand(3, -1))
    mixed = core.hidden(embeddings=request.embeddings, interleaved=layers)
    bare = core.hidden(embeddings=request.embeddings)
    assert torch.equal(mixed[1], bare[1])
    first = int((request.targets[0] == tokenizer.image_id).nonzero()[0])
    assert first > 0 and torch.equal(mixed[0, :first], bare[0, :first])
    assert not torch.allclose(mixed[0, first:], bare[0, first:], atol=1e-2)
    assert not torch.allclose(mixed[2], bare[2], atol=1e-2)


def test_batch_equals_one_by_one(family: Family) -> None:
    assistant = Assistant(family[0], family[1], [family[2]])
    for together, conversation in zip(assistant.logits(BATCH), BATCH, strict=True):
        assert torch.allclose(together, assistant.logits([conversation])[0], atol=1e-4)


def test_encoder_and_keys_run_once_per_request(family: Family) -> None:
    core, tokenizer, adapter = family
    calls = {"encoder": 0, "keys": 0}
    block = adapter.cross_attention["0"]
    handles = [
        adapter.encoder.register_forward_hook(lambda *_: calls.update(encoder=calls["encoder"] + 1)),
        block.k_proj.register_forward_hook(lambda *_: calls.update(keys=calls["keys"] + 1)),  # type: ignore[union-attr]
    ]
    answers = Assistant(core, tokenizer, [adapter]).complete(BATCH, Sampling(max_new_tokens=6), stop_ids=())
    for handle in handles:
        handle.remove()
    assert all(len(answer.tokens) == 6 for answer in answers) and calls == {"encoder": 1, "keys": 1}


def test_generated_text_sees_the_last_picture(family: Family) -> None:
    assistant = Assistant(family[0], family[1], [family[2]])
    options = Sampling(max_new_tokens=12)
    one, other = (
        assistant.complete([ask(picture(i), "what is it?")], options, stop_ids=())[0].tokens for i in (0, 4)
    )
    assert one != other


def test_a_placeholder_becomes_the_first_learnable_row_and_the_core_keeps_its_own(family: Family) -> None:
    core, tokenizer, adapter = family
    request = Assistant(core, tokenizer, [adapter]).prepare([ask(picture(0), "what is it?")])
    assert request.embeddings is not None
    at = request.targets == tokenizer.image_id
    assert at.sum() == 1 and torch.equal(request.embeddings[at][0], adapter.token_rows[0])
    assert core.embed_tokens.weight.shape[0] == core.config.vocab_size == core.lm_head.weight.shape[0]


def test_with_closed_gates_only_the_learnable_row_differs_from_the_core(family: Family) -> None:
    core, tokenizer, _ = family
    closed = MllamaAdapter(CONFIG, core.config).eval()
    assert set(closed.gates().values()) == {0.0}
    request = Assistant(core, tokenizer, [closed]).prepare([ask(picture(0), "what is it?")])
    assert request.embeddings is not None and request.interleave is not None
    layers = request.interleave(torch.arange(request.width)[None])
    mixed = core.hidden(embeddings=request.embeddings, interleaved=layers)
    assert torch.allclose(mixed, core.hidden(embeddings=request.embeddings), atol=1e-6)


def test_training_reaches_every_parameter_and_leaves_the_core_as_it_is(family: Family) -> None:
    core, tokenizer, _ = family
    adapter = open_adapter(core).requires_grad_(True).train()
    before = core_hash(core)
    conversation = [*ask("it ", picture(0, 56, 28), "what?"), Message("assistant", "a circle")]
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.01)
    Assistant(core, tokenizer, [adapter]).loss([conversation]).backward()
    dead = [name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == [] and all(p.grad is None for p in core.parameters())
    optimizer.step()
    assert core_hash(core) == before


def test_the_last_block_leaves_out_padding_and_gives_what_it_would_give(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = family[2]
    tiles = adapter.preprocess([picture(0, 56, 28), picture(1)])
    rows: list[int] = []
    hook = adapter.encoder.global_transformer.layers[-1].mlp.register_forward_hook(
        lambda module, inputs, output: rows.append(inputs[0].shape[1])
    )
    saved = adapter.encoder(tiles)
    hook.remove()
    assert rows == [CONFIG.n_positions, 2 * CONFIG.n_positions]  # of one tile, of two; not of four, padded
    short = VisionBlock.forward

    def whole(self: VisionBlock, x: torch.Tensor, n_real: int, last: bool = False) -> torch.Tensor:
        return short(self, x, n_real)

    monkeypatch.setattr(VisionBlock, "forward", whole)
    assert torch.allclose(adapter.encoder(tiles), saved, atol=1e-5)


def test_bf16_stays_close_to_fp32(family: Family) -> None:
    core, _, adapter = family
    tiles = adapter.preprocess([picture(0, 56, 28)])
    exact = adapter.features(tiles)
    half = MllamaAdapter(CONFIG, core.config).eval()
    half.load_state_dict(adapter.state_dict())
    rounded = half.to(torch.bfloat16).features(tiles)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


def test_more_or_fewer_placeholders_than_pictures_is_an_error(family: Family) -> None:
    adapter = family[2]
    memory = adapter.encode(adapter.preprocess([picture(0)]))
    rows = torch.tensor([0, 0])
    spans = Spans(rows, rows, rows + 9, torch.arange(4)[None])
    with pytest.raises(MediaError, match="has 2 image placeholders but 1 images were given"):
        adapter.interleave(memory, spans)


def test_tiles_that_do_not_fit_their_grid_are_refused(family: Family) -> None:
    adapter = family[2]
    for counts, ratios in (((2,), (1,)), ((1,), (9,)), ((1,), (0,))):
        with pytest.raises(ValueError, match="does not have"):
            adapter.encode(Tiles(torch.zeros(sum(counts), 3, 28, 28), counts, ratios))
    with pytest.raises(ValueError, match="pixels have shape"):
        adapter.encode(Tiles(torch.zeros(1, 3, 14, 28), (1,), (1,)))


def test_settings_that_do_not_fit_each_other_are_refused() -> None:
    for change, message in (
        ({"n_heads": 5}, "not divisible by n_heads 5"),
        ({"image_size": 30}, "image_size 30 is not a multiple of 14"),
        ({"capture": "both"}, "unknown capture 'both'"),
        ({"intermediate_layers": (2,)}, "not ascending and below 2"),
        ({"intermediate_layers": (1, 0)}, "not ascending"),
        ({"token_rows": 0}, "at least 1"),
    ):
        with pytest.raises(CheckpointError, match=message):
            replace(CONFIG, **change)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="unknown vision configuration keys: colour"):
        MllamaConfig.from_dict({"colour": 1})
