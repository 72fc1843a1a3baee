"""Quantised cores against float64 products, their files, and their memory.

Axes: M activation rows, K inputs, N outputs.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core_llm import cli, quantized_linear
from core_llm.chat import Message
from core_llm.checkpoint import core_hash, load_core
from core_llm.config import LlamaConfig
from core_llm.errors import CheckpointError, UserError
from core_llm.float8 import Float8Linear
from core_llm.lora import LoRA, LoRAConfig
from core_llm.model import Llama
from core_llm.quantize import (
    SCHEMES,
    load_quantized,
    model_bytes,
    pack,
    quantize,
    quantize_checkpoint,
    save_quantized,
    saved_bytes,
    scheme_of,
)
from core_llm.quantized_linear import INT4_GROUP, Int4Linear, Int8Linear, QuantizedLinear
from core_llm.testing import tiny_core
from core_llm.tokenizer import Tokenizer

WEIGHT_ONLY = (Int8Linear, Int4Linear)
ALL = (*WEIGHT_ONLY, Float8Linear)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_core()[1]


@pytest.fixture(params=["own kernels", "torch alone"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both CPU ways: our kernels (left out without a C compiler), and torch's packed products."""
    if request.param == "torch alone":
        monkeypatch.setattr(quantized_linear.ops, "available", lambda: False)
    elif not quantized_linear.ops.available():
        pytest.skip("no C compiler")
    yield request.param


def new_core(tied: bool = True, n_layers: int = 4) -> Llama:
    config = LlamaConfig(64, n_layers, 4, 2, 128, vocab_size=768, max_positions=512, tied_embeddings=tied)
    return Llama(config).initialise(0).eval().requires_grad_(False)


def weights(n: int, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(n, 1, generator=generator) * 0.1 + 0.001
    return torch.randn(n, k, generator=generator) * rows


def test_int8_weights_are_off_by_at_most_half_a_scale() -> None:
    weight = weights(40, 96)
    layer = Int8Linear.from_weight(weight)
    error = (layer.dequantized().double() - weight.double()).abs()
    assert bool((error <= layer.scale.double()[:, None] * 0.501).all())
    step = weight.double().abs().amax(1) / 127
    assert bool(((layer.scale.double() - step).abs() <= step * 2**-8).all())
    assert torch.equal(layer.scale, layer.scale.bfloat16().float())


def test_no_int4_group_is_further_off_than_by_plain_rounding_to_its_range() -> None:
    weight = weights(32, 4 * INT4_GROUP)
    layer = Int4Linear.from_weight(weight)
    groups = weight.double().unflatten(1, (-1, INT4_GROUP))
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    step = (high - low) / 15
    plain = (((groups - low) / step).round() * step + low - groups).norm(dim=2)
    ours = (layer.dequantized().double() - weight.double()).unflatten(1, (-1, INT4_GROUP)).norm(dim=2)
    # Scale and minimum are bf16, which by itself may cost up to 2^-9 of the group's largest value.
    assert bool((ours <= plain + groups.abs().amax(2) * 2**-9 * INT4_GROUP**0.5).all())
    assert ours.norm() < 0.97 * plain.norm()


@pytest.mark.parametrize("kind", ALL)
def test_zero_and_constant_rows_are_kept(kind: type[QuantizedLinear]) -> None:
    weight = torch.zeros(16, 64)
    weight[1] = 0.5
    layer = kind.from_weight(weight)
    assert torch.allclose(layer.dequantized(), weight, rtol=4e-3, atol=0)


@pytest.mark.parametrize("kind", WEIGHT_ONLY)
@pytest.mark.parametrize("rows", [1, 3, 7, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_equal_the_float64_product_of_the_dequantised_weight(
    products: str, kind: type[QuantizedLinear], rows: int, dtype: torch.dtype
) -> None:
    layer = kind.from_weight(weights(48, 192))
    weight = layer.dequantized().double()
    x = torch.randn(2, rows, 192, generator=torch.Generator().manual_seed(rows)).to(dtype)
    wanted = x.double() @ weight.T
    layer.pack(dtype)
    assert isinstance(layer, Int8Linear) or (layer.packed is not None) == (products == "torch alone")
    for part, exact in ((x, wanted), (x[0, :1], wanted[0, :1])):
        y = layer(part)
        assert y.dtype == dtype and y.shape == exact.shape
        tolerance = 6e-3 if dtype == torch.bfloat16 else 5e-5
        assert (y.double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("kind", ALL)
def test_moving_a_model_to_another_dtype_leaves_quantised_numbers_alone(kind: type[QuantizedLinear]) -> None:
    layer = kind.from_weight(weights(16, 64))
    before = layer.dequantized().clone()
    model = nn.Sequential(layer, nn.Linear(16, 4)).to(torch.bfloat16).to(torch.float64)
    assert torch.equal(layer.dequantized(), before)
    assert model[1].weight.dtype == torch.float64


def test_every_scheme_quantises_its_layers_and_says_what_it_saves() -> None:
    for scheme, layers, kinds in (
        ("int8", 29, {Int8Linear: 29}),
        ("int4", 29, {Int4Linear: 28, Int8Linear: 1}),
        ("fp8", 6, {Float8Linear: 6}),
    ):
        core = new_core()
        report = quantize(core, scheme)
        counts = {kind: sum(type(m) is kind for m in core.modules()) for kind in kinds}
        assert (report.layers, counts) == (layers, kinds)
        assert report.bytes_after == model_bytes(core) < report.bytes_before == model_bytes(new_core())
        assert scheme_of(core) == scheme and scheme in str(report)


def test_tied_embedding_stays_and_the_report_says_what_the_head_costs() -> None:
    core, plain = new_core(), new_core()
    report = quantize(core, "int8")
    assert torch.equal(core.embed_tokens.weight, plain.embed_tokens.weight)
    assert isinstance(core.lm_head, Int8Linear)
    assert report.untied_bytes == 768 * 64 + 768 * 4 and "beside the embedding" in str(report)
    assert quantize(new_core(tied=False), "int8").untied_bytes == 0


def test_bytes_after_quantising_are_those_of_values_and_scales() -> None:
    core = new_core(tied=False)
    linear = sum(
        m.weight.numel() for n, m in core.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"
    )
    rest = model_bytes(core) - 4 * linear - 4 * 768 * 64
    quantize(core, "int4")
    head = 768 * 64 + 768 * 4
    assert model_bytes(core) == rest + head + linear // 2 + linear // INT4_GROUP * 4


def test_logits_stay_close_and_the_more_bits_the_closer(products: str) -> None:
    ids = torch.arange(24)[None] * 7
    plain = new_core()(ids)
    errors = {}
    for scheme in SCHEMES:
        core = new_core()
        quantize(core, scheme)
        pack(core)
        errors[scheme] = float((core(ids) - plain).norm() / plain.norm())
    assert errors["int8"] < 0.05 < errors["int4"] < 0.6  # random blocks multiply errors
    assert 0 < errors["fp8"] < 0.1


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tied", [True, False])
def test_saved_core_gives_the_same_logits_bit_for_bit(
    scheme: str, tied: bool, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    core = new_core(tied)
    for parameter in core.parameters():  # what is left as it is will be saved in bf16
        parameter.copy_(parameter.bfloat16())
    quantize(core, scheme)
    save_quantized(tmp_path / "q", core, tokenizer)
    loaded, _ = load_quantized(tmp_path / "q")
    ids = torch.arange(9)[None]
    assert torch.equal(loaded(ids), core(ids))
    assert {n: t.dtype for n, t in loaded.state_dict().items()} == {
        n: t.dtype for n, t in core.state_dict().items()
    }
    head = loaded.lm_head.weight is loaded.embed_tokens.weight
    assert head == (tied and scheme == "fp8")
    stored = load_file(tmp_path / "q" / "quantized.safetensors")
    assert sum(t.numel() * t.element_size() for t in stored.values()) < 0.6 * model_bytes(new_core(tied))


def test_strict_state_dict_names_what_is_missing_or_unknown(tokenizer: Tokenizer, tmp_path: Path) -> None:
    core = new_core()
    quantize(core, "int8")
    save_quantized(tmp_path, core, tokenizer)
    path = tmp_path / "quantized.safetensors"
    tensors = load_file(path)
    name = "layers.0.mlp.up_proj.scale"
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != name}, f"missing keys: {name}"),
        ({**tensors, "layers.9.odd": torch.ones(1)}, r"unknown keys: layers\.9\.odd"),
        ({**tensors, name: tensors[name][:5].clone()}, f"{name} is torch.float32 .*needs"),
        ({**tensors, name: tensors[name].bfloat16()}, f"{name} is torch.bfloat16"),
    ):
        save_file(changed, path)
        with pytest.raises(CheckpointError, match=message):
            load_quantized(tmp_path)
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(CheckpointError, match=r"quantized\.safetensors: truncated"):
        load_quantized(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"quantized\.safetensors: no such file"):
        load_quantized(tmp_path)


def test_quantisation_entry_of_the_configuration_is_strict(tokenizer: Tokenizer, tmp_path: Path) -> None:
    core = new_core()
    quantize(core, "int4")
    save_quantized(tmp_path, core, tokenizer)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    entry = values["quantization"]
    for changed, message in (
        (None, "quantization is missing"),
        ({**entry, "scheme": "int3"}, r"scheme is 'int3'; known: int8, int4, fp8"),
        ({**entry, "bits": 4}, r"quantization\.bits is unknown"),
        ({k: v for k, v in entry.items() if k != "format"}, r"quantization\.format is missing"),
        ({**entry, "int4_group": 32}, r"int4_group 32.*quantize the core again|int4_group 32"),
    ):
        path.write_text(json.dumps({**values, "quantization": changed}))
        with pytest.raises(CheckpointError, match=message):
            load_quantized(tmp_path)


def test_transformers_refuses_the_folder_instead_of_misreading_it(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    core = new_core()
    quantize(core, "int8")
    save_quantized(tmp_path, core, tokenizer)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)


def test_unknown_scheme_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="'int2'; known: int8, int4, fp8"):
        quantize(new_core(), "int2")


def test_inputs_that_the_group_does_not_divide_name_the_layer_and_change_nothing() -> None:
    config = LlamaConfig(64, 2, 4, 2, 96, vocab_size=64, max_positions=32)
    core = Llama(config).initialise(0)
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.down_proj: its 96 inputs .* group of 64; use int8"):
        quantize(core, "int4")
    assert not any(isinstance(module, QuantizedLinear) for module in core.modules())


def test_what_cannot_be_quantised_says_why() -> None:
    core = new_core()
    core.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj.*NaN"):
        quantize(core, "int8")
    with pytest.raises(UserError, match="2 blocks has nothing to quantise"):
        quantize(new_core(n_layers=2), "fp8")
    done = new_core()
    quantize(done, "int8")
    with pytest.raises(UserError, match="quantised already"):
        quantize(done, "int4")
    adapted = new_core()
    LoRA(adapted, LoRAConfig(targets=("v_proj",)))
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.v_proj has LoRA attached; merge"):
        quantize(adapted, "int8")
    extended = new_core()
    extended.layers[0].mlp.extra = nn.Linear(64, 8)
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.extra.*merge LoRA"):
        quantize(extended, "int8")


def test_packed_core_refuses_to_be_saved(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_linear.ops, "available", lambda: False)
    core = new_core()
    quantize(core, "int4")
    pack(core)
    with pytest.raises(UserError, match="save it before pack"):
        save_quantized(tmp_path, core, tokenizer)
    with pytest.raises(ValueError, match="packed int4"):
        core.state_dict()


def test_unquantised_core_is_not_saved_as_quantised(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not quantised"):
        save_quantized(tmp_path, new_core(), tokenizer)


def test_command_quantises_the_bundled_core_which_then_answers_as_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from core_llm.adapters import Assistant

    monkeypatch.setattr(
        sys, "argv", ["core-llm", "quantize", "nano", str(tmp_path / "q"), "--scheme", "int8"]
    )
    cli.main()
    assert "int8: 43 linear layers, 6.3 → 4.8 MB" in capsys.readouterr().out
    entry = json.loads((tmp_path / "q" / "config.json").read_text())["quantization"]
    plain = load_core("nano")
    assert entry["source_core_hash"] == core_hash(plain[0])
    loaded = load_core(tmp_path / "q")
    assert scheme_of(loaded[0]) == "int8" and loaded[0].embed_tokens.weight.dtype == torch.float32
    assert load_core(tmp_path / "q", torch.bfloat16)[0].norm.weight.dtype == torch.bfloat16
    question = [[Message("user", "there is a red circle. what color is the circle?")]]
    assert Assistant(*loaded).generate(question) == Assistant(*plain).generate(question)
    with pytest.raises(UserError, match="not empty.*--overwrite"):
        quantize_checkpoint("nano", tmp_path / "q", "int4")
    quantize_checkpoint("nano", tmp_path / "q", "fp8", overwrite=True)
    assert scheme_of(load_core(tmp_path / "q")[0]) == "fp8"


def test_saved_bytes_are_those_of_the_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for scheme in SCHEMES:
        core = new_core()
        quantize(core, scheme)
        save_quantized(tmp_path / scheme, core, tokenizer)
        stored = load_file(tmp_path / scheme / "quantized.safetensors")
        assert saved_bytes(core) == sum(tensor.nbytes for tensor in stored.values())
        pack(core)
        assert saved_bytes(core) == sum(tensor.nbytes for tensor in stored.values())


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.parametrize("kind", [Int8Linear, Float8Linear])
def test_torchao_holds_the_same_weights(kind: type[QuantizedLinear]) -> None:
    layer = kind.from_weight(weights(32, 64))
    tensor = layer.torchao_weight(torch.float32)
    assert torch.equal(tensor.dequantize(), layer.dequantized())  # type: ignore[attr-defined]
    if kind is Int8Linear:
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(nn.functional.linear(x, tensor), layer(x), rtol=1e-3, atol=1e-3)


_MEMORY = """
import re, sys, torch
from core_llm.config import LlamaConfig
from core_llm.model import Llama
from core_llm.quantize import quantize

def status(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

def measure(scheme):
    quantize(Llama(LlamaConfig(64, 3, 4, 2, 128, vocab_size=64)), scheme)  # what is loaded on first use
    core = Llama(LlamaConfig(1024, 6, 8, 2, 3072, vocab_size=2048, max_positions=64))
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    report = quantize(core, scheme)
    print(report.bytes_before, report.bytes_after, before, status("VmHWM"), status("VmRSS"))

torch.set_num_threads(1)
torch.set_default_dtype(torch.bfloat16)
measure("int4")
measure("fp8")
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_quantising_needs_no_second_copy_of_the_weights() -> None:
    # Otherwise glibc keeps freed blocks, which then look as if they were in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1500000"}
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=environment,
    )
    for line in done.stdout.splitlines():
        total, after, start, peak, end = map(int, line.split())
        assert total > 140e6
        # One quantised layer (3 MB) and blocks of 1 MiB, at the start before much is freed. A fp32 copy
        # would be 290 MB, a second quantised one 40 MB or more.
        assert peak - start < 25e6
        assert start - end > 0.4 * (total - after)  # freed on the way
