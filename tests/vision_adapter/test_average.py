"""Averages of weights: which checkpoints are kept, what their mean is, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from core_llm.checkpoint import read_tensors
from core_llm.errors import CheckpointError, UserError
from core_llm.files import WEIGHTS
from core_llm.lora import LoRA, LoRAConfig
from core_llm.model import Llama
from core_llm.testing import tiny_core
from core_llm.tokenizer import Tokenizer
from vision_adapter import cli
from vision_adapter.adapter import VisionAdapter, load
from vision_adapter.config import VisionConfig
from vision_adapter.examples import Example, scene_examples
from vision_adapter.stages.answers import AnswerTask
from vision_adapter.stages.average import BestCheckpoints, average_folders
from vision_adapter.stages.command import card
from vision_adapter.stages.presets import StageConfig
from vision_adapter.stages.run import run_stage

VISION = VisionConfig(
    stem_channels=(8, 8), encoder_dim=32, encoder_layers=1, encoder_heads=2, encoder_ffn_dim=48,
    token_rows=3, cross_ffn_dim=32, cross_layers=(0, 1), image_size=32,
)  # fmt: skip
SFT = StageConfig(steps=12, batch=3, micro_batch=0, lr=3e-3, warmup=0, average_top=3)
Family = tuple[Llama, Tokenizer]


@pytest.fixture(scope="module")
def family() -> Family:
    return tiny_core()


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return scene_examples(12, "average", 32)


def fresh(core: Llama, seed: int = 1, config: VisionConfig = VISION) -> VisionAdapter:
    torch.manual_seed(seed)
    return VisionAdapter(config, core.config)


def test_the_best_are_kept_and_averaged_in_fp32(tmp_path: Path) -> None:
    module = nn.Linear(2, 1, bias=False)
    best = BestCheckpoints(tmp_path / "best", 2, module, {"kind": "vision"})
    # 1/3 has no bf16 form: a mean of rounded weights would be another.
    for step, weight, loss in ((1, 9.0, 0.9), (2, 1 / 3, 0.3), (3, 5.0, 0.5), (4, 7.0, 0.7), (5, 1.0, 0.2)):
        module.weight.data.fill_(weight)
        best.offer(step, {"held_out_loss": loss})
    assert list(best.scores()) == [5, 2]
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == [
        "scores.json", "step-0000002", "step-0000005",
    ]  # fmt: skip
    best.load_average()
    assert module.weight.tolist() == [[pytest.approx((1 / 3 + 1) / 2, abs=1e-7)] * 2]


def test_the_same_step_again_counts_once_and_an_unnamed_folder_goes(tmp_path: Path) -> None:
    module = nn.Linear(2, 1, bias=False)
    folder = tmp_path / "best"
    best = BestCheckpoints(folder, 2, module, {})
    best.offer(3, {"held_out_loss": 0.5})
    (folder / "step-0000099").mkdir()  # written, but the run ended before the index named it
    best.offer(3, {"held_out_loss": 0.5})
    assert best.scores() == {3: 0.5} and not (folder / "step-0000099").exists()
    with pytest.raises(UserError, match="at least one"):
        BestCheckpoints(folder, 0, module, {})


def test_sft_ends_with_the_mean_of_its_best(family: Family, examples: list[Example], tmp_path: Path) -> None:
    core, tokenizer = family
    trained, figures = run_stage("sft", core, tokenizer, fresh(core), (examples, examples[:4]), tmp_path, SFT)
    scores = json.loads((tmp_path / "best" / "scores.json").read_text())
    assert len(scores) == figures["averaged_checkpoints"] == 3
    logged = [json.loads(line) for line in (tmp_path / "sft.metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["held_out_loss"] for line in logged if "held_out_loss" in line}
    assert len(losses) == 12  # one per step in so short a run
    assert {int(step) for step in scores} == set(sorted(losses, key=lambda step: losses[step])[:3])
    assert figures["held_out_loss_of_best"] == min(losses.values())
    assert figures["held_out_loss_of_last"] == losses[12]
    kept = [read_tensors(tmp_path / "best" / f"step-{int(step):07}" / WEIGHTS) for step in scores]
    for name, tensor in trained.state_dict().items():
        mean = torch.stack([each[name].double() for each in kept]).mean(0)
        assert torch.allclose(tensor.double(), mean, atol=1e-6), name
    task = AnswerTask("sft", core, tokenizer, trained, examples, examples[:4], SFT)
    trained.eval()
    with torch.no_grad():
        assert task.evaluate()["held_out_loss"] == pytest.approx(figures["held_out_loss"], abs=1e-6)
    step = min(scores, key=scores.get)
    assert load(tmp_path / "best" / f"step-{int(step):07}", core).config == trained.config
    said = card("sft", "scenes", "small", 0, SFT, figures)
    assert "3 checkpoints" in said and f"{figures['held_out_loss_of_best']:.4f}" in said
    assert str(tmp_path) not in card("sft", str(tmp_path), "small", 0, SFT, figures)


def test_an_interrupted_run_keeps_its_best(
    family: Family, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, tokenizer = family

    def go(folder: str) -> VisionAdapter:
        data = (examples, examples[:4])
        return run_stage("sft", core, tokenizer, fresh(core), data, tmp_path / folder, SFT)[0]

    whole = go("whole")
    batch = AnswerTask.batch

    def fails(self: AnswerTask, step: int) -> list[Example]:
        if step == 9:
            raise KeyboardInterrupt
        return batch(self, step)

    monkeypatch.setattr(AnswerTask, "batch", fails)
    with pytest.raises(KeyboardInterrupt):
        go("broken")
    monkeypatch.setattr(AnswerTask, "batch", batch)
    resumed = go("broken").state_dict()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.state_dict().items())
    scores = [(tmp_path / name / "best" / "scores.json").read_text() for name in ("whole", "broken")]
    assert json.loads(scores[0]) == json.loads(scores[1])


def test_averaging_needs_held_out_examples_and_sft(
    family: Family, examples: list[Example], tmp_path: Path
) -> None:
    core, tokenizer = family
    with pytest.raises(UserError, match="hold out none"):
        run_stage("sft", core, tokenizer, fresh(core), (examples, []), tmp_path, SFT)
    with pytest.raises(UserError, match="belongs to sft"):
        cli.stage("dpo", "scenes", tmp_path / "out", average_top=2)
    with pytest.raises(UserError, match="not be negative"):
        replace(SFT, average_top=-1)


def test_the_command_averages_folders(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    core, _ = family
    folders = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for seed, folder in enumerate(folders):
        fresh(core, seed).save(folder, core)
    cli.average(folders, tmp_path / "mean")
    assert "mean of 3 adapters" in capsys.readouterr().out
    mean = load(tmp_path / "mean", core).state_dict()
    stored = [read_tensors(folder / WEIGHTS) for folder in folders]
    for name, tensor in mean.items():
        expected = torch.stack([each[name].double() for each in stored]).mean(0)
        assert torch.allclose(tensor.double(), expected, rtol=2**-8, atol=1e-6), name
    assert not torch.equal(mean["projector.weight"], stored[0]["projector.weight"])


def with_updates(core: Llama) -> VisionAdapter:
    adapter = fresh(core)
    lora = LoRA(core, LoRAConfig(rank=2))
    for parameter in lora.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    adapter.hold(lora)
    return adapter


def test_adapters_with_updates_of_the_core_are_refused(tmp_path: Path) -> None:
    core, _ = tiny_core()  # one of its own: updates are attached to it
    fresh(core, 2).save(tmp_path / "plain", core)
    with_updates(core).save(tmp_path / "updated", core)
    for folders in (["updated", "plain"], ["plain", "updated"], ["updated", "updated"]):
        with pytest.raises(CheckpointError, match=r"updated: has low-rank updates.*leave it out") as caught:
            average_folders([tmp_path / name for name in folders], tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_kept_checkpoints_of_an_adapter_with_updates_load(examples: list[Example], tmp_path: Path) -> None:
    core, tokenizer = tiny_core()
    config = replace(SFT, steps=3, average_top=2)
    trained, _ = run_stage(
        "sft", core, tokenizer, with_updates(core), (examples, examples[:3]), tmp_path, config
    )
    kept = sorted((tmp_path / "best").glob("step-*"))
    assert len(kept) == 2 and trained.lora is not None
    for folder in kept:
        bare, _ = tiny_core()
        loaded = load(folder, bare).lora
        assert loaded is not None
        for own, other in zip(trained.lora.parameters(), loaded.parameters(), strict=True):
            assert torch.allclose(own, other, rtol=2**-8)


def test_folders_that_do_not_belong_together_are_refused(family: Family, tmp_path: Path) -> None:
    core, _ = family
    other, _ = tiny_core(seed=5)
    fresh(core).save(tmp_path / "a", core)
    fresh(core, 2).save(tmp_path / "b", core)
    fresh(core).save(tmp_path / "other_core", other)
    fresh(core, config=replace(VISION, token_rows=4)).save(tmp_path / "other_shape", core)
    out = tmp_path / "out"
    for bad, what in (("other_core", "core"), ("other_shape", "configuration")):
        with pytest.raises(CheckpointError, match=f"another {what}"):
            average_folders([tmp_path / "a", tmp_path / bad], out)
    # The same configuration in name, other tensors in fact.
    config = (tmp_path / "a" / "config.json").read_bytes()
    (tmp_path / "other_shape" / "config.json").write_bytes(config)
    with pytest.raises(CheckpointError, match="token_rows has shape"):
        average_folders([tmp_path / "a", tmp_path / "other_shape"], out)
    with pytest.raises(UserError, match="at least two"):
        average_folders([tmp_path / "a"], out)
    with pytest.raises(UserError, match="one of the folders"):
        average_folders([tmp_path / "a", tmp_path / "b"], tmp_path / "b")
    with pytest.raises(UserError, match="one of the folders"):  # by another name
        average_folders([tmp_path / "a", tmp_path / "b"], tmp_path / "a" / ".." / "b")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        average_folders([tmp_path / "a", tmp_path / "nowhere"], out)
    assert not out.exists()
