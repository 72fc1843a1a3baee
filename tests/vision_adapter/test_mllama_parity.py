"""Random-initialised checkpoints of transformers' Mllama, read by core and adapter: the same logits.

Where transformers shows a picture to text that may not see it, ours follows the released code; a hook that
stops the leak makes both equal again. Axes: B batch, T text positions, V vocabulary, K tiles per picture.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from core_llm.adapters import Spans
from core_llm.cache import KVCache
from core_llm.checkpoint import read_core
from core_llm.generate import Request, generate, hidden_states
from core_llm.model import Llama
from core_llm.sampling import Sampling
from vision_adapter.mllama_adapter import MllamaAdapter
from vision_adapter.mllama_checkpoint import open_fused, read_adapter
from vision_adapter.mllama_config import tile_grids
from vision_adapter.mllama_encoder import Tiles

VOCAB, SIZE, IMAGE = 320, 28, 320
NEVER = 10_000
GRIDS = tile_grids(4)


class Family(NamedTuple):
    peer: Any
    core: Llama
    adapter: MllamaAdapter


def save_peer(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A small random Mllama whose gates are open, saved by transformers."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    text = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCAB, "cross_attention_layers": [1, 4],
        "rope_parameters": rope, "initializer_range": 0.15, "bos_token_id": 64, "eos_token_id": 65,
        "pad_token_id": 68,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "num_hidden_layers": 4, "num_global_layers": 2, "attention_heads": 4,
        "intermediate_size": 64, "image_size": SIZE, "patch_size": 14, "vision_output_dim": 96,
        "intermediate_layers_indices": [1, 3], "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    peer = MllamaForConditionalGeneration(config).eval()
    for name, parameter in peer.named_parameters():
        if "gate" in name and parameter.numel() == 1:
            torch.nn.init.uniform_(parameter, 0.4, 0.9)
        elif "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0.0 if name.endswith("bias") else 1.0, 0.2)
    peer.to(dtype).save_pretrained(folder)
    return peer


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    folder = tmp_path_factory.mktemp("peer")
    peer = save_peer(folder)
    weights = open_fused(folder)
    adapter = read_adapter(weights)
    config = replace(adapter.config, capture="output")
    adapter.config = adapter.encoder.config = config
    with torch.inference_mode():
        yield Family(peer, read_core(weights), adapter)


def some_tiles(ratios: Sequence[int], seed: int = 0) -> Tiles:
    generator = torch.Generator().manual_seed(seed)
    counts = tuple(GRIDS[ratio - 1][0] * GRIDS[ratio - 1][1] for ratio in ratios)
    return Tiles(torch.randn(sum(counts), 3, SIZE, SIZE, generator=generator), counts, tuple(ratios))


class Prompt(NamedTuple):
    """Rows of token ids, the tiles of all pictures, and where pictures stand: (row, start, end)."""

    tokens: Tensor
    tiles: Tiles
    parts: list[tuple[int, int, int]]


def prompt(rows: Sequence[str], ratios: Sequence[int], seed: int = 0) -> Prompt:
    """Rows in which "I" is a picture and other letters some token; pictures in a row are seen together."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB - 10, (len(rows), len(rows[0])), generator=generator)
    parts = []
    for number, row in enumerate(rows):
        for at, letter in enumerate(row):
            if letter == "I":
                tokens[number, at] = IMAGE
                run = at + len(row[at:]) - len(row[at:].lstrip("I"))
                following = row.find("I", run)
                parts.append((number, at, following if following >= 0 else NEVER))
    return Prompt(tokens, some_tiles(ratios, seed), parts)


def peer_logits(peer: Any, given: Prompt, **more: Any) -> Tensor:
    """transformers' logits [B, T, V], its inputs made as its processor makes them."""
    batch, length = given.tokens.shape
    numbers = [[p for p, part in enumerate(given.parts) if part[0] == row] for row in range(batch)]
    most = max(len(n) for n in numbers)
    pixels = torch.zeros(batch, most, 4, 3, SIZE, SIZE)
    ids = torch.zeros(batch, most, dtype=torch.long)
    valid = torch.zeros(batch, most, 4, dtype=torch.long)
    valid[:, :, 0] = 1  # its processor marks one tile of a missing picture
    mask = torch.zeros(batch, length, most, 4, dtype=torch.long)
    cut = given.tiles.pixels.split(given.tiles.counts)
    for row, own in enumerate(numbers):
        for slot, p in enumerate(own):
            count, (_, start, end) = given.tiles.counts[p], given.parts[p]
            pixels[row, slot, :count], ids[row, slot] = cut[p], given.tiles.ratios[p]
            valid[row, slot, :count] = 1
            mask[row, start:end, slot, :count] = 1
    inputs = {"pixel_values": pixels, "aspect_ratio_ids": ids, "aspect_ratio_mask": valid}
    return peer(given.tokens, cross_attention_mask=mask, **inputs, **more).logits


def request(family: Family, given: Prompt) -> Request:
    memory = family.adapter.encode(given.tiles)
    embeddings = family.core.embed(given.tokens.clamp(max=VOCAB - 1)).clone()
    for (row, start, _), vector in zip(given.parts, family.adapter.place(memory), strict=True):
        embeddings[row, start] = vector[0]
    rows, starts, ends = (torch.tensor(column) for column in zip(*given.parts, strict=True))
    lengths = torch.full((len(given.tokens),), given.tokens.shape[1])
    none = torch.zeros_like(given.tokens, dtype=torch.bool)

    def interleave(positions: Tensor) -> Any:
        return family.adapter.interleave(memory, Spans(rows, starts, ends, positions))

    return Request(None, embeddings, lengths, given.tokens, none, lengths, interleave)


def our_logits(family: Family, given: Prompt) -> Tensor:
    return family.core.logits(hidden_states(family.core, request(family, given)))


class Sealed:
    """Stops transformers' leak: what a position without a picture reads becomes zero, as it was released."""

    def __init__(self, peer: Any, given: Prompt) -> None:
        self.layers = [
            layer.cross_attn for layer in peer.model.language_model.layers if hasattr(layer, "cross_attn")
        ]
        seen = torch.zeros(given.tokens.shape, dtype=torch.bool)
        for row, start, end in given.parts:
            seen[row, start:end] = True
        self.seen = seen

    def __enter__(self) -> None:
        def seal(module: Any, inputs: Any, output: Any) -> Any:
            return (output[0] * self.seen[..., None], *output[1:])

        self.handles = [layer.register_forward_hook(seal) for layer in self.layers]

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("ratio", range(1, 9))
def test_encoder_equals_transformers_for_every_tile_grid(family: Family, ratio: int) -> None:
    given = some_tiles([ratio], seed=ratio)
    count = given.counts[0]
    pixels = torch.zeros(1, 1, 4, 3, SIZE, SIZE)
    pixels[0, 0, :count] = given.pixels
    valid = (torch.arange(4) < count).long()[None, None]
    vision = family.peer.model.vision_model
    theirs = vision(pixels, torch.tensor([[ratio]]), valid).last_hidden_state[0, 0, :count]
    ours = family.adapter.encoder(given)
    assert ours.shape == theirs.shape == (count, 5, 96) and theirs.std() > 0.3
    assert difference(ours, theirs) < 1e-4
    other = replace(given, ratios=(ratio % 8 + 1,))
    if GRIDS[ratio % 8][0] * GRIDS[ratio % 8][1] == count:  # the grid matters, not only the number of tiles
        assert difference(family.adapter.encoder(other), theirs) > 1e-2


def test_pictures_of_all_grids_encoded_together_equal_one_by_one(family: Family) -> None:
    # In float64: in fp32 sums in another order differ with the number of threads.
    encoder = copy.deepcopy(family.adapter.encoder).double()
    tiles = some_tiles([6, 1, 8, 3, 5, 2, 7, 4])
    given = replace(tiles, pixels=tiles.pixels.double())
    together = encoder(given).split(given.counts)
    for i, pixels in enumerate(given.pixels.split(given.counts)):
        alone = encoder(Tiles(pixels, given.counts[i : i + 1], given.ratios[i : i + 1]))
        assert difference(alone, together[i]) < 1e-10


def test_captured_inputs_are_the_outputs_of_the_layers_before(family: Family) -> None:
    encoder, given = family.adapter.encoder, some_tiles([6])
    outputs = encoder(given).unflatten(-1, (3, -1))
    encoder.config = replace(encoder.config, capture="input", intermediate_layers=(2, 3))
    try:
        inputs = encoder(given)[..., 32:].unflatten(-1, (32, 2))
    finally:
        encoder.config = family.adapter.config
    interleaved = outputs[..., 1:, :].flatten(-2).unflatten(-1, (32, 2))
    assert torch.equal(inputs[..., 0], interleaved[..., 0])  # input of 2 is the output of 1
    assert difference(inputs[..., 1], interleaved[..., 1]) > 1e-2  # input of 3 is not the output of 3


@pytest.mark.parametrize("ratio", range(1, 9))
def test_logits_equal_transformers_for_every_tile_grid(family: Family, ratio: int) -> None:
    given = prompt(["Iabcdefgh"], [ratio], seed=ratio)
    theirs = peer_logits(family.peer, given)
    assert theirs.std() > 0.3 and difference(our_logits(family, given), theirs) < 1e-4
    other = given._replace(tiles=some_tiles([ratio], seed=99))
    assert difference(our_logits(family, other), theirs) > 1e-2  # the picture matters


@pytest.mark.parametrize(
    ("rows", "ratios"),
    [
        (["IabcIdefghi"], [3, 6]),  # each text sees the picture before it
        (["IIabcIdefgh"], [1, 8, 2]),  # the first two are seen together
        (["IabcdIIefgh", "Iabcdefghij"], [2, 1, 4, 6]),
        (["Iabcdefghij", "Iabcdefghij"], [6, 6]),
    ],
)
def test_logits_equal_transformers_for_several_pictures(
    family: Family, rows: list[str], ratios: list[int]
) -> None:
    given = prompt(rows, ratios)
    theirs = peer_logits(family.peer, given)
    assert difference(our_logits(family, given), theirs) < 1e-4
    last = given.tiles.pixels.clone()
    last[-given.tiles.counts[-1] :] += 1
    changed = our_logits(family, given._replace(tiles=replace(given.tiles, pixels=last)))
    row, start, _ = given.parts[-1]
    sees = torch.zeros(given.tokens.shape, dtype=torch.bool)
    sees[row, start:] = True
    assert difference(changed[sees], theirs[sees]) > 1e-2  # the picture matters where it is seen
    assert difference(changed[~sees], theirs[~sees]) < 1e-4  # and nowhere else


@pytest.mark.parametrize(
    ("rows", "ratios"),
    [
        (["abIcdefghij"], [6]),  # text before the picture
        (["abIcdeIIfgh"], [5, 1, 2]),
        (["abIcdefghij", "abcdefghijk", "abcIdefIghi"], [6, 3, 2]),  # a row without a picture
    ],
)
def test_transformers_leaks_into_text_that_may_not_see_the_picture_and_ours_does_not(
    family: Family, rows: list[str], ratios: list[int]
) -> None:
    given = prompt(rows, ratios)
    ours = our_logits(family, given)
    assert difference(ours, peer_logits(family.peer, given)) > 1e-2  # transformers#39379
    with Sealed(family.peer, given):
        assert difference(ours, peer_logits(family.peer, given)) < 1e-4


def test_text_row_in_mixed_batch_equals_core_bit_for_bit_where_transformers_differs(family: Family) -> None:
    given = prompt(["abIcdefghij", "abcdefghijk"], [6])
    bare = family.core(given.tokens.clamp(max=VOCAB - 1))
    ours = our_logits(family, given)
    # Bit for bit is between batches of one shape: a product of other shapes rounds otherwise.
    layers_off = family.core.logits(family.core.hidden(embeddings=request(family, given).embeddings))
    assert torch.equal(ours[1], layers_off[1]) and difference(ours[1], bare[1]) < 1e-5
    assert torch.equal(ours[0, :2], layers_off[0, :2]) and difference(ours[0, 2:], layers_off[0, 2:]) > 1e-2
    alone = family.peer(given.tokens[1:]).logits
    assert difference(alone[0], bare[1]) < 1e-4
    assert difference(peer_logits(family.peer, given)[1], alone[0]) > 1e-2  # the control: theirs leaks


@pytest.mark.parametrize("rows", [["abIcdefIghi"], ["abIcdefIghi", "abcdefghijk", "IcdefIIghij"]])
def test_cached_decoding_equals_uncached(family: Family, rows: list[str]) -> None:
    given = prompt(rows, [6, 2] if len(rows) == 1 else [6, 2, 1, 3, 4])
    asked = request(family, given)
    whole = hidden_states(family.core, asked)
    cache = KVCache(family.core.config, len(rows), asked.width)
    parts = [hidden_states(family.core, asked, cache, at, end) for at, end in ((0, 4), (4, 9))]
    parts += [hidden_states(family.core, asked, cache, at, at + 1) for at in range(9, asked.width)]
    assert difference(torch.cat(parts, dim=1), whole) < 1e-5


def test_generated_tokens_equal_those_of_transformers(family: Family) -> None:
    given = prompt(["Iabcdefgh"], [6], seed=3)
    asked = request(family, given)
    ours = generate(family.core, asked, Sampling(temperature=0, max_new_tokens=8))
    tokens, theirs = given.tokens, []
    for _ in range(8):  # without a cache
        chosen = peer_logits(family.peer, given._replace(tokens=tokens))[:, -1].argmax(-1)
        theirs.append(int(chosen))
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
    assert list(ours[0].tokens) == theirs and len(set(theirs)) > 1


def test_pictures_given_in_another_order_are_still_those_of_their_rows(family: Family) -> None:
    given = prompt(["IabcdIIefgh", "Iabcdefghij"], [2, 1, 4, 6])
    order = [3, 1, 0, 2]
    cut = given.tiles.pixels.split(given.tiles.counts)
    shuffled = Tiles(
        torch.cat([cut[i] for i in order]),
        tuple(given.tiles.counts[i] for i in order),
        tuple(given.tiles.ratios[i] for i in order),
    )
    moved = given._replace(tiles=shuffled, parts=[given.parts[i] for i in order])
    assert difference(our_logits(family, moved), our_logits(family, given)) < 1e-5
