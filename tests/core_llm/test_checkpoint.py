"""Checkpoints: exact, strict, atomic, and readable by transformers."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from core_llm.checkpoint import NANO, core_hash, load_adapter, load_core, save_adapter, save_core
from core_llm.cli import convert
from core_llm.cli_tools import run
from core_llm.errors import CheckpointError
from core_llm.testing import tiny_core


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    core, tokenizer = tiny_core()
    save_core(tmp_path / "core", core, tokenizer, card="a card")
    return tmp_path / "core"


def test_saved_core_loads_with_the_same_hash_and_output(saved: Path) -> None:
    core, tokenizer = tiny_core()
    loaded, again = load_core(saved)
    assert core_hash(loaded) == core_hash(core)
    tokens = torch.tensor([again.encode("what color is the shape?")])
    rounded = {k: v.bfloat16().float() for k, v in core.state_dict().items()}
    core.load_state_dict(rounded)
    assert torch.equal(loaded(tokens), core(tokens))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_transformers_reads_the_saved_core(saved: Path) -> None:
    from transformers import LlamaForCausalLM

    loaded, _ = load_core(saved)
    peer = LlamaForCausalLM.from_pretrained(saved, dtype=torch.float32)
    tokens = torch.arange(1, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens), peer(tokens).logits, atol=1e-4, rtol=1e-4)


def test_missing_unknown_and_misshapen_keys_are_named(saved: Path) -> None:
    path = saved / "model.safetensors"
    good = load_file(path)
    for change, named in (
        (lambda t: t.pop("model.norm.weight"), "missing: model.norm.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "unknown: extra"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), r"norm.weight has shape \(3,\)"),
    ):
        tensors = dict(good)
        change(tensors)
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=named):
            load_core(saved)


def test_truncated_missing_and_foreign_files_are_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="truncated"):
        load_core(saved)
    path.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        load_core(saved)
    values = json.loads((saved / "config.json").read_text())
    for change, named in (
        ({"model_type": "gpt2"}, "gpt2"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
    ):
        (saved / "config.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(CheckpointError, match=named):
            load_core(saved)
    with pytest.raises(CheckpointError, match="known: nano"):
        load_core("no-such-model")


def test_adapter_file_fits_only_its_core_and_kind(tmp_path: Path) -> None:
    core, _ = tiny_core()
    save_adapter(tmp_path / "a", "vision_adapter", {"width": 3}, {"w": torch.ones(2)}, core)
    config, tensors = load_adapter(tmp_path / "a", "vision_adapter", core)
    assert config == {"width": 3} and torch.equal(tensors["w"], torch.ones(2))
    with pytest.raises(CheckpointError, match="not a speech_adapter"):
        load_adapter(tmp_path / "a", "speech_adapter", core)
    with pytest.raises(CheckpointError, match="another core"):
        load_adapter(tmp_path / "a", "vision_adapter", tiny_core(seed=1)[0])


def test_failed_write_leaves_the_old_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core, tokenizer = tiny_core(seed=5)
    before = (saved / "model.safetensors").read_bytes()

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_core(saved, core, tokenizer)
    assert (saved / "model.safetensors").read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["core"]


def test_dtype_of_the_file_is_kept_or_changed_as_asked(tmp_path: Path) -> None:
    core, tokenizer = tiny_core()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        core = core.to(dtype)
        save_core(tmp_path / "c", core, tokenizer, dtype="auto")
        loaded, _ = load_core(tmp_path / "c", "auto")
        for (name, ours), (_, theirs) in zip(loaded.named_parameters(), core.named_parameters(), strict=True):
            assert ours.dtype == dtype and torch.equal(ours, theirs), name
        assert loaded.lm_head.weight is loaded.embed_tokens.weight
        assert loaded.frequencies.dtype == torch.float32
        assert {p.dtype for p in load_core(tmp_path / "c")[0].parameters()} == {torch.float32}


def test_writing_to_loaded_weights_never_changes_the_file(tmp_path: Path) -> None:
    core, tokenizer = tiny_core()
    save_core(tmp_path / "c", core, tokenizer, dtype="auto")
    before = (tmp_path / "c" / "model.safetensors").read_bytes()
    for mapped in (True, False):
        loaded, _ = load_core(tmp_path / "c", "auto", mapped=mapped)
        with torch.no_grad():
            for parameter in loaded.parameters():
                parameter.fill_(3.0)
        assert loaded.norm.weight.min() == 3.0
        assert torch.equal(load_core(tmp_path / "c")[0].norm.weight, core.norm.weight)
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == before


def test_loaded_weights_outlive_a_new_checkpoint_in_their_place(tmp_path: Path) -> None:
    core, tokenizer = tiny_core()
    save_core(tmp_path / "c", core, tokenizer, dtype="auto")
    loaded, _ = load_core(tmp_path / "c", "auto")
    save_core(tmp_path / "c", tiny_core(seed=4)[0], tokenizer, dtype="auto", max_shard_size="50KB")
    assert core_hash(loaded) == core_hash(core) != core_hash(load_core(tmp_path / "c")[0])


def test_bundled_core_keeps_its_hash_in_every_dtype() -> None:
    hashes = {core_hash(load_core("nano", dtype)[0]) for dtype in (torch.float32, "auto", torch.float64)}
    assert len(hashes) == 1
    for adapter in ("vision_adapter", "speech_adapter"):
        path = NANO.parents[3] / adapter / "src" / adapter / "nano" / "config.json"
        assert json.loads(path.read_text())["core_hash"] in hashes


def change_tensors(shard: int, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = sorted(folder.glob("model-*.safetensors"))[shard]
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return apply


def change_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        values = json.loads(path.read_text())
        change(values["weight_map"])
        path.write_text(json.dumps(values))

    return apply


def truncate(folder: Path) -> None:
    path = sorted(folder.glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])


FIRST, SECOND = "model-00001-of-0000", "model-00002-of-0000"
NORM, GATE = "model.norm.weight", "model.layers.0.mlp.gate_proj.weight"
BROKEN: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "truncated": (truncate, (SECOND, "truncated")),
    "integers": (
        change_tensors(0, lambda t: t.update({key: value.to(torch.int8) for key, value in t.items()})),
        (FIRST, "model.embed_tokens.weight has dtype I8"),
    ),
    "shape": (
        change_tensors(1, lambda t: t.update({GATE: torch.zeros(3, 4)})),
        (SECOND, f"{GATE} has shape (3, 4), the model needs (128, 64)"),
    ),
    "missing index entry": (
        change_index(lambda index: index.pop(GATE)),
        (SECOND, f"{GATE} is here, but model.safetensors.index.json does not list it"),
    ),
    "index names a missing file": (
        change_index(lambda index: index.update({NORM: "model-00009-of-00009.safetensors"})),
        ("index.json", f"{NORM} should be in model-00009-of-00009.safetensors, which is missing"),
    ),
    "index names another folder": (
        change_index(lambda index: index.update({NORM: "../model.safetensors"})),
        ("index.json", NORM, "'../model.safetensors'"),
    ),
    "index names the wrong file": (
        change_index(lambda index: index.update({GATE: index["model.embed_tokens.weight"]})),
        (SECOND, GATE, "says that it is in model-00001"),
    ),
    "tensor in two shards": (
        change_tensors(1, lambda t: t.update({"model.embed_tokens.weight": torch.zeros(768, 64)})),
        (SECOND, "model.embed_tokens.weight is also in model-00001"),
    ),
    "tensor gone from its shard": (
        change_tensors(1, lambda t: t.pop(GATE)),
        ("index.json", f"{GATE} should be in {SECOND}", "which does not hold it"),
    ),
    "unknown tensor": (
        change_tensors(0, lambda t: t.update({"model.extra": torch.zeros(2)})),
        (FIRST, "unknown: model.extra"),
    ),
    "head beside tied embeddings": (
        change_tensors(0, lambda t: t.update({"lm_head.weight": torch.zeros(768, 64)})),
        (FIRST, "lm_head.weight", "index.json does not list it"),
    ),
    "no index": (
        lambda folder: (folder / "model.safetensors.index.json").unlink(),
        ("index.json", "no such file, but the shards that it lists are here"),
    ),
    "index is a list": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
        ("index.json", "holds a list"),
    ),
    "index without a map": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
        ("index.json", "weight_map is missing"),
    ),
    "config is not JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        ("config.json", "not readable"),
    ),
    "config is not text": (
        lambda folder: (folder / "config.json").write_bytes(bytes(range(256))),
        ("config.json", "not readable"),
    ),
    "unknown RoPE scaling": (
        lambda folder: (folder / "config.json").write_text(
            json.dumps(
                json.loads((folder / "config.json").read_text())
                | {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}
            )
        ),
        ("config.json", "unknown RoPE scaling 'longrope'"),
    ),
}


@pytest.mark.parametrize("what", sorted(BROKEN))
def test_broken_checkpoint_is_refused_by_file_and_key(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "core"
    save_core(folder, *tiny_core(), max_shard_size="100KB")
    load_core(folder)
    damage, told = BROKEN[what]
    damage(folder)
    with pytest.raises(CheckpointError) as raised:
        load_core(folder)
    assert all(part in str(raised.value) for part in (str(folder), *told)), raised.value
    with pytest.raises(SystemExit) as stopped:
        run("core-llm", "t", {"convert": convert, "o": convert}, ["convert", str(folder), f"{tmp_path}/x"])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_redundant_tensors_of_older_writers_are_accepted_only_when_they_agree(saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors = load_file(path)
    embed = tensors["model.embed_tokens.weight"]
    extra = {"lm_head.weight": embed.clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(tensors | extra, path)
    assert core_hash(load_core(saved)[0]) == core_hash(tiny_core()[0])
    save_file(tensors | {"lm_head.weight": embed + 1}, path)
    with pytest.raises(CheckpointError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load_core(saved)


def test_pickled_weights_are_not_read(saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin is not read"):
        load_core(saved)


def test_mixed_dtypes_need_a_choice(saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {NORM: tensors[NORM].float()}, path)
    with pytest.raises(CheckpointError, match=r"norm.weight is stored in torch.float32.*choose one dtype"):
        load_core(saved, "auto")
    assert load_core(saved, torch.bfloat16)[0].norm.weight.dtype == torch.bfloat16


# Every job in a process forked after the imports, first on a tiny checkpoint, because a forked process takes
# the pages of its libraries anew, then on a large one: what the peak grows by is the large job's alone. After
# a load every page of the weights is touched, because mapped ones take no memory before.
MEMORY = """
import json, os, resource, sys
from pathlib import Path
import torch
from core_llm.checkpoint import open_weights, read_core
from core_llm.config import LlamaConfig
from core_llm.convert import convert_checkpoint
from core_llm.hf_layout import config_to_hf, write_hf
from core_llm.stored import expected_shapes

def value(name):
    return 0.25 if name == "lm_head.weight" else 0.5  # were they equal, the embeddings would count as tied

def prepare(root):
    config = LlamaConfig(*((64, 2, 8, 4, 128, 512) if root == tiny else (1024, 8, 8, 4, 2816, 8192)))
    shapes = expected_shapes(config)
    sizes = {name: torch.Size(shape).numel() * 2 for name, shape in shapes.items()}
    read = lambda name: torch.full(shapes[name], value(name), dtype=torch.bfloat16)
    root.joinpath("hf").mkdir(parents=True)
    write_hf(root / "hf", config_to_hf(config), sizes, read, sum(sizes.values()) // 4)
    return sum(sizes.values())

def load(root, source, dtype, mapped):
    model = read_core(open_weights(root / source), dtype, mapped)
    for name, p in model.named_parameters():
        assert p.view(-1)[:: 4096 // p.itemsize].eq(value(name)).all()
    return sum(p.nbytes for p in model.parameters())

def rewrite(root, source, target, layout, shards=1, size="5GB"):
    convert_checkpoint(root / source, root / target, layout, "auto", size, shards, progress=False)
    return sum(path.stat().st_size for path in (root / "hf").glob("*.safetensors"))

def peak(job, *args):
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        job(tiny, *args)
        before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
        size = job(large, *args)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        os.write(writer, json.dumps([size, (after - before) / size]).encode())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    return json.loads(os.read(reader, 1000))

tiny, large = Path(sys.argv[1], "tiny"), Path(sys.argv[1], "large")
peak(prepare)  # not in this process: what it frees would still count in those that it forks
out = {
    "hf to original, 4 files": peak(rewrite, "hf", "o4", "original", 4),
    "hf to original, 1 file": peak(rewrite, "hf", "o1", "original"),
    "original to hf, 60 MB files": peak(rewrite, "o4", "back", "hf", 1, "60MB"),
}
for source, dtype, mapped in (
    ("hf", "auto", True), ("hf", "auto", False), ("hf", torch.float32, True),
    ("o1", "auto", True), ("o4", "auto", True), ("o4", torch.float32, True),
):
    out[f"load {source} {dtype} {mapped}"] = peak(load, source, dtype, mapped)
print(json.dumps(out))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_and_converting_take_little_more_memory_than_the_weights(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    assert len(peaks) == 9
    for what, (weights, ratio) in peaks.items():
        assert weights > 200_000_000, what
        assert ratio < 1.15, peaks
        assert ratio > 0.95 or not what.startswith("load"), peaks  # it does measure the weights
