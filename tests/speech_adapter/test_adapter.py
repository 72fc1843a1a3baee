import json
from fractions import Fraction
from math import ceil, floor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from core_llm.adapters import Assistant
from core_llm.chat import Audio, Message, Text
from core_llm.checkpoint import core_hash, load_core
from core_llm.errors import CheckpointError, MediaError
from core_llm.model import Llama
from core_llm.testing import tiny_core
from core_llm.tokenizer import Tokenizer
from speech_adapter import SpeechAdapter, SpeechConfig, load
from speech_adapter.adapter import Projector, SpeechInputs, n_tokens
from speech_adapter.config import PRESETS
from speech_adapter.encoders import ConformerEncoder
from speech_adapter.testing import chirp

Core = tuple[Llama, Tokenizer]
SAMPLES = Path(__file__).parents[2] / "evals" / "samples"


def clips(*seconds: float) -> list[Audio]:
    return [Audio(chirp(s, seed=i), 16_000) for i, s in enumerate(seconds)]


@torch.no_grad()
def test_batch_equals_one_by_one_with_junk_in_the_padding(adapter: SpeechAdapter) -> None:
    parts = clips(0.31, 1.7, 0.02, 0.8)
    inputs = adapter.preprocess(parts)
    for row, n in zip(inputs.log_mel, inputs.frames.tolist(), strict=True):
        row[n:] = 1e4
    together = adapter.place(adapter.encode(inputs))
    for part, batched in zip(parts, together, strict=True):
        (alone,) = adapter.place(adapter.encode(adapter.preprocess([part])))
        torch.testing.assert_close(batched, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_merging_batch_equals_one_by_one_and_costs_at_most_the_formula(
    merging_adapter: SpeechAdapter,
) -> None:
    parts = clips(0.31, 1.7, 0.02, 0.8)
    together = merging_adapter.place(merging_adapter.encode(merging_adapter.preprocess(parts)))
    for part, batched in zip(parts, together, strict=True):
        (alone,) = merging_adapter.place(merging_adapter.encode(merging_adapter.preprocess([part])))
        torch.testing.assert_close(batched, alone, atol=1e-5, rtol=1e-5)
        assert 2 <= len(alone) <= n_tokens(len(part.data), merging_adapter.config)


@torch.no_grad()
def test_a_wider_batch_changes_nothing(adapter: SpeechAdapter) -> None:
    inputs = adapter.preprocess(clips(0.5))
    wide = torch.cat((inputs.log_mel, torch.full((1, 400, 80), float("nan"))), dim=1)
    (narrow_tokens,) = adapter.place(adapter.encode(inputs))
    (wide_tokens,) = adapter.place(adapter.encode(SpeechInputs(wide, inputs.frames)))
    torch.testing.assert_close(wide_tokens, narrow_tokens, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def one_layer() -> SpeechAdapter:
    """As small as it gets: its real forward pass is what counts the tokens of a minute."""
    config = SpeechConfig(
        64,
        dim=8,
        n_layers=1,
        n_heads=1,
        ffn_dim=8,
        adapter_dim=8,
        adapter_heads=1,
        adapter_ffn_dim=8,
        merge=False,
    )
    return SpeechAdapter(config, torch.zeros(16, 64)).eval()


@settings(max_examples=60, deadline=None)
@example(1)
@example(160)
@example(16_000)
@example(960_000)
@given(st.one_of(st.integers(160, 32_000), st.integers(160, 960_000)))
def test_every_length_from_10_ms_to_60_s_gives_the_documented_number_of_tokens(
    one_layer: SpeechAdapter, samples: int
) -> None:
    part = Audio(np.zeros(samples, dtype=np.float32), 16_000)
    with torch.no_grad():
        (tokens,) = one_layer.place(one_layer.encode(one_layer.preprocess([part])))
    seconds = Fraction(samples, 16_000)
    documented = ceil(Fraction(ceil(Fraction(floor(100 * (seconds + Fraction(32, 100))), 4)), 2)) + 2
    assert len(tokens) == documented == n_tokens(samples, one_layer.config)


def test_the_papers_sizes_are_a_billion_and_a_hundred_million() -> None:
    config = SpeechConfig(core_dim=4096, **PRESETS["llama-3"])
    with torch.device("meta"):
        encoder = ConformerEncoder(config)
        projector = Projector(config, encoder.width)
    sizes = [sum(p.numel() for p in module.parameters()) for module in (encoder, projector)]
    assert sizes[0] == pytest.approx(1.0e9, rel=0.05)
    assert sizes[1] == pytest.approx(1.0e8, rel=0.12)


def test_one_second_is_19_tokens_and_each_further_one_12_or_13() -> None:
    config = SpeechConfig(core_dim=192)
    assert n_tokens(16_000, config) == 19
    assert n_tokens(61 * 16_000, config) - n_tokens(16_000, config) == 750


@torch.no_grad()
def test_silence_gives_finite_tokens(adapter: SpeechAdapter) -> None:
    silence = Audio(np.zeros(16_000, np.float32), 16_000)
    (tokens,) = adapter.place(adapter.encode(adapter.preprocess([silence])))
    assert torch.isfinite(tokens).all()


def test_an_overlong_clip_is_refused_by_name(adapter: SpeechAdapter) -> None:
    with pytest.raises(MediaError, match="longer than the limit of 60 s: cut it up"):
        adapter.preprocess([Audio(np.zeros(61 * 16_000, np.float32), 16_000)])


def test_only_adapter_parameters_get_gradients(
    merging_adapter: SpeechAdapter, core_and_tokenizer: Core
) -> None:
    adapter = merging_adapter
    core, tokenizer = core_and_tokenizer
    before = core_hash(core)
    conversation = [Message("user", (Text("Repeat after me:"), *clips(0.4))), Message("assistant", "seven")]
    Assistant(core, tokenizer, [adapter.train()]).loss([conversation, conversation]).backward()
    missing = [name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.any()]
    missing.remove("reader.offset")  # only CTC trains the blank
    assert not missing
    assert all(p.grad is None for p in core.parameters())
    assert core_hash(core) == before


@torch.no_grad()
def test_several_clips_in_one_prompt_need_no_placeholder_counting(
    adapter: SpeechAdapter, core_and_tokenizer: Core
) -> None:
    core, tokenizer = core_and_tokenizer
    parts = clips(0.4, 0.9)
    both = [Message("user", (parts[0], Text(" and "), parts[1]))]
    assistant = Assistant(core, tokenizer, [adapter])
    (logits,) = assistant.logits([both])
    bare = Assistant(core, tokenizer).logits([[Message("user", " and ")]])[0]
    assert len(logits) == len(bare) + sum(n_tokens(len(p.data), adapter.config) for p in parts)


@torch.no_grad()
def test_text_row_in_mixed_batch_equals_core(adapter: SpeechAdapter, core_and_tokenizer: Core) -> None:
    core, tokenizer = core_and_tokenizer
    text = [Message("user", "what is one plus two?")]
    spoken = [Message("user", (Text("listen"), *clips(0.7)))]
    mixed = Assistant(core, tokenizer, [adapter]).logits([text, spoken])[0]
    alone = Assistant(core, tokenizer).logits([text])[0]
    torch.testing.assert_close(mixed, alone, atol=1e-5, rtol=1e-5)
    assert torch.equal(Assistant(core, tokenizer, [adapter]).logits([text])[0], alone)


def test_saved_adapter_loads_frozen_with_the_same_outputs(
    adapter: SpeechAdapter, core_and_tokenizer: Core, tmp_path: Path
) -> None:
    core, _ = core_and_tokenizer
    adapter.save(tmp_path / "speech", core)
    loaded = load(tmp_path / "speech", core)
    assert loaded.config == adapter.config
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, adapter.state_dict()[name], atol=1e-2, rtol=1e-2)


def test_an_adapter_of_another_core_is_refused(
    adapter: SpeechAdapter, core_and_tokenizer: Core, tmp_path: Path
) -> None:
    adapter.save(tmp_path, core_and_tokenizer[0])
    with pytest.raises(CheckpointError, match="another core"):
        load(tmp_path, tiny_core(seed=1)[0])


def test_a_missing_or_truncated_adapter_is_one_line(
    adapter: SpeechAdapter, core_and_tokenizer: Core, tmp_path: Path
) -> None:
    core, _ = core_and_tokenizer
    with pytest.raises(CheckpointError):
        load(tmp_path / "nowhere", core)
    adapter.save(tmp_path, core)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        load(tmp_path, core)


def test_config_refuses_unknown_and_missing_keys() -> None:
    values = SpeechConfig(core_dim=8).to_dict()
    assert SpeechConfig.from_dict(values) == SpeechConfig(core_dim=8)
    with pytest.raises(CheckpointError, match="banana"):
        SpeechConfig.from_dict({**values, "banana": 1})
    older = {key: value for key, value in values.items() if key not in ("encoder", "n_mels")}
    assert SpeechConfig.from_dict(older) == SpeechConfig(core_dim=8)
    del values["stack"]
    with pytest.raises(CheckpointError, match="stack"):
        SpeechConfig.from_dict(values)


def test_nano_has_at_most_two_point_two_million_parameters() -> None:
    adapter = SpeechAdapter(SpeechConfig(core_dim=192), torch.zeros(16, 192))
    assert sum(p.numel() for p in adapter.parameters()) <= 2_200_000


def test_what_was_learned_with_codes_serves_another_core_of_the_family(tmp_path: Path) -> None:
    core, tokenizer = load_core("nano")
    other = Llama(core.config).initialise(7)
    trained = load("nano", core)
    trained.save(tmp_path, other)
    moved = load(tmp_path, other)
    row = json.loads((SAMPLES / "clips.json").read_text())["digits"][0]
    inputs = trained.preprocess([Audio(SAMPLES / row["file"])])
    spelled = [a.reader.decode(m.vectors, m.lengths) for a in (trained, moved) for m in [a.encode(inputs)]]
    assert spelled[0] == spelled[1] and tokenizer.decode(spelled[0][0]).strip() == row["text"]
    # Each core reads its own embeddings of what was heard.
    for adapter, read_by in ((trained, core), (moved, other)):
        (vectors,) = adapter.place(adapter.encode(inputs))
        said = read_by.embed_tokens.weight[spelled[0][0]]
        assert (vectors - said).norm() < 0.2 * said.norm()
