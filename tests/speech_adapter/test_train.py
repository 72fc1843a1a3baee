from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from core_llm.checkpoint import core_hash
from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer
from core_llm.train.fit import FitConfig, fit
from speech_adapter import train as training
from speech_adapter.adapter import SpeechAdapter
from speech_adapter.corpus import Corpus, Spoken, trim
from speech_adapter.testing import chirp
from speech_adapter.train import Recipe, SpeechTask

RECIPE = Recipe(recorded=3, digits=2, commands=2, questions=3)


def clip(text: str, seed: int, aligned: bool = True) -> Spoken:
    samples = (chirp(0.3 + 0.1 * seed, seed=seed) * 32767).astype(np.int16)
    if not aligned:
        return Spoken(samples, text, "Repeat after me in English:", text)
    return Spoken(samples, text, "Repeat:", text, np.array([0.0, 0.1]), np.array(["s", "E"]))


@pytest.fixture
def task(adapter: SpeechAdapter, core_and_tokenizer: tuple[Llama, Tokenizer]) -> SpeechTask:
    corpus = Corpus(
        recorded={"ann": [clip("one", 1, aligned=False)], "bob": [clip("two", 2, aligned=False)]},
        digits=[clip("three", 3), clip("four", 4)],
        commands=[clip("open the door", 5)],
        questions=[clip("is there a circle?", 6)],
    )
    held_out = {"digits": [clip("one", 7), clip("two", 8)]}
    return SpeechTask(adapter, *core_and_tokenizer, corpus, held_out, RECIPE, seed=0)


def test_a_batch_is_a_function_of_its_step(task: SpeechTask) -> None:
    first = [task.batch(step) for step in range(4)]
    again = [task.batch(step) for step in (3, 0, 2, 1)]
    for step, batch in zip((3, 0, 2, 1), again, strict=True):
        assert [e.clip.text for e in batch.examples] == [e.clip.text for e in first[step].examples]
        for a, b in zip(batch.examples, first[step].examples, strict=True):
            np.testing.assert_array_equal(a.waveform, b.waveform)


def test_the_second_of_two_batches_has_the_longer_clips(task: SpeechTask) -> None:
    short, long = task.batch(0).examples, task.batch(1).examples
    assert short and long
    assert max(len(e.waveform) for e in short) <= min(len(e.waveform) for e in long)


def test_the_loss_is_of_tokens_and_phonemes(task: SpeechTask) -> None:
    loss, figures = task.loss(task.batch(0))
    assert loss.requires_grad and set(figures) == {"ctc_loss", "phoneme_loss"}
    assert loss.item() == pytest.approx(figures["ctc_loss"] + figures["phoneme_loss"])


def test_digits_and_recordings_are_always_augmented_roughly(task: SpeechTask) -> None:
    examples = [e for step in range(40) for e in task.batch(step).examples]
    rough = {True: 0, False: 0}
    for example in examples:
        hard = example.augmentation is RECIPE.augmentation
        assert hard or example.clip in (*task.corpus.commands, *task.corpus.questions)
        rough[hard] += 1
    assert rough[True] and rough[False]


def test_training_changes_the_adapter_and_not_the_core(task: SpeechTask, tmp_path: Path) -> None:
    before, hashed = task.adapter.projector.out.weight.clone(), core_hash(task.core)
    figures = fit(task, FitConfig(out=tmp_path, steps=4, warmup=1, autocast=False))
    assert core_hash(task.core) == hashed
    assert not torch.equal(task.adapter.projector.out.weight, before)
    assert all(p.grad is None for p in task.core.parameters())
    assert set(figures) == {"digits_ctc_wer", "digits_wer", "digits_wer_shuffled", "digits_accuracy"}


def test_joined_digits_keep_their_texts(task: SpeechTask) -> None:
    rng = np.random.default_rng(0)
    texts = {task._recorded(rng).text for _ in range(40)}
    assert {"one", "two"} < texts
    assert all(set(text.split()) <= {"one", "two"} for text in texts)


def test_trim_cuts_silence_and_says_how_much() -> None:
    clip = np.zeros(16_000, np.int16)
    clip[4_000:6_000] = 9_000
    trimmed, cut = trim(clip)
    assert cut == 4_000 - 320 and 2_000 <= len(trimmed) <= 2_700
    silent, cut = trim(np.zeros(100, np.int16))
    assert len(silent) == 100 and cut == 0


def test_of_several_processes_one_speaks_and_the_others_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    order: list[str] = []

    @contextmanager
    def writer_first() -> Iterator[None]:
        order.append("enter")
        yield
        order.append("leave")

    def spoken(name: str) -> Callable[..., list[Spoken]]:
        def speak(*args: object) -> list[Spoken]:
            order.append(name)
            return []

        return speak

    def stop(*args: object) -> list[Spoken]:
        raise KeyboardInterrupt

    monkeypatch.setattr(training.processes, "writer_first", writer_first)
    monkeypatch.setattr(training, "build_corpus", spoken("corpus"))
    monkeypatch.setattr(training, "held_out_questions", spoken("questions"))
    monkeypatch.setattr(training, "recorded_digits", stop)
    with pytest.raises(KeyboardInterrupt):
        training.train("nano", None, tmp_path, 10, 1e-3, 0)
    assert order == ["enter", "corpus", "questions", "leave"]
