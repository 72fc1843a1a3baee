import random

import numpy as np
import pytest
import soxr
import torch

from core_llm.checkpoint import load_core
from core_llm.data.phrases import DIGITS
from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer
from speech_adapter import synthesis
from speech_adapter.adapter import SpeechAdapter, load
from speech_adapter.alignment import _spans, align
from speech_adapter.audio import SAMPLE_RATE
from speech_adapter.testing import chirp

needs_espeak = pytest.mark.skipif(not synthesis.available(), reason="espeak-ng is not installed")


def spoken(rng: random.Random, n: int = 4) -> tuple[np.ndarray, list[tuple[str, float, float]]]:
    """Words spoken one by one and laid at known times: samples, and each word's start and end in seconds."""
    voice = rng.choice(synthesis.HELD_OUT_VOICES)
    parts, at, truth = [np.zeros(4800, dtype=np.float32)], 4800, []
    for _ in range(n):
        word = rng.choice(DIGITS)
        samples, rate = synthesis.speak(word, voice, rng.randint(140, 190))
        samples = soxr.resample(samples, rate, SAMPLE_RATE)
        loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
        samples = samples[loud[0] : loud[-1] + 1]
        truth.append((word, at / SAMPLE_RATE, (at + len(samples)) / SAMPLE_RATE))
        pause = np.zeros(int(rng.choice([0, 0.05, 0.1, 0.3]) * SAMPLE_RATE), dtype=np.float32)
        parts += [samples, pause]
        at += len(samples) + len(pause)
    return np.concatenate((*parts, np.zeros(4800, dtype=np.float32))), truth


@needs_espeak
def test_words_are_found_where_they_were_laid() -> None:
    core, tokenizer = load_core("nano")
    adapter = load("nano", core)
    rng = random.Random(0)
    errors = []
    for _ in range(12):
        samples, truth = spoken(rng)
        words = align(adapter, tokenizer, samples, " ".join(word for word, _, _ in truth))
        assert [word.text for word in words] == [word for word, _, _ in truth]
        errors += [(a.start - start, a.end - end) for a, (_, start, end) in zip(words, truth, strict=True)]
    error = np.abs(np.array(errors))
    assert error.mean() < 0.03 and np.quantile(error, 0.9) < 0.06


def test_the_path_is_the_likeliest_one() -> None:
    # Brute force over every path of six frames that says "5 5 3".
    torch.manual_seed(0)
    scores = torch.randn(6, 9).log_softmax(-1)
    ids, blank = [5, 5, 3], 8
    best, best_path = -np.inf, ()
    for path in torch.cartesian_prod(*[torch.tensor([3, 5, blank])] * 6).tolist():
        said = [a for a, b in zip(path, [None, *path[:-1]], strict=True) if a != b and a != blank]
        score = float(scores[range(6), path].sum())
        if said == ids and score > best:
            best, best_path = score, tuple(path)
    spans = _spans(scores, ids, blank)
    path = [blank] * 6
    for token, (start, end, _) in zip(ids, spans, strict=True):
        path[start:end] = [token] * (end - start)
    assert tuple(path) == best_path


def test_what_cannot_have_been_said_is_not_aligned(
    adapter: SpeechAdapter, core_and_tokenizer: tuple[Llama, Tokenizer]
) -> None:
    tokenizer = core_and_tokenizer[1]
    samples = chirp(0.3)
    assert align(adapter, tokenizer, samples, "") == []
    assert align(adapter, tokenizer, samples, "far too many words " * 20) == []
    for n in (1, 100, 4800):
        for word in align(adapter, tokenizer, samples[:n], "one two"):
            assert 0 <= word.start <= word.end <= n / SAMPLE_RATE and 0 < word.score <= 1
