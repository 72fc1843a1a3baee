"""The training stages: their losses against formulas, micro-batches, resumption, and what may change."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

from core_llm.adapters import Assistant
from core_llm.checkpoint import save_core
from core_llm.errors import DataError, MediaError, UserError
from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer
from speech_adapter import cli_stages
from speech_adapter.adapter import SpeechAdapter, load
from speech_adapter.augment import Perturbation, perturbation
from speech_adapter.examples import Example, asked, language_name, load_examples, train_and_held_out
from speech_adapter.stages.best_rq import BestRQTask, RandomQuantizer, normalised, span_mask
from speech_adapter.stages.clips import Clip, ClipTask
from speech_adapter.stages.ctc import CTCTask
from speech_adapter.stages.presets import PRESETS, STAGES, StageConfig, preset
from speech_adapter.stages.run import bits, run_stage, starting_adapter
from speech_adapter.stages.sft import SFTTask, distillation
from speech_adapter.testing import chirp, small_config

TINY = StageConfig(
    steps=4, batch=4, micro_batch=2, lr=1e-3, warmup=1, codebooks=2, codes=8, code_dim=4, mask_start=0.05
)
Family = tuple[Llama, Tokenizer]
WORDS = ("one", "two", "red circle", "open the door")


def sound(i: int, seconds: float) -> np.ndarray:
    """Silence and then a tone, whose height says which of four words it stands for."""
    time = np.arange(int(seconds * 16_000)) / 16_000
    noise = np.random.default_rng(i).standard_normal(len(time))
    return (0.3 * np.sin(2 * np.pi * 300 * 2 ** (i % 4) * time) * (time > 0.3) + 0.01 * noise).astype(
        np.float32
    )


def examples(n: int = 8, seconds: float = 1.0) -> list[Example]:
    return [
        Example(
            f"e{i}",
            sound(i, seconds + 0.1 * i),
            WORDS[i % 4],
            answer="yes" if i % 2 else "",
            rate=16_000,
        )
        for i in range(n)
    ]


def adapter_of(family: Family, merge: bool = False) -> SpeechAdapter:
    torch.manual_seed(1)
    return SpeechAdapter(small_config(merge=merge), family[0].embed_tokens.weight)


def task_of(stage: str, family: Family, config: StageConfig) -> ClipTask[Any]:
    core, tokenizer = family
    adapter, data = adapter_of(family), examples()
    if stage == "best-rq":
        return BestRQTask(adapter, data, data[:3], config)
    if stage == "ctc":
        return CTCTask(tokenizer, adapter, data, data[:3], config)
    items = [item for example in data for item in asked(example)]
    return SFTTask(core, tokenizer, adapter, items, items[:3], config)


@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_equal_one_big_batch(stage: str, core_and_tokenizer: Family) -> None:
    found: list[tuple[float, dict[str, torch.Tensor]]] = []
    for size in (0, 1, 3):
        config = replace(TINY, micro_batch=size, kl_weight=0.5, ctc_weight=0.5)
        task = task_of(stage, core_and_tokenizer, config)
        loss, _ = task.loss(task.batch(0))
        loss.backward()
        named = {f"{m}.{n}": p for m, module in task.modules().items() for n, p in module.named_parameters()}
        grads = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
        found.append((loss.item(), grads))
    (whole, expected), *others = found
    assert len(expected) > 10
    largest = max(gradient.abs().max() for gradient in expected.values())
    for loss_, gradients in others:
        assert loss_ == pytest.approx(whole, rel=1e-5) and set(gradients) == set(expected)
        for name, gradient in expected.items():
            assert (gradients[name] - gradient).abs().max() <= 1e-4 * largest, name


def test_masks_are_spans_of_frames_and_of_the_papers_share() -> None:
    rng = np.random.default_rng(0)
    mask = span_mask(200_000, 0.025, 32, rng)
    # A frame stays clear when none of the 32 frames up to it begins a span.
    assert abs(mask.mean() - (1 - 0.975**32)) < 0.01
    edges = np.flatnonzero(np.diff(mask.astype(int)))
    runs = np.diff(edges)[(0 if mask[edges[0] + 1] else 1) :: 2]
    assert runs.min() == 32
    assert not span_mask(50, 0.0, 32, rng).any() and span_mask(50, 1.0, 32, rng).all()


def test_codes_are_the_nearest_vectors_by_cosine_and_never_change(core_and_tokenizer: Family) -> None:
    quantizer = RandomQuantizer(320, 32, replace(TINY, codebooks=3, codes=20, code_dim=16), seed=0)
    frames = torch.randn(50, 320)
    projected = (frames @ quantizer.projection).double()
    books = quantizer.codebooks.double()
    cosine = F.cosine_similarity(projected[:, None, None], books[None], dim=-1)
    assert torch.equal(quantizer.codes(frames), cosine.argmax(-1))
    assert torch.equal(quantizer.codes(7.0 * frames), cosine.argmax(-1))
    assert {name for name, _ in quantizer.named_parameters()} == {"out.weight", "out.bias"}
    again = RandomQuantizer(320, 32, replace(TINY, codebooks=3, codes=20, code_dim=16), seed=0)
    assert torch.equal(again.codebooks, quantizer.codebooks) and quantizer.projection.shape == (320, 16)


def test_normalisation_ignores_padding() -> None:
    log_mel = torch.randn(2, 30, 5) * 3 + 2
    frames = torch.tensor([30, 12])
    clean, _, _ = normalised(log_mel, frames)
    for row, original, n in zip(clean, log_mel, frames.tolist(), strict=True):
        expected = (original[:n] - original[:n].mean(0)) / original[:n].std(0, unbiased=False)
        assert torch.allclose(row[:n], expected, atol=1e-4) and not row[n:].any()


def test_best_rq_looks_at_masked_frames_alone_and_crops(core_and_tokenizer: Family) -> None:
    task = task_of("best-rq", core_and_tokenizer, replace(TINY, crop=100))
    assert isinstance(task, BestRQTask)
    batch = task.batch(0)
    logits, codes = task.guesses(batch)
    assert len(codes) == task.weight(batch) > 0 and logits.shape == (len(codes), 2, 8)
    assert all(len(task._cropped(clip)) == 100 * 160 - 2 * 2560 for clip in batch)
    loss, figures = task.loss(batch)
    assert loss.item() == pytest.approx(
        F.cross_entropy(logits.flatten(0, 1), codes.flatten()).item(), rel=1e-4
    )
    assert 0 <= figures["masked_accuracy"] <= 1


def two_tones(seed: int) -> Example:
    """A second of one tone and a second of another: what is masked can be told from what is beside it."""
    rng = np.random.default_rng(seed)
    hz = np.repeat(rng.choice([300.0, 900.0, 2700.0], 2, replace=False), 16_000)
    samples = 0.3 * np.sin(2 * np.pi * hz * np.arange(32_000) / 16_000) + 0.01 * rng.standard_normal(32_000)
    return Example(f"tones-{seed}", samples.astype(np.float32), rate=16_000)


def test_best_rq_learns_more_than_the_most_frequent_code(core_and_tokenizer: Family, tmp_path: Path) -> None:
    data = [two_tones(i) for i in range(24)]
    adapter = adapter_of(core_and_tokenizer)
    before = copy.deepcopy(adapter.state_dict())
    config = replace(TINY, steps=250, batch=8, micro_batch=0, lr=6e-3)
    split = (data[:16], data[16:])
    figures = run_stage("best-rq", *core_and_tokenizer, adapter, split, tmp_path, config)
    assert figures["held_out_masked_accuracy"] > figures["held_out_most_frequent"] + 0.05
    changed = {name.split(".")[0] for name, t in adapter.state_dict().items() if not t.equal(before[name])}
    assert changed == {"encoder"}


def test_distillation_is_the_divergence_from_the_core_that_reads(core_and_tokenizer: Family) -> None:
    student, teacher = torch.randn(5, 9).double(), torch.randn(5, 9).double()
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    assert distillation(student, teacher, 2.0).item() == pytest.approx(4 * (p * (p / q).log()).sum().item())
    assert distillation(teacher, teacher, 2.0).item() == pytest.approx(0, abs=1e-9)
    core, tokenizer = core_and_tokenizer
    task = task_of("sft", core_and_tokenizer, replace(TINY, kl_weight=1.0, micro_batch=0))
    batch = task.batch(0)
    loss, figures = task.loss(batch)
    assert loss.item() == pytest.approx(figures["kl"], rel=1e-5) and figures["kl"] > 0
    plain = task_of("sft", core_and_tokenizer, replace(TINY, micro_batch=0))
    listening = Assistant(core, tokenizer, [plain.adapter])
    expected = listening.loss([clip.item.conversation(clip.audio) for clip in plain.batch(0)])
    assert plain.loss(plain.batch(0))[0].item() == pytest.approx(expected.item(), abs=1e-5)


def test_prompts_are_the_papers() -> None:
    example = Example(
        "x", b"", "Hallo", "de_de", translation="Hello", target_language="en", answer="Hi", prompt=""
    )
    recognition, translation, question = asked(example)
    assert recognition.prompt == "Repeat after me in German:" and recognition.answer == "Hallo"
    assert translation.prompt == "Translate the following sentence into English:"
    assert (question.prompt, question.answer) == ("", "Hi") and len(
        question.conversation(None)[0].content
    ) == 1  # type: ignore[arg-type]
    assert recognition.written()[0].text == "Repeat after me in German: Hallo"
    assert [a.task for a in asked(example, ("translation",))] == ["translation"]
    assert language_name("cmn_hans_cn") == "Chinese" and language_name("sv-SE") == "Swedish"
    assert language_name("Klingon") == "Klingon"
    with pytest.raises(DataError, match="no name is known"):
        language_name("qqq")
    with pytest.raises(UserError, match="known: recognition, translation, question"):
        asked(example, ("sing",))


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_stage_ends_as_an_uninterrupted_one(
    stage: str, core_and_tokenizer: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(TINY, kl_weight=0.5, perturbation=perturbation(("spec", "speed", "noise")))

    def go(folder: str) -> dict[str, torch.Tensor]:
        adapter = adapter_of(core_and_tokenizer)
        run_stage(stage, *core_and_tokenizer, adapter, (examples(6), []), tmp_path / folder, config)
        return adapter.state_dict()

    core_bits = bits(core_and_tokenizer[0])
    whole = go("whole")
    batch = ClipTask.batch

    def fails(self: ClipTask[Any], step: int) -> list[Clip[Any]]:
        if step == 2:
            raise KeyboardInterrupt
        return batch(self, step)

    monkeypatch.setattr(ClipTask, "batch", fails)
    with pytest.raises(KeyboardInterrupt):
        go("broken")
    monkeypatch.setattr(ClipTask, "batch", batch)
    resumed = go("broken")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    metrics = (tmp_path / "broken" / f"{stage}.metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[-1])["step"] == 4
    assert bits(core_and_tokenizer[0]) == core_bits
    assert all(p.grad is None for p in core_and_tokenizer[0].parameters())


def test_a_changed_core_is_noticed_to_the_last_bit(
    core_and_tokenizer: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = copy.deepcopy(core_and_tokenizer[0])

    def spoils(self: Any) -> dict[str, float]:
        core.embed_tokens.weight.data[0, 0] *= 1 + 2**-20
        return {}

    monkeypatch.setattr(ClipTask, "evaluate", spoils)
    with pytest.raises(RuntimeError, match="changed the frozen core"):
        run_stage(
            "ctc",
            core,
            core_and_tokenizer[1],
            adapter_of(core_and_tokenizer),
            (examples(4), []),
            tmp_path,
            TINY,
        )


def test_ctc_spells_characters_it_was_trained_on(core_and_tokenizer: Family, tmp_path: Path) -> None:
    data = examples(4)
    config = replace(TINY, steps=200, batch=4, micro_batch=0, lr=6e-3)
    figures = run_stage(
        "ctc", *core_and_tokenizer, adapter_of(core_and_tokenizer), (data, data), tmp_path, config
    )
    assert figures["held_out_cer"] < 0.3 < figures["held_out_wer_shuffled"]
    tokens = replace(config, units="tokens", steps=2)
    figures = run_stage(
        "ctc", *core_and_tokenizer, adapter_of(core_and_tokenizer), (data, data), tmp_path / "t", tokens
    )
    assert figures["held_out_loss"] > 0
    with pytest.raises(DataError, match="no recording has a text"):
        CTCTask(core_and_tokenizer[1], adapter_of(core_and_tokenizer), [Example("a", b"")], [], TINY)


def test_perturbations_are_off_unless_asked_for_and_follow_their_seed() -> None:
    samples = chirp(1.0)
    assert Perturbation().waveform(samples, np.random.default_rng(0)) is samples
    fast = Perturbation(speeds=(2.0,)).waveform(samples, np.random.default_rng(0))
    assert abs(len(fast) - 8_000) <= 1 and fast.dtype == np.float32
    noisy = Perturbation(noise=1.0, noise_snr_db=(10.0, 10.0)).waveform(samples, np.random.default_rng(0))
    added = noisy - samples
    assert 10 * np.log10((samples**2).mean() / (added**2).mean()) == pytest.approx(10.0, abs=0.1)
    log_mel, frames = torch.randn(2, 100, 80), torch.tensor([100, 60])
    spec = perturbation(("spec",))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    masked = spec.features(log_mel, frames, [1, 2])
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(masked, spec.features(log_mel, frames, [1, 2]))
    assert not torch.equal(masked[0], log_mel[0]) and torch.equal(masked[1, 60:], log_mel[1, 60:])
    alone = spec.features(log_mel[1:], frames[1:], [2])
    assert torch.equal(alone[0], masked[1])
    with pytest.raises(UserError, match="known: spec, speed, noise"):
        perturbation(("echo",))


def test_presets_hold_the_papers_numbers() -> None:
    paper = PRESETS["paper"]
    best_rq, sft = paper["best-rq"], paper["sft"]
    assert (best_rq.steps, best_rq.batch, best_rq.crop) == (500_000, 2048, 6000)
    assert (best_rq.codebooks, best_rq.codes, best_rq.code_dim) == (16, 8192, 16)
    assert (best_rq.mask_start, best_rq.mask_span) == (0.025, 32)
    assert (sft.steps, sft.batch, sft.lr) == (650_000, 512, 1e-4)
    with pytest.raises(UserError, match="known: paper, nano"):
        preset("huge", "sft")
    with pytest.raises(UserError, match="kl_weight must be"):
        replace(TINY, kl_weight=2.0)


def test_any_folder_with_a_table_is_read(tmp_path: Path) -> None:
    for i in range(3):
        soundfile.write(tmp_path / f"{i}.wav", chirp(0.3, seed=i), 16_000)
    (tmp_path / "metadata.csv").write_text("file_name,sentence,split\n0.wav,hello,train\n1.wav,you,test\n")
    (found,) = load_examples(str(tmp_path))
    assert (found.text, found.audio, found.language) == ("hello", tmp_path / "0.wav", "en")
    assert [e.text for e in load_examples(str(tmp_path), split="dev")] == ["you"]
    (tmp_path / "metadata.csv").write_text("sentence\nhello\n")
    with pytest.raises(DataError, match="row 1 names no audio file"):
        load_examples(str(tmp_path))
    with pytest.raises(DataError, match="known: fsdd, librispeech"):
        load_examples(str(tmp_path / "nothing"))


def test_every_part_of_a_list_holds_out_its_own(tmp_path: Path) -> None:
    for name, rows in (("a", ("train",)), ("b", ("train", "dev"))):
        (tmp_path / name).mkdir()
        table = "".join(f"{i}.wav,{name}{i},{split}\n" for i, split in enumerate(rows))
        (tmp_path / name / "metadata.csv").write_text(f"file_name,text,split\n{table}")
    (tmp_path / "fsdd").mkdir()
    soundfile.write(tmp_path / "fsdd" / "0_jackson_0.wav", chirp(0.3), 8_000)  # a speaker of the train split
    where = f"fsdd,{tmp_path / 'a'}, {tmp_path / 'b'}"
    train, dev = train_and_held_out(where, tmp_path)
    assert [e.text for e in train] == ["zero", "a0", "b0"] and [e.text for e in dev] == ["b1"]
    with pytest.raises(DataError, match="easy_vqa: holds no recordings; known: fsdd"):
        load_examples("easy_vqa", tmp_path)


def test_the_test_split_of_a_dataset_is_never_trained_on(tmp_path: Path) -> None:
    import datasets

    soundfile.write(tmp_path / "a.wav", chirp(0.3), 16_000)

    def part(name: str) -> datasets.Dataset:
        rows = {"audio": [str(tmp_path / "a.wav")] * 40, "text": [f"{name} {i}" for i in range(40)]}
        return datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio())

    both = datasets.DatasetDict({"train": part("train"), "test": part("test")})
    both.save_to_disk(str(tmp_path / "both"))
    train, dev = train_and_held_out(str(tmp_path / "both"))
    assert {e.text.split()[0] for e in train} == {"train"} and len(train) == 40
    assert {e.text.split()[0] for e in dev} == {"test"} and len(dev) == 40
    datasets.DatasetDict({"train": part("train")}).save_to_disk(str(tmp_path / "one"))
    train, dev = train_and_held_out(str(tmp_path / "one"))  # one in twenty is held out
    assert len(train) + len(dev) == 40 and len(train) > len(dev) > 0


def test_clips_fit_the_adapter_at_any_speed_and_too_long_ones_are_named(core_and_tokenizer: Family) -> None:
    slower = Perturbation(speeds=(0.5,))
    rng = np.random.default_rng(0)
    assert len(slower.waveform(chirp(1.0), rng, 3.0)) == 32_000
    assert len(slower.waveform(chirp(1.0), rng, 1.5)) == 16_000
    task = task_of("ctc", core_and_tokenizer, replace(TINY, perturbation=slower))
    limit = small_config().max_seconds
    edge = Clip(Example("edge", chirp(0.9 * limit), "one", rate=16_000), (0,), slower, task.max_seconds)
    assert len(edge.samples) == len(chirp(0.9 * limit))
    task.features([edge])
    path = Path(__file__).parent / "no-such-recording.wav"
    with pytest.raises(MediaError, match="no-such-recording"):
        _ = Clip(Example("x", path), (0,), slower, limit).samples
    with pytest.raises(MediaError, match="longer than the limit"):
        _ = Clip(Example("x", chirp(limit + 1), rate=16_000), (0,), slower, task.max_seconds).samples
    best_rq = task_of("best-rq", core_and_tokenizer, TINY)
    long = Clip(Example("x", chirp(limit + 1), rate=16_000), (0,), slower, best_rq.max_seconds)
    assert best_rq.max_seconds is None and len(long.samples) > 2 * limit * 16_000
    assert isinstance(best_rq, BestRQTask) and len(best_rq._cropped(long)) <= limit * 16_000


def test_recordings_without_text_weigh_the_same_in_any_micro_batch(core_and_tokenizer: Family) -> None:
    core, tokenizer = core_and_tokenizer
    data = [
        replace(example, text="", answer="yes") if i % 3 else example for i, example in enumerate(examples(4))
    ]
    items = [item for example in data for item in asked(example)]
    losses = []
    for size in (0, 1):
        config = replace(TINY, batch=len(items), micro_batch=size, ctc_weight=1.0)
        task = SFTTask(core, tokenizer, adapter_of(core_and_tokenizer), items, [], config)
        losses.append(task.loss(task.batch(0))[1]["ctc_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] > 0


def test_a_stage_can_begin_with_whispers_encoder(core_and_tokenizer: Family, tmp_path: Path) -> None:
    from whisper.model import ModelDimensions, Whisper

    torch.manual_seed(1)
    sizes = ModelDimensions(80, 1500, 32, 2, 2, 51_864, 64, 32, 2, 1)
    weights = Whisper(sizes).state_dict()
    torch.save({"dims": vars(sizes), "model_state_dict": weights}, tmp_path / "tiny.pt")
    adapter = starting_adapter(f"whisper:{tmp_path / 'tiny.pt'}", core_and_tokenizer[0], "nano", 0)
    tower = adapter.encoder.get_submodule("tower").state_dict()
    assert all(torch.equal(tensor, weights[f"encoder.{name}"]) for name, tensor in tower.items())


def test_the_command_trains_stage_after_stage(
    core_and_tokenizer: Family,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    core, tokenizer = core_and_tokenizer
    save_core(tmp_path / "core", core, tokenizer)
    rows = []
    for i, example in enumerate(examples(6, 0.6)):
        soundfile.write(tmp_path / f"{i}.flac", example.audio, 16_000)
        rows.append({"file_name": f"{i}.flac", "text": example.text, "split": "dev" if i > 3 else "train"})
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = "new"
    for name in STAGES:
        out = tmp_path / name
        cli_stages.stage(
            name, str(tmp_path), out, str(tmp_path / "core"), start, steps=2, batch=2, augment=("spec",)
        )
        start = str(out)
    shown = capsys.readouterr().out
    assert "sft: 4 recordings, 2 held out" in shown and "held_out_wer_shuffled" in shown
    from core_llm.checkpoint import load_core

    assert isinstance(load(tmp_path / "sft", load_core(tmp_path / "core")[0]), SpeechAdapter)


@pytest.mark.parametrize("stage", STAGES)
def test_a_bad_recording_is_left_out_with_one_warning_and_many_stop_the_stage(
    core_and_tokenizer: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture, stage: str
) -> None:
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"this is no sound")
    whole = examples(6)
    task = task_of(stage, core_and_tokenizer, replace(TINY, batch=7))
    broken = Example("bad", bad, "one", answer="yes")
    clips = [Clip(item, (0, i), Perturbation(), 30.0) for i, item in enumerate(of(stage, [*whole, broken]))]
    good = [clip for clip in clips if clip.example.id != "bad"]
    expected = task.loss(good)[0].item()
    for _ in range(2):
        assert task.loss(clips)[0].item() == pytest.approx(expected)
    told = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert len(told) == 1 and "bad.wav" in told[0]
    task.held_out = clips
    found = task.evaluate()
    task.held_out = good
    assert found == task.evaluate() and found["held_out_loss"] == pytest.approx(expected)
    other = Example("worse", tmp_path / "gone.wav", "one", answer="yes")
    with pytest.raises(DataError, match="2 of 8 recordings cannot be read.*gone.wav.*repair them"):
        task.loss([*clips, *(Clip(item, (0, 9), Perturbation(), 30.0) for item in of(stage, [other]))])


def of(stage: str, recordings: list[Example]) -> list[Any]:
    return (
        [item for e in recordings for item in asked(e, ("recognition",))]
        if stage == "sft"
        else list(recordings)
    )
