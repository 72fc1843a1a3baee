"""The original layout against a reference of its own, conversions, and what a failed one leaves behind.

Axes: B batch, T text positions, H query heads, G key/value heads, D head dim, C model width.
"""

import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from core_llm.chat import Message, Text, render
from core_llm.checkpoint import load_core, open_weights, read_core, save_core
from core_llm.cli import convert, generate
from core_llm.cli_tools import run
from core_llm.config import PRESETS, LlamaConfig, RopeScaling
from core_llm.convert import convert_checkpoint
from core_llm.errors import CheckpointError, UserError
from core_llm.files import parse_size
from core_llm.keys import ORIGINAL_KEYS, from_hf, from_original, to_hf, to_original
from core_llm.model import Llama
from core_llm.original_layout import config_from_params, ffn_dim, params_from_config
from core_llm.testing import tiny_core

PARAMS: dict[str, Any] = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 4,
    "vocab_size": 320,
    "ffn_dim_multiplier": 1.3,
    "multiple_of": 32,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
}
FFN = 224  # int(1.3 · int(2/3 · 256)) = 221, rounded up to a multiple of 32
# How the released code cuts each matrix for model parallelism.
BY_ROWS = ("wq", "wk", "wv", "w1", "w3", "output", "tok_embeddings")
BY_COLUMNS = ("wo", "w2")


def original_tensors(tied: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(7)
    shapes = {"tok_embeddings": (320, 64), "norm": (64,), "output": (320, 64)}
    for i in range(2):
        shapes |= {
            f"layers.{i}.attention.wq": (64, 64),
            f"layers.{i}.attention.wk": (32, 64),
            f"layers.{i}.attention.wv": (32, 64),
            f"layers.{i}.attention.wo": (64, 64),
            f"layers.{i}.feed_forward.w1": (FFN, 64),
            f"layers.{i}.feed_forward.w2": (64, FFN),
            f"layers.{i}.feed_forward.w3": (FFN, 64),
            f"layers.{i}.attention_norm": (64,),
            f"layers.{i}.ffn_norm": (64,),
        }
    tensors = {f"{name}.weight": (torch.randn(shape) / 6).to(dtype) for name, shape in shapes.items()}
    if tied:
        tensors["output.weight"] = tensors["tok_embeddings.weight"]
    return {**tensors, "rope.freqs": torch.zeros(4)}


def write_shards(folder: Path, tensors: dict[str, Tensor], n: int = 1, **params: Any) -> Path:
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(PARAMS | params))
    for rank in range(n):
        shard = {}
        for key, tensor in tensors.items():
            kind = key.split(".")[-2]
            axis = 0 if kind in BY_ROWS else 1 if kind in BY_COLUMNS else None
            shard[key] = tensor if axis is None else tensor.chunk(n, dim=axis)[rank].clone()
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
    return folder


def reference_logits(tensors: dict[str, Tensor], tokens: Tensor, factor: float) -> Tensor:
    """The original model in float64: rotary embedding as a product of complex numbers of channel pairs."""
    w = {key: value.double() for key, value in tensors.items()}
    frequency = 500000.0 ** -(torch.arange(0, 8, 2).double() / 8)
    if factor != 1:
        wavelength = 2 * math.pi / frequency
        smooth = ((8192 / wavelength - 1) / 3).clamp(0, 1)
        frequency = (1 - smooth) * frequency / factor + smooth * frequency
    t = tokens.shape[1]
    turn = torch.polar(torch.ones(t, 4).double(), torch.outer(torch.arange(t).double(), frequency))

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def turned(x: Tensor) -> Tensor:  # [B, T, H, D]
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn[:, None]).flatten(-2)

    x = w["tok_embeddings.weight"][tokens]
    for i in range(2):
        p = f"layers.{i}"
        h = norm(x, w[f"{p}.attention_norm.weight"])
        q, k, v = ((h @ w[f"{p}.attention.w{n}.weight"].T).unflatten(-1, (-1, 8)) for n in "qkv")
        q, k = turned(q), turned(k).repeat_interleave(2, dim=2)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / 8**0.5
        scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), -math.inf).softmax(-1)
        out = torch.einsum("bhts,bshd->bthd", scores, v.repeat_interleave(2, dim=2)).flatten(2)
        x = x + out @ w[f"{p}.attention.wo.weight"].T
        h = norm(x, w[f"{p}.ffn_norm.weight"])
        gate, up = h @ w[f"{p}.feed_forward.w1.weight"].T, h @ w[f"{p}.feed_forward.w3.weight"].T
        x = x + (torch.nn.functional.silu(gate) * up) @ w[f"{p}.feed_forward.w2.weight"].T
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


@pytest.mark.parametrize(("n", "tied"), [(1, False), (2, False), (4, True)])
def test_original_checkpoint_has_the_logits_of_the_original_model(tmp_path: Path, n: int, tied: bool) -> None:
    tensors = original_tensors(tied)
    core = read_core(open_weights(write_shards(tmp_path / "o", tensors, n)))
    assert core.config.tied_embeddings == tied and core.config.max_positions == 131_072
    tokens = torch.randint(0, 320, (2, 300), generator=torch.Generator().manual_seed(0))
    expected = reference_logits(tensors, tokens, factor=32.0 if tied else 8.0)
    with torch.no_grad():
        torch.testing.assert_close(core(tokens).double(), expected, atol=1e-4, rtol=0)
    wrong = reference_logits(tensors, tokens, factor=1.0)
    assert (wrong - expected).abs().max() > 1e-3  # the comparison would notice another scaling


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2])
def test_original_to_hf_to_original_is_bit_exact(
    tmp_path: Path, n: int, dtype: torch.dtype, tied: bool
) -> None:
    tensors = original_tensors(tied, dtype)
    write_shards(tmp_path / "o", tensors, 2)
    convert_checkpoint(tmp_path / "o", tmp_path / "hf", "hf", max_shard_size="60KB", progress=False)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    convert_checkpoint(tmp_path / "hf", tmp_path / "back", "original", n_shards=n, progress=False)
    write_shards(tmp_path / "expected", tensors, n)
    for rank in range(n):
        name = f"consolidated.{rank:02d}.pth"
        again = torch.load(tmp_path / "back" / name, weights_only=True)
        expected = torch.load(tmp_path / "expected" / name, weights_only=True)
        assert set(again) == set(expected) - {"rope.freqs"}
        assert all(again[key].dtype == dtype and torch.equal(again[key], expected[key]) for key in again)
    saved = json.loads((tmp_path / "back" / "params.json").read_text())
    assert open_weights(tmp_path / "back").config == open_weights(tmp_path / "o").config
    assert {key: saved[key] for key in PARAMS if key[:3] not in ("ffn", "mul")} == {
        key: value for key, value in PARAMS.items() if key[:3] not in ("ffn", "mul")
    }


def test_tied_embeddings_are_written_once(tmp_path: Path) -> None:
    for tied in (False, True):
        write_shards(tmp_path / f"{tied}", original_tensors(tied))
        convert_checkpoint(tmp_path / f"{tied}", tmp_path / f"{tied}2", "original", progress=False)
    sizes = [(tmp_path / f"{tied}2" / "consolidated.00.pth").stat().st_size for tied in (False, True)]
    assert sizes[0] - sizes[1] > 0.9 * 320 * 64 * 4


def test_every_key_has_one_spelling_per_layout_and_no_other_is_known() -> None:
    for name in (key.replace("{}", "17") for key in ORIGINAL_KEYS):
        assert from_hf(to_hf(name)) == name and from_original(to_original(name)) == name
    for spell, key in (
        (from_hf, "model.lm_head.weight"),
        (from_hf, "embed_tokens.weight"),
        (from_hf, "model.layers.0.self_attn.q_proj.bias"),
        (from_original, "layers.0.attention.wq.bias"),
        (from_original, "model.norm.weight"),
        (to_hf, "layers.0.nothing.weight"),
        (to_original, "layers.x.norm.weight"),
    ):
        with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
            spell(key)


# dim, ffn_dim_multiplier, multiple_of as released, and the widths of the published models.
@pytest.mark.parametrize(
    ("preset", "multiplier", "multiple_of"),
    [
        ("llama-3-8b", 1.3, 1024),
        ("llama-3.1-70b", 1.3, 4096),
        ("llama-3.1-405b", 1.2, 4096),
        ("llama-3.2-1b", 1.5, 256),
        ("llama-3.2-3b", 1.0, 256),
    ],
)
def test_released_params_give_the_presets(preset: str, multiplier: float, multiple_of: int) -> None:
    config = PRESETS[preset]
    assert ffn_dim(config.dim, multiplier, multiple_of) == config.ffn_dim
    params = params_from_config(config)
    assert set(params) == set(PARAMS)  # nothing that the released code does not know
    params |= {"ffn_dim_multiplier": multiplier, "multiple_of": multiple_of}
    assert config_from_params(params, Path("params.json"), config.tied_embeddings) == config


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_params_of_a_preset_read_back_as_the_preset(name: str) -> None:
    config = PRESETS[name]
    assert config_from_params(params_from_config(config), Path("p"), config.tied_embeddings) == config


def test_rope_factor_comes_from_the_user_the_file_or_the_shape() -> None:
    def factor(tied: bool = False, given: float | None = None, **extra: Any) -> float:
        config = config_from_params(PARAMS | extra, Path("params.json"), tied, given)
        assert config.rope_scaling is not None
        return config.rope_scaling.factor

    assert (factor(), factor(tied=True)) == (8.0, 32.0)
    assert factor(rope_scaling_factor=16.0) == 16.0
    assert factor(given=4.0, rope_scaling_factor=16.0) == 4.0
    assert (
        params_from_config(LlamaConfig(64, 1, 4, 4, 96, rope_scaling=RopeScaling(16.0)))[
            "rope_scaling_factor"
        ]
        == 16.0
    )
    with pytest.raises(CheckpointError, match="no RoPE factor to give"):
        config_from_params(PARAMS | {"use_scaled_rope": False}, Path("params.json"), False, 8.0)
    with pytest.raises(CheckpointError, match="cannot express"):
        params_from_config(LlamaConfig(64, 1, 4, 4, 96, rope_scaling=RopeScaling(8.0, 2.0)))


def drop(key: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(key)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (drop("layers.1.attention.wq.weight"), r"consolidated\.01\.pth.*missing: layers\.1\.attention\.wq"),
        (
            lambda t: t.update({"layers.0.extra.weight": torch.ones(1)}),
            r"01\.pth.*unknown key layers\.0\.extra",
        ),
        (
            lambda t: t.update({"norm.weight": torch.ones(64, dtype=torch.int8)}),
            r"01\.pth: norm\.weight has dtype torch\.int8",
        ),
        (
            lambda t: t.update({"layers.0.feed_forward.w2.weight": torch.ones(64, 5)}),
            r"layers\.0\.feed_forward\.w2\.weight has shape .*the model needs \(64, 224\)",
        ),
        (lambda t: t.update({"norm.weight": torch.ones(64, 1)}), r"norm\.weight has shape \(64, 1\)"),
        (lambda t: t.update({"norm.weight": "text"}), "something else than tensors"),
    ],
)
def test_bad_original_shards_are_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], named: str
) -> None:
    folder = write_shards(tmp_path / "o", original_tensors(), 2)
    shard = torch.load(folder / "consolidated.01.pth", weights_only=True)
    change(shard)
    torch.save(shard, folder / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match=named):
        read_core(open_weights(folder))


def test_truncated_missing_and_pickled_original_files_are_refused(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "o", original_tensors(), 2)
    path = folder / "consolidated.01.pth"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth: truncated"):
        open_weights(folder)
    torch.save({"norm.weight": Path("x")}, path)
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth: .*something else than tensors"):
        open_weights(folder)
    path.write_bytes(data)
    (folder / "consolidated.00.pth").unlink()
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth: no such file"):
        open_weights(folder)


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"vision_chunk_size": 448}, "unknown key vision_chunk_size"),
        ({"dim": None}, "dim is missing"),
        ({"n_layers": 1.5}, "n_layers is 1.5, not a positive int"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"n_kv_heads": 3}, "n_heads 8 is not divisible by n_kv_heads 3"),
    ],
)
def test_bad_params_are_named(tmp_path: Path, params: dict[str, Any], named: str) -> None:
    folder = write_shards(tmp_path / "o", original_tensors(), 1, **params)
    with pytest.raises(CheckpointError, match=rf"params\.json: .*{named}"):
        open_weights(folder)


def command(*args: str) -> None:
    run("core-llm", "test", {"convert": convert, "generate": generate}, ["convert", *args])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "core"
    save_core(folder, *tiny_core())
    (folder / "LICENSE").write_text("terms")
    return folder


def test_command_converts_there_and_back(saved: Path, tmp_path: Path) -> None:
    command(str(saved), str(tmp_path / "o"), "--to", "original", "--shards", "2", "--dtype", "float32")
    assert len(list((tmp_path / "o").glob("consolidated.*.pth"))) == 2
    command(str(tmp_path / "o"), str(tmp_path / "hf"), "--dtype", "bfloat16", "--max-shard-size", "100KB")
    loaded, tokenizer = load_core(tmp_path / "hf", "auto")
    expected, _ = load_core(saved, "auto")
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.state_dict().items())
    assert loaded.config == expected.config and tokenizer.encode("a red circle")
    assert (tmp_path / "hf" / "LICENSE").read_text() == "terms"
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    sizes = [path.stat().st_size for path in (tmp_path / "hf").glob("model-*")]
    assert len(sizes) == len(set(index["weight_map"].values())) > 2
    assert max(sizes) <= 102_000  # the header comes on top


def test_hf_settings_that_do_not_shape_the_model_survive_a_conversion(saved: Path, tmp_path: Path) -> None:
    convert_checkpoint(saved, tmp_path / "a", progress=False)
    values = json.loads((tmp_path / "a" / "config.json").read_text())
    values |= {"eos_token_id": 5, "initializer_range": 0.5}
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    (tmp_path / "a" / "config.json").write_text(json.dumps(values))
    convert_checkpoint(tmp_path / "a", tmp_path / "b", dtype=torch.float32, progress=False)
    again = json.loads((tmp_path / "b" / "config.json").read_text())
    assert again["eos_token_id"] == 5 and again["initializer_range"] == 0.5
    assert again["rope_theta"] == 500_000.0 and again["dtype"] == "float32"
    assert load_file(tmp_path / "b" / "model.safetensors")["model.norm.weight"].dtype == torch.float32


def test_target_that_is_not_empty_is_replaced_only_when_asked(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "t"
    command(str(saved), str(target), "--to", "original", "--shards", "2")
    (target / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(SystemExit) as stopped:
        command(str(saved), str(target))
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and "--overwrite" in err and err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    command(str(saved), str(target), "--overwrite", "True")
    names = {path.name for path in target.iterdir()}
    assert "notes.txt" in names and "model.safetensors" in names
    assert not any(name.startswith(("consolidated", "params")) for name in names)
    load_core(target)
    with pytest.raises(UserError, match="same folder"):
        convert_checkpoint(saved, saved, overwrite=True)


def test_mistakes_in_the_command_are_one_line(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{not json")
    for args, named in (
        ([str(tmp_path / "nowhere"), str(tmp_path / "x")], "unknown model"),
        ([str(tmp_path / "bad"), str(tmp_path / "x")], "config.json: not readable"),
        ([str(saved), str(tmp_path / "x"), "--max-shard-size", "big"], "'big' is not a size"),
        ([str(saved), str(tmp_path / "x"), "--to", "original", "--shards", "3"], "n_heads 4 into 3 shards"),
        ([str(saved), str(saved / "config.json")], "is a file"),
        (
            [str(saved), str(tmp_path / "x"), "--rope-factor", "8"],
            "config.json: holds the RoPE factor",
        ),
    ):
        with pytest.raises(SystemExit) as stopped:
            command(*args)
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and named in err and err.startswith("error: ") and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


def test_sizes_are_read_in_powers_of_1000_and_1024() -> None:
    assert [parse_size(s) for s in ("5GB", "1.5 MB", "2kib", "7", "3B")] == [5 * 10**9, 1_500_000, 2048, 7, 3]
    for text in ("", "GB", "-1GB", "5XB", "0GB", "0.2B"):
        with pytest.raises(UserError, match="not a size"):
            parse_size(text)


# Every conversion in a process of its own, forked from one that has the imports behind it. It is killed when
# it is about to write, or the system refuses to write more than a part of a file.
DEATHS = """
import os, resource, sys
import safetensors.torch, torch
import core_llm.convert
from core_llm.cli import main
source, folder = sys.argv[1:]
for layout in ("hf", "original"):
    for death in ("kill", "full"):
        if (child := os.fork()) == 0:
            if death == "kill":
                safetensors.torch.save_file = torch.save = lambda *a, **k: os.kill(os.getpid(), 9)
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
            target = os.path.join(folder, layout + death, "target")
            os.mkdir(os.path.dirname(target))
            sys.argv = ["core-llm", "convert", source, target, "--to", layout, "--dtype", "float32"]
            try:
                main()
            except SystemExit as stopped:
                os._exit(stopped.code)
            os._exit(99)
        print(layout, death, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_conversion_that_is_killed_or_fills_the_disk_leaves_no_half_checkpoint(
    saved: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DEATHS, str(saved), str(tmp_path)], capture_output=True, text=True
    )
    assert done.stdout.split("\n")[:-1] == [
        f"{layout} {death} {-signal.SIGKILL if death == 'kill' else 2}"
        for layout in ("hf", "original")
        for death in ("kill", "full")
    ]
    errors = done.stderr.strip().splitlines()
    assert len(errors) == 2 and all(e.startswith("error: ") and "could not be written" in e for e in errors)
    assert not list(tmp_path.glob("*/target")) and not list(tmp_path.glob("*full/.*"))
    load_core(saved)


def test_saved_core_of_one_file_and_of_shards_replace_each_other(tmp_path: Path) -> None:
    core, tokenizer = tiny_core()
    other: Llama = tiny_core(seed=3)[0]
    for model, size in ((core, "5GB"), (other, "50KB"), (core, "80KB"), (other, "5GB")):
        save_core(tmp_path / "c", model, tokenizer, dtype="auto", max_shard_size=size)
        loaded, _ = load_core(tmp_path / "c", "auto")
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
        is_single = (tmp_path / "c" / "model.safetensors").exists()
        assert is_single == (size == "5GB") != (tmp_path / "c" / "model.safetensors.index.json").exists()


def test_transformers_writes_conversations_with_the_converted_nano_as_we_do(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    convert_checkpoint("nano", tmp_path / "hf", progress=False)
    peer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    _, tokenizer = load_core("nano")
    conversations = [
        [Message("user", "Is there a red circle?")],
        [Message("system", "Be brief."), Message("user", "  two\n\nlines "), Message("assistant", "Yes.")],
        [Message("user", (Text("one"), Text(" two"))), Message("assistant", ""), Message("user", "3 4 55!")],
    ]
    for messages in conversations:
        said = [{"role": m.role, "content": "".join(p.text for p in m.parts)} for m in messages]
        ids = peer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        assert ids == render(messages, tokenizer).ids
    assert peer.eos_token_id == tokenizer.eot_id and peer.bos_token_id == tokenizer.bos_id
