"""The stages under torchrun: two processes take the steps of one."""

import json
import runpy
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from core_llm.testing import tiny_core, torchrun
from core_llm.train.shares import rows, share
from vision_adapter.adapter import VisionAdapter
from vision_adapter.config import VisionConfig
from vision_adapter.train import EncoderTask, Recipe, VisionTask

SCRIPT = """
    import sys
    from pathlib import Path

    import torch

    from core_llm import processes
    from core_llm.testing import tiny_core
    from core_llm.train import fit
    from vision_adapter.adapter import VisionAdapter
    from vision_adapter.config import VisionConfig
    from vision_adapter.examples import scene_examples
    from vision_adapter.stages.presets import StageConfig
    from vision_adapter.stages.run import run_stage

    # Without autocast: a bf16 product over five rows is rounded elsewhere than two over two and three.
    fit.multiplies_bf16 = lambda device: False
    processes.start()
    vision = VisionConfig(
        stem_channels=(8, 8), encoder_dim=32, encoder_layers=1, encoder_heads=2, encoder_ffn_dim=48,
        token_rows=3, cross_ffn_dim=32, cross_layers=(0, 1), image_size=32,
    )
    core, tokenizer = tiny_core()
    examples = scene_examples(12, "stages", 32)
    for stage in ("contrastive", "sft", "dpo"):
        config = StageConfig(
            steps=3, batch=5, micro_batch=2, lr=1e-3, warmup=1, text_dim=16, text_layers=1, text_heads=2,
            text_length=24, embedding=16, average_top=2 if stage == "sft" else 0,
        )
        torch.manual_seed(1)
        adapter = VisionAdapter(vision, core.config)
        for name, parameter in adapter.named_parameters():
            if name.endswith("_gate"):
                parameter.data.fill_(1.0)
        out = Path(sys.argv[1]) / stage
        trained, figures = run_stage(stage, core, tokenizer, adapter, (examples, examples[:3]), out, config)
        trained.save(out / "adapter", core)
        torch.save(trained.state_dict(), out / f"{processes.rank()}.pt")
"""


def test_two_processes_take_the_steps_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "1")])
    runpy.run_path(str(script), run_name="__main__")
    torchrun(script, tmp_path / "2")
    for stage in ("contrastive", "sft", "dpo"):
        logged = []
        for count in "12":
            path = tmp_path / count / stage / f"{stage}.metrics.jsonl"
            logged.append([json.loads(line) for line in path.read_text().splitlines()])
        assert len(logged[0]) == len(logged[1])
        steps = [step for step in logged[0] if "grad_norm" in step]
        assert steps
        for a, b in zip(*logged, strict=True):
            assert a.keys() == b.keys()
            for name in a.keys() & {"loss", "grad_norm", "held_out_loss", "margin"}:
                assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), (stage, name)
        own, first, second = (
            torch.load(tmp_path / name, weights_only=True)
            for name in (f"1/{stage}/0.pt", f"2/{stage}/0.pt", f"2/{stage}/1.pt")
        )
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), (stage, name)
            # Biases before a norm have gradients of rounding alone, which Adam makes whole steps of.
            if tensor.dim() > 1:
                assert (tensor - own[name]).abs().mean() < 1e-4, (stage, name)
        assert (tmp_path / "2" / stage / "adapter" / "model.safetensors").is_file()
        assert not list((tmp_path / "2" / stage).glob(".adapter*"))


def test_batches_of_both_parts_of_the_training_are_shared() -> None:
    core, tokenizer = tiny_core()
    recipe = Recipe(warm_up_pictures=5, pictures=5)
    adapter = VisionAdapter(VisionConfig(), core.config)
    for task in (
        EncoderTask(adapter.encoder, 64, 0, recipe),
        VisionTask(core, tokenizer, adapter, {}, 0, recipe),
    ):
        batch = task.batch(0)
        parts = [share(batch, rank, 2) for rank in range(2)]
        assert [rows(part) for part in (batch, *parts)] == [5, 2, 3]
        for part in parts:
            assert task.loss(part)[0].isfinite()
