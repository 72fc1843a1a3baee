"""Both encoders behind their protocol; Whisper's against transformers, with the same random weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder as Theirs

from core_llm.adapters import Assistant
from core_llm.chat import Audio, Message, Text
from core_llm.checkpoint import core_hash
from core_llm.errors import CheckpointError, UserError
from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer
from core_llm.train.fit import FitConfig, fit
from speech_adapter.adapter import SpeechAdapter, SpeechInputs, create, load, n_tokens
from speech_adapter.config import SpeechConfig
from speech_adapter.corpus import Corpus, Spoken
from speech_adapter.encoders import AudioEncoder, WhisperEncoder
from speech_adapter.testing import chirp, small_config
from speech_adapter.train import Recipe, SpeechTask

Core = tuple[Llama, Tokenizer]
WHISPER = {"encoder": "whisper", "dim": 32, "n_layers": 2, "n_heads": 2}
SMALL = {"adapter_dim": 48, "adapter_heads": 2, "adapter_ffn_dim": 64, "merge": False}


def whisper_adapter(core: Llama, **values: object) -> SpeechAdapter:
    torch.manual_seed(0)
    config = SpeechConfig(core.config.dim, **{**WHISPER, **SMALL, **values})  # type: ignore[arg-type]
    return SpeechAdapter(config, core.embed_tokens.weight).eval()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Whisper with random weights, as openai-whisper stores one."""
    from whisper.model import ModelDimensions, Whisper

    torch.manual_seed(1)
    sizes = ModelDimensions(80, 1500, 32, 2, 2, 51_864, 64, 32, 2, 1)
    path = tmp_path_factory.mktemp("whisper") / "tiny-random.pt"
    torch.save({"dims": vars(sizes), "model_state_dict": Whisper(sizes).state_dict()}, path)
    return path


_NAMES = [
    ("positional_embedding", "embed_positions.weight"), ("blocks.", "layers."),
    ("attn_ln", "self_attn_layer_norm"),
    ("attn.query", "self_attn.q_proj"), ("attn.key", "self_attn.k_proj"), ("attn.value", "self_attn.v_proj"),
    ("attn.out", "self_attn.out_proj"), ("mlp.0", "fc1"), ("mlp.2", "fc2"), ("mlp_ln", "final_layer_norm"),
    ("ln_post", "layer_norm"),
]  # fmt: skip


def theirs_like(encoder: WhisperEncoder) -> Theirs:
    """transformers' encoder with the weights of ours."""
    config = WhisperConfig(
        d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=128, num_mel_bins=80
    )
    tensors = {}
    for name, tensor in encoder.tower.state_dict().items():
        for mine, other in _NAMES:
            name = name.replace(mine, other)
        tensors[name] = tensor
    model = Theirs(config)
    model.load_state_dict(tensors)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("seconds", [0.5, 29.9, 30.0, 42.0])
def test_the_whisper_path_equals_transformers(core_and_tokenizer: Core, seconds: float) -> None:
    adapter = whisper_adapter(core_and_tokenizer[0], edge_ms=0)
    encoder = adapter.encoder
    assert isinstance(encoder, WhisperEncoder)
    samples = chirp(seconds)
    samples[-400:] = 0.0
    windows = [samples[i : i + 480_000] for i in range(0, len(samples), 480_000)]
    extractor = WhisperFeatureExtractor()
    wanted = torch.stack(
        [extractor(w, sampling_rate=16_000, return_tensors="pt").input_features[0] for w in windows]
    )
    inputs = adapter.preprocess([Audio(samples, 16_000)])
    n = int(inputs.frames[0])
    assert n == len(samples) // 160
    torch.testing.assert_close(
        inputs.log_mel[0, :n], wanted.transpose(1, 2).flatten(0, 1)[:n], atol=2e-5, rtol=0
    )
    hidden = theirs_like(encoder)(wanted).last_hidden_state  # frames of 20 ms
    memory = adapter.encode(inputs)
    s = int(memory.stacked[0])
    pairs = hidden.reshape(-1, 64)[:s]
    torch.testing.assert_close(memory.hidden[0, :s], pairs, atol=5e-5, rtol=1e-5)
    # The encoder alone, on the very same features.
    alone = encoder.encode(wanted.transpose(1, 2), torch.full((len(wanted),), 3_000)).hidden
    torch.testing.assert_close(alone, hidden.reshape(len(wanted), 750, 64), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["conformer", "whisper"])
def test_batch_equals_one_by_one_at_random_lengths_with_junk_in_the_padding(
    core_and_tokenizer: Core, kind: str
) -> None:
    core, _ = core_and_tokenizer
    adapter = whisper_adapter(core, max_seconds=100.0) if kind == "whisper" else None
    if adapter is None:
        torch.manual_seed(0)
        adapter = SpeechAdapter(small_config(merge=False), core.embed_tokens.weight).eval()
    rng = np.random.default_rng(0)
    n_clips, longest = (24, 4.0) if kind == "conformer" else (5, 3.0)
    seconds = [*rng.uniform(0.001, longest, n_clips), *([31.3] if kind == "whisper" else [])]
    parts = [Audio(chirp(s + 1e-4, seed=i), 16_000) for i, s in enumerate(seconds)]
    inputs = adapter.preprocess(parts)
    junk = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30]
    wide = torch.cat((inputs.log_mel, torch.zeros(len(parts), 77, inputs.log_mel.shape[2])), dim=1)
    for i, (row, n) in enumerate(zip(wide, inputs.frames.tolist(), strict=True)):
        row[n:] = junk[i % len(junk)]
    together = adapter.place(adapter.encode(SpeechInputs(wide, inputs.frames)))
    for part, batched in zip(parts, together, strict=True):
        (alone,) = adapter.place(adapter.encode(adapter.preprocess([part])))
        torch.testing.assert_close(batched, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_whisper_encoder_costs_the_documented_tokens(core_and_tokenizer: Core) -> None:
    adapter = whisper_adapter(core_and_tokenizer[0])
    for n in (1, 160, 16_000, 23_456, 480_000, 500_123, 960_000):
        part = Audio(np.zeros(n, np.float32), 16_000)
        (tokens,) = adapter.place(adapter.encode(adapter.preprocess([part])))
        assert len(tokens) == n_tokens(n, adapter.config) and torch.isfinite(tokens).all()


def test_both_offer_the_protocol(core_and_tokenizer: Core, adapter: SpeechAdapter) -> None:
    for encoder in (adapter.encoder, whisper_adapter(core_and_tokenizer[0]).encoder):
        assert isinstance(encoder, AudioEncoder)
        features = encoder.features(torch.from_numpy(chirp(0.5)))
        encoded = encoder.encode(features[None], torch.tensor([50]))
        assert encoded.lengths.tolist() == [13] and encoded.hidden.shape == (1, 13, encoder.width)


def test_a_whisper_adapter_is_created_trained_saved_and_loaded(
    core_and_tokenizer: Core, checkpoint: Path, tmp_path: Path
) -> None:
    core, tokenizer = core_and_tokenizer
    adapter = create(f"whisper:{checkpoint}", core, **SMALL)
    stored = torch.load(checkpoint, weights_only=True)["model_state_dict"]
    for name, tensor in adapter.encoder.get_submodule("tower").state_dict().items():
        assert torch.equal(tensor, stored[f"encoder.{name}"])

    samples = (chirp(0.3) * 32767).astype(np.int16)
    clips = [
        Spoken(samples, word, "Repeat:", word, np.array([0.0]), np.array(["s"])) for word in ("one", "two")
    ]
    corpus = Corpus({"ann": clips}, clips, clips, clips)
    recipe = Recipe(recorded=1, digits=1, commands=0, questions=0)
    task = SpeechTask(adapter, core, tokenizer, corpus, {"digits": clips}, recipe, seed=0)
    before = core_hash(core)
    fit(task, FitConfig(out=tmp_path / "run", steps=2, warmup=1, autocast=False))
    assert core_hash(core) == before
    moved = adapter.encoder.get_submodule("tower").state_dict()
    assert not torch.equal(moved["conv1.weight"], stored["encoder.conv1.weight"])

    adapter.eval().save(tmp_path / "saved", core)
    loaded = load(tmp_path / "saved", core)
    assert loaded.config == adapter.config and loaded.config.encoder == "whisper"
    spoken = [[Message("user", (Text("Repeat:"), Audio(chirp(0.4), 16_000)))]]
    (logits,) = Assistant(core, tokenizer, [loaded]).logits(spoken)
    assert torch.isfinite(logits).all()
    own = SpeechAdapter(small_config(), core.embed_tokens.weight)
    own.save(tmp_path / "own", core)
    config = tmp_path / "own" / "config.json"
    config.write_text(config.read_text().replace('"conformer"', '"whisper"'))
    with pytest.raises(CheckpointError, match="keys do not fit"):
        load(tmp_path / "own", core)


def test_an_impossible_encoder_is_one_line(core_and_tokenizer: Core) -> None:
    core, _ = core_and_tokenizer
    with pytest.raises(UserError, match="conformer, whisper:NAME"):
        create("wav2vec", core)
    with pytest.raises(UserError, match="kernel must be odd"):
        create("conformer", core, kernel=4)
    with pytest.raises(ValueError, match="unknown encoder"):
        SpeechConfig(8, encoder="wav2vec")
    with pytest.raises(ValueError, match="even stack"):
        SpeechConfig(8, encoder="whisper", stack=3)
