import json
from pathlib import Path

import numpy as np
import pytest

from speech_adapter.audio import SAMPLE_RATE, decode
from speech_adapter.augment import coloured_noise
from speech_adapter.vad import VadSettings, VoiceActivity, runs, smooth, speech_segments

SAMPLES = Path(__file__).parents[2] / "evals" / "samples"
CLIPS = [row["file"] for rows in json.loads((SAMPLES / "clips.json").read_text()).values() for row in rows]


def spoken_frames(samples: np.ndarray) -> np.ndarray:
    """Which 10 ms of a clean clip are speech: within 40 dB of the loudest, holes below 200 ms closed."""
    power = np.square(samples[: len(samples) // 160 * 160].reshape(-1, 160)).mean(axis=1)
    speech = power > 1e-4 * power.max()
    for start, end in runs(~speech):
        if start > 0 and end < len(speech) and end - start < 20:
            speech[start:end] = True
    return speech


def scene(seed: int, snr_db: float | None, seconds: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Clips at known times with pauses of 0.3 to 2 s in coloured noise: samples and the truth per 10 ms."""
    rng = np.random.default_rng(seed)
    samples, truth = np.zeros(seconds * SAMPLE_RATE, dtype=np.float32), np.zeros(seconds * 100, dtype=bool)
    at = int(rng.uniform(0, 50))
    while True:
        clip = decode(SAMPLES / CLIPS[rng.integers(len(CLIPS))])
        speech = spoken_frames(clip)
        if at + len(speech) + 50 > len(truth):
            break
        samples[at * 160 : at * 160 + len(clip)] = clip
        truth[at : at + len(speech)] = speech
        at += len(speech) + int(rng.uniform(30, 200))
    if snr_db is not None:
        power = np.square(samples[np.repeat(truth, 160)]).mean()
        samples = samples + coloured_noise(len(samples), rng) * np.sqrt(power / 10 ** (snr_db / 10))
    return samples, truth


def found_frames(samples: np.ndarray) -> np.ndarray:
    found = np.zeros(len(samples) // 160, dtype=bool)
    for start, end in speech_segments(samples):
        found[round(start * 100) : round(end * 100)] = True
    return found


@pytest.mark.parametrize("snr_db, recall", [(None, 0.95), (20, 0.95), (10, 0.93), (5, 0.90)])
def test_speech_is_found_at_known_times(snr_db: float | None, recall: float) -> None:
    hits = wrong = missed = 0
    for seed in (0, 1, 2):
        samples, truth = scene(seed, snr_db)
        found = found_frames(samples)
        hits += int((found & truth).sum())
        wrong += int((found & ~truth).sum())
        missed += int((~found & truth).sum())
        assert all(found[start:end].any() for start, end in runs(truth)), "an utterance was not found at all"
    assert hits / (hits + missed) > recall
    assert hits / (hits + wrong) > 0.93


def test_the_level_does_not_matter() -> None:
    samples, truth = scene(0, 20)
    for level in (1e-4, 30.0):
        found = found_frames(samples * np.float32(level))
        assert (found == truth).mean() > 0.94


def test_noise_silence_and_hum_are_not_speech() -> None:
    time = np.arange(20 * SAMPLE_RATE) / SAMPLE_RATE
    white = np.random.default_rng(0).standard_normal(len(time)).astype(np.float32)
    brown = coloured_noise(len(time), np.random.default_rng(1))
    hum = np.sin(2 * np.pi * 100 * time).astype(np.float32)
    for sound in (white, brown, hum, np.zeros_like(white)):
        assert speech_segments(sound) == []


def test_decisions_do_not_depend_on_how_the_samples_are_fed() -> None:
    samples, _ = scene(3, 15, seconds=10)
    samples = samples[: len(samples) - 77]
    whole = VoiceActivity()
    expected = np.concatenate((whole.feed(samples), whole.finish()))
    assert len(expected) == -(-len(samples) // 160)
    for size in (50, 160, 1234, 40_000):
        detector = VoiceActivity()
        parts = [detector.feed(samples[i : i + size]) for i in range(0, len(samples), size)]
        np.testing.assert_array_equal(np.concatenate((*parts, detector.finish())), expected)


@pytest.mark.parametrize("n", [0, 1, 159, 160, 161, 3000])
def test_short_sounds_have_one_decision_per_started_frame(n: int) -> None:
    detector = VoiceActivity()
    assert len(detector.feed(np.ones(n, dtype=np.float32))) + len(detector.finish()) == -(-n // 160)


def test_smoothing_removes_clicks_and_closes_holes() -> None:
    raw = np.zeros(200, dtype=bool)
    raw[50:53] = True  # 30 ms: a click
    raw[100:120] = raw[130:150] = True  # a hole of 100 ms
    settings = VadSettings(padding_ms=20)
    assert runs(smooth(raw, settings)) == [(98, 152)]
    assert not raw[98] and raw[50]  # the argument stays as it was
