"""The training stages: their losses against formulas, accumulation, resumption, and what may change."""

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core_llm.adapters import Assistant
from core_llm.checkpoint import core_hash, save_core
from core_llm.errors import CheckpointError, DataError, UserError
from core_llm.model import Llama
from core_llm.testing import tiny_core
from core_llm.tokenizer import Tokenizer
from core_llm.train.accumulate import accumulated, split
from core_llm.train.answers import picked
from core_llm.train.fit import FitConfig, learning_rate
from vision_adapter import cli
from vision_adapter.adapter import VisionAdapter, load
from vision_adapter.config import VisionConfig
from vision_adapter.cross_attention import CrossAttentionBlock
from vision_adapter.examples import Example, scene_examples
from vision_adapter.fusion import FusionAdapter, FusionConfig
from vision_adapter.stages.answers import AnswerTask, at_resolution, resize_positions
from vision_adapter.stages.contrastive import ContrastiveTask
from vision_adapter.stages.dpo import DPOTask, preference_loss
from vision_adapter.stages.presets import PRESETS, STAGES, StageConfig, preset
from vision_adapter.stages.run import run_stage, starting_adapter

VISION = VisionConfig(
    stem_channels=(8, 8), encoder_dim=32, encoder_layers=1, encoder_heads=2, encoder_ffn_dim=48,
    token_rows=3, cross_ffn_dim=32, cross_layers=(0, 1), image_size=32,
)  # fmt: skip
TINY = StageConfig(
    steps=4, batch=5, micro_batch=2, lr=1e-3, warmup=2, text_dim=16, text_layers=1, text_heads=2,
    text_length=24, embedding=16,
)  # fmt: skip
Family = tuple[Llama, Tokenizer]


@pytest.fixture(scope="module")
def family() -> Family:
    return tiny_core()


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return scene_examples(12, "stages", 32)


def opened(core: Llama, seed: int = 1) -> VisionAdapter:
    torch.manual_seed(seed)
    adapter = VisionAdapter(VISION, core.config)
    for name, parameter in adapter.named_parameters():
        if name.endswith("_gate"):
            parameter.data.fill_(1.0)
    return adapter


Task = AnswerTask | ContrastiveTask


def task_of(stage: str, family: Family, examples: list[Example], config: StageConfig = TINY) -> Task:
    core, tokenizer = family
    if stage == "contrastive":
        return ContrastiveTask(tokenizer, opened(core), examples, examples[:3], config)
    kind = DPOTask if stage == "dpo" else AnswerTask
    return kind(stage, core, tokenizer, opened(core), examples, examples[:3], config)


def gradients(task: Task, batch: list[Example]) -> tuple[float, dict[str, torch.Tensor]]:
    loss, _ = task.loss(batch)
    named = [(f"{m}.{n}", p) for m, module in task.modules().items() for n, p in module.named_parameters()]
    for _, parameter in named:
        parameter.grad = None
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_equal_one_big_batch(stage: str, family: Family, examples: list[Example]) -> None:
    tasks = {size: task_of(stage, family, examples, replace(TINY, micro_batch=size)) for size in (0, 1, 2)}
    if isinstance(tasks[0], DPOTask):  # away from the reference, where the margin is zero
        for task in tasks.values():
            task.adapter.token_rows.data += 0.3  # type: ignore[union-attr]
    batch = examples[:5]
    loss, expected = gradients(tasks[0], batch)
    assert len(expected) > 10 and all(g.any() for g in expected.values())
    for size in (1, 2):
        other, found = gradients(tasks[size], batch)
        assert other == pytest.approx(loss, abs=1e-5) and set(found) == set(expected)
        largest = max(gradient.abs().max() for gradient in expected.values())
        for name, gradient in expected.items():
            assert (found[name] - gradient).abs().max() <= 1e-5 * largest, name


def test_micro_batches_work_under_autocast(family: Family, examples: list[Example]) -> None:
    losses = []
    for size in (0, 1):
        task = task_of("sft", family, examples, replace(TINY, micro_batch=size))
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = task.loss(examples[:3])
        loss.backward()
        rows = task.modules()["adapter"].token_rows.grad
        assert isinstance(rows, torch.Tensor) and rows.dtype == torch.float32
        losses.append((loss.item(), rows))
    (whole, expected), (parts, found) = losses
    assert parts == pytest.approx(whole, rel=0.01)
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_mean_of_micro_batch_means_would_be_another_loss(family: Family, examples: list[Example]) -> None:
    task = task_of("sft", family, examples)
    whole = task.loss(examples[:4])[0].item()
    means = [task.loss(part)[0].item() for part in split(examples[:4], 1)]
    assert abs(sum(means) / 4 - whole) > 1e-3


def test_gradients_of_micro_batches_are_summed_in_fp32() -> None:
    weight = torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16))
    parts = [1.0] + [2**-9] * 64  # each too small for a bf16 sum to notice

    def losses() -> Iterator[torch.Tensor]:
        for part in parts:
            yield weight * part

    accumulated(losses(), [weight]).backward()
    assert weight.grad is not None and weight.grad.item() == 1.125
    control = torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16))
    for part in parts:
        (control * part).backward()
    assert control.grad is not None and control.grad.item() == 1.0


def test_the_graph_of_a_micro_batch_is_gone_before_the_next() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    alive: list[int] = []
    saved = 0

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(context, x):  # type: ignore[no-untyped-def]
            nonlocal saved
            saved += 1
            alive.append(saved)
            return x.sum()

        @staticmethod
        def backward(context, outer):  # type: ignore[no-untyped-def]
            nonlocal saved
            saved -= 1
            return outer.expand(3)

    total = accumulated((Counted.apply(weight * i) for i in range(4)), [weight])
    assert alive == [1, 1, 1, 1]
    (2 * total).backward()
    assert weight.grad is not None and weight.grad.tolist() == [12.0] * 3
    with torch.no_grad():
        assert accumulated(((weight * i).sum() for i in range(4)), [weight]).item() == 18


@pytest.mark.parametrize("kind", ["vision", "fusion"])
def test_gradients_of_the_image_memory_are_summed_in_fp32_under_autocast(
    kind: str, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, _ = family
    seen: list[torch.Tensor] = []
    original = CrossAttentionBlock.keys_values

    def recorded(self: CrossAttentionBlock, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        memory.retain_grad()
        seen.append(memory)
        return original(self, memory)

    monkeypatch.setattr(CrossAttentionBlock, "keys_values", recorded)
    settings = {key: value for key, value in VISION.to_dict().items() if key != "cross_layers"}
    adapter = opened(core) if kind == "vision" else FusionAdapter(FusionConfig("nano", settings), core.config)
    with torch.autocast("cpu", torch.bfloat16):
        memory = adapter.encode(torch.randn(2, 3, 32, 32))
        sum(
            (k.float().square().sum() + memory.values[i].float().sum()) for i, k in memory.keys.items()
        ).backward()  # type: ignore[union-attr]
    assert len(seen) == 2 and seen[0] is seen[1]
    assert memory.values[0].dtype == torch.bfloat16  # the products did run in bf16
    assert seen[0].grad is not None and seen[0].grad.dtype == torch.float32
    assert not torch.equal(seen[0].grad, seen[0].grad.bfloat16().float())


def test_answer_loss_is_that_of_the_assistant(family: Family, examples: list[Example]) -> None:
    task = task_of("pretrain", family, examples)
    assert isinstance(task, AnswerTask)
    expected = Assistant(*family, [task.adapter]).loss([e.conversation() for e in examples[:4]])
    assert task.loss(examples[:4])[0].item() == pytest.approx(expected.item(), abs=1e-5)
    figures = task.evaluate()
    assert figures["held_out_loss"] != figures["held_out_loss_shuffled"]


def test_contrastive_loss_is_the_symmetric_cross_entropy(family: Family, examples: list[Example]) -> None:
    task = task_of("contrastive", family, examples, replace(TINY, micro_batch=0))
    assert isinstance(task, ContrastiveTask)
    captions = [e.caption for e in examples[:5]]
    with torch.no_grad():
        pixels, tokens = task._inputs(examples[:5])
        images, texts = task.towers.images(pixels).double(), task.towers.texts(tokens).double()
        logits = images @ texts.T / 0.07
        diagonal = torch.arange(5)
        expected = -(logits.log_softmax(0) + logits.log_softmax(1))[diagonal, diagonal].mean() / 2
        assert task.loss(examples[:5])[0].item() == pytest.approx(expected.item(), abs=1e-5)
    ids = task.tokens(captions)
    assert ids.shape == (5, TINY.text_length) and (ids == family[1].eot_id).sum(1).tolist() == [1] * 5
    long = task.tokens(["red " * 100])[0]
    assert long[-1] == family[1].eot_id


def test_contrastive_training_finds_captions_and_changes_the_encoder_alone(
    family: Family, examples: list[Example], tmp_path: Path
) -> None:
    core, tokenizer = family
    adapter = opened(core)
    before, hashed = copy.deepcopy(adapter.state_dict()), core_hash(core)
    config = replace(TINY, steps=30, batch=12, micro_batch=6, lr=3e-3)
    trained, figures = run_stage(
        "contrastive", core, tokenizer, adapter, (examples, examples), tmp_path, config
    )
    assert figures["held_out_retrieved"] > 3 * figures["chance"]
    changed = {name.split(".")[0] for name, t in trained.state_dict().items() if not t.equal(before[name])}
    assert changed == {"encoder"} and core_hash(core) == hashed


@pytest.mark.parametrize("parts", [("cross_attention",), ("projector", "token_rows"), ("encoder",)])
def test_only_the_chosen_parts_train(
    parts: tuple[str, ...], family: Family, examples: list[Example], tmp_path: Path
) -> None:
    core, tokenizer = family
    adapter = opened(core)
    before, hashed = copy.deepcopy(adapter.state_dict()), core_hash(core)
    config = replace(TINY, steps=1, batch=2, warmup=0, lr=1e-2, trained=parts)
    trained, _ = run_stage("sft", core, tokenizer, adapter, (examples, []), tmp_path, config)
    changed = {name.split(".")[0] for name, t in trained.state_dict().items() if not t.equal(before[name])}
    assert changed == set(parts) and core_hash(core) == hashed
    assert all(p.grad is None for p in core.parameters())


def test_dpo_follows_the_formula_without_special_tokens(family: Family, examples: list[Example]) -> None:
    task = task_of("dpo", family, examples)
    assert isinstance(task, DPOTask)
    core, tokenizer = family
    task.adapter.token_rows.data += 0.5
    pair = examples[0]
    assert pair.rejected is not None

    def log_p(adapter: VisionAdapter, answer: str) -> float:
        """From logits of the prompt and answer; the end token is left out."""
        said = tokenizer.encode(answer)
        conversation = pair.conversation(answer)
        logits = Assistant(core, tokenizer, [adapter]).logits([conversation])[0].double()
        # Behind the answer stand its end token and the header of the next turn.
        request = Assistant(core, tokenizer, [adapter]).prepare([conversation], generation_prompt=False)
        start = int(request.answer_starts[0])
        assert request.targets[0, start : start + len(said)].tolist() == said
        steps = logits[start - 1 : start - 1 + len(said)].log_softmax(-1)
        return float(steps.gather(1, torch.tensor(said)[:, None]).sum())

    chosen, rejected = (log_p(task.adapter, a) for a in (pair.caption, pair.rejected))
    old_chosen, old_rejected = (log_p(task.reference, a) for a in (pair.caption, pair.rejected))
    margin = (chosen - rejected) - (old_chosen - old_rejected)
    nll = -chosen / len(tokenizer.encode(pair.caption))
    expected = math.log1p(math.exp(-0.1 * margin)) + 0.2 * nll
    loss, figures = task.loss([pair])
    assert abs(margin) > 1e-3 and figures["margin"] == pytest.approx(margin, abs=1e-3)
    assert loss.item() == pytest.approx(expected, abs=1e-4)
    even = torch.zeros(1)
    assert preference_loss(even, even, even, even, 0.1).item() == pytest.approx(math.log(2))


def test_dpo_raises_the_margin_and_leaves_core_and_reference(
    family: Family, examples: list[Example], tmp_path: Path
) -> None:
    core, tokenizer = family
    adapter, hashed = opened(core), core_hash(core)
    start = copy.deepcopy(adapter.state_dict())
    config = replace(TINY, steps=8, batch=4, micro_batch=0, lr=3e-3, warmup=0)
    trained, figures = run_stage(
        "dpo", core, tokenizer, adapter, (examples[:4], examples[:4]), tmp_path, config
    )
    assert figures["held_out_preferred"] == 1.0 and core_hash(core) == hashed
    state = torch.load(tmp_path / "dpo.state.pt", weights_only=True)["modules"]
    assert all(tensor.equal(start[name]) for name, tensor in state["reference"].items())
    assert not trained.token_rows.equal(start["token_rows"])


def test_the_reference_follows_the_policy_at_its_rate(family: Family, examples: list[Example]) -> None:
    task = task_of("dpo", family, examples, replace(TINY, reference_every=2, reference_decay=0.75))
    assert isinstance(task, DPOTask)
    old = task.reference.token_rows.clone()
    task.adapter.token_rows.data += 1.0
    for step, share in ((1, 0.0), (2, 0.25)):
        task.loss(task.batch(step)[:1])
        assert torch.allclose(task.reference.token_rows, old + share, atol=1e-6)


def test_dpo_without_a_rejected_answer_names_the_example(family: Family, examples: list[Example]) -> None:
    with pytest.raises(DataError, match="scene-stages-1: DPO needs a 'rejected'"):
        task_of("dpo", family, [examples[0], replace(examples[1], rejected=None)])


@pytest.mark.parametrize("stage", ["contrastive", "anneal", "dpo"])
def test_an_interrupted_stage_ends_as_an_uninterrupted_one(
    stage: str, family: Family, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, tokenizer = family
    config = replace(TINY, batch=2, micro_batch=1, reference_every=1, reference_decay=0.5, image_size=40)

    def go(folder: str) -> dict[str, torch.Tensor]:
        data = (examples, [])
        adapter, _ = run_stage(stage, core, tokenizer, opened(core), data, tmp_path / folder, config)
        return adapter.state_dict()

    whole = go("whole")
    kind = {"contrastive": ContrastiveTask, "dpo": DPOTask}.get(stage, AnswerTask)
    batch = kind.batch

    def fails(self: object, step: int) -> list[Example]:
        if step == 2:
            raise KeyboardInterrupt
        return batch(self, step)  # type: ignore[arg-type]

    monkeypatch.setattr(kind, "batch", fails)
    with pytest.raises(KeyboardInterrupt):
        go("broken")
    monkeypatch.setattr(kind, "batch", batch)
    resumed = go("broken")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    metrics = (tmp_path / "broken" / f"{stage}.metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[-1])["step"] == 4


def test_every_epoch_has_each_example_once(examples: list[Example]) -> None:
    steps = [picked(examples, step, 5, "x") for step in range(12)]  # five epochs of twelve
    flat = [e.id for step in steps for e in step]
    epochs = [flat[start : start + 12] for start in range(0, 60, 12)]
    assert all(sorted(epoch) == sorted(e.id for e in examples) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert [e.id for e in picked(examples, 7, 5, "x")] == [e.id for e in steps[7]]


def test_positions_are_resized_as_a_picture() -> None:
    ramp = torch.arange(4.0).repeat_interleave(4)[:, None]  # the row of each patch
    positions = torch.cat([ramp, torch.full((16, 1), 3.0)], dim=1)
    assert torch.equal(resize_positions(positions, 4), positions)
    larger = resize_positions(positions, 8)
    assert larger.shape == (64, 2) and torch.allclose(larger[:, 1], torch.tensor(3.0), atol=1e-5)
    rows = larger[:, 0].reshape(8, 8)
    assert torch.allclose(rows, rows[:, :1].expand(8, 8), atol=1e-5)  # nothing changes along a row
    assert torch.allclose(rows[3:5, 0], torch.tensor([1.25, 1.75]), atol=1e-5)
    with pytest.raises(ValueError, match="not a square"):
        resize_positions(torch.zeros(5, 2), 4)


def test_an_adapter_keeps_its_weights_at_another_resolution(family: Family) -> None:
    core, _ = family
    adapter = opened(core)
    assert at_resolution(adapter, core.config, 32) is adapter is at_resolution(adapter, core.config, 0)
    larger = at_resolution(adapter, core.config, 64)
    assert larger.config.image_size == 64 and larger.encoder(torch.zeros(1, 3, 64, 64)).shape == (1, 64, 32)
    for name, tensor in adapter.state_dict().items():
        assert name == "encoder.positions" or tensor.equal(larger.state_dict()[name])
    with pytest.raises(CheckpointError, match="multiple"):
        at_resolution(adapter, core.config, 33)


def test_presets_hold_the_papers_numbers_and_every_stage_warms_up_anew() -> None:
    paper = PRESETS["paper"]
    assert (paper["pretrain"].lr, paper["pretrain"].weight_decay, paper["pretrain"].batch) == (
        1e-3,
        0.01,
        16_384,
    )
    assert (paper["pretrain"].image_size, paper["contrastive"].image_size) == (336, 224)
    assert paper["anneal"].lr == 2e-5 and paper["anneal"].image_size > paper["pretrain"].image_size
    assert (paper["dpo"].lr, paper["dpo"].beta, paper["dpo"].nll_weight) == (1e-5, 0.1, 0.2)
    for name in PRESETS:
        assert tuple(PRESETS[name]) == STAGES
        for config in PRESETS[name].values():
            fit_config = FitConfig(
                Path(), config.steps, lr=config.lr, warmup=config.warmup, final_lr_fraction=0.0
            )
            assert learning_rate(0, fit_config) < config.lr / 5
            assert learning_rate(config.warmup, fit_config) == pytest.approx(config.lr)
            assert learning_rate(config.steps, fit_config) == pytest.approx(0.0)


def test_unknown_names_and_sizes_say_what_there_is() -> None:
    with pytest.raises(UserError, match="known: paper, small"):
        preset("tiny", "sft")
    with pytest.raises(UserError, match="known: contrastive, pretrain"):
        preset("small", "rlhf")
    with pytest.raises(UserError, match="unknown part 'core'"):
        replace(TINY, trained=("core",))
    with pytest.raises(UserError, match="must be positive"):
        replace(TINY, batch=0)
    with pytest.raises(UserError, match="--image-size"):
        replace(TINY, image_size=-8)


def test_an_adapter_moves_to_another_core_only_when_asked(family: Family, tmp_path: Path) -> None:
    core, _ = family
    opened(core).save(tmp_path / "eyes", core)
    other, _ = tiny_core(seed=5)
    with pytest.raises(CheckpointError, match="another core"):
        starting_adapter(str(tmp_path / "eyes"), other, False, 0, 0)
    shallow = Llama(replace(other.config, n_layers=1)).initialise(0)
    with pytest.raises(CheckpointError, match="a layer before block 1, this core only 1 blocks"):
        starting_adapter(str(tmp_path / "eyes"), shallow, True, 0, 0)
    moved = starting_adapter(str(tmp_path / "eyes"), other, True, 0, 0)
    own = load(tmp_path / "eyes", core)
    assert all(tensor.equal(own.state_dict()[name]) for name, tensor in moved.state_dict().items())


def test_core_and_adapter_stand_where_the_command_says(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, tokenizer = family
    save_core(tmp_path / "core", core, tokenizer)
    opened(core).save(tmp_path / "eyes", core)
    found: list[set[str]] = []

    def stop(stage: str, core: Llama, tokenizer: Tokenizer, adapter: torch.nn.Module, *_: object) -> None:
        found.append({p.device.type for module in (core, adapter) for p in module.parameters()})
        raise KeyboardInterrupt

    monkeypatch.setattr("vision_adapter.stages.command.run_stage", stop)
    # "meta" stands in for a device that is not the CPU.
    monkeypatch.setattr(
        "core_llm.devices.chosen_device", lambda name: torch.device("meta" if name == "cuda" else "cpu")
    )
    for device, start, swap in (("cpu", "eyes", False), ("cuda", "eyes", True), ("cuda", "new", False)):
        adapter = start if start == "new" else str(tmp_path / start)
        with pytest.raises(KeyboardInterrupt):
            cli.stage(
                "sft",
                "scenes",
                tmp_path / "out",
                str(tmp_path / "core"),
                adapter,
                swap_core=swap,
                device=device,
            )  # type: ignore[arg-type]
    assert found == [{"cpu"}, {"meta"}, {"meta"}]


def test_command_trains_stage_after_stage(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vision_adapter.stages.run.VisionConfig", Configured)
    monkeypatch.setattr("vision_adapter.stages.presets.PRESETS", {"small": dict.fromkeys(STAGES, TINY)})
    core, tokenizer = family
    save_core(tmp_path / "core", core, tokenizer)
    before = (tmp_path / "core" / "model.safetensors").read_bytes()
    folder = tmp_path / "data"
    folder.mkdir()
    with open(folder / "captions.jsonl", "w") as file:
        for i, example in enumerate(scene_examples(40, "cli", 32)):
            example.image.save(folder / f"{i}.png")  # type: ignore[union-attr]
            question, answer = example.turns[0]
            row = {"image": f"{i}.png", "question": question, "chosen": answer, "rejected": example.rejected}
            file.write(json.dumps(row) + "\n")
    start = "new"
    for name, size in (("contrastive", 32), ("anneal", 40), ("dpo", 40)):
        out = tmp_path / name
        where = str(tmp_path / "core")
        cli.stage(name, str(folder), out, where, start, steps=2, batch=2, image_size=size, device="cpu")
        start = str(out)
        said = capsys.readouterr().out
        assert f"{name}: 3" in said and "held_out_loss" in said
    assert load(tmp_path / "dpo", core).config.image_size == 40
    assert (tmp_path / "core" / "model.safetensors").read_bytes() == before


def Configured(**values: object) -> VisionConfig:
    return replace(VISION, **values)  # type: ignore[arg-type]


Configured.from_dict = VisionConfig.from_dict  # type: ignore[attr-defined]
