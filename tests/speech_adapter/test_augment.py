from dataclasses import replace

import numpy as np
import torch

from speech_adapter.augment import (
    Augmentation,
    augment,
    change_speed,
    colour,
    join,
    mask_features,
    overdrive,
    stretch_formants,
)
from speech_adapter.features import log_mel
from speech_adapter.testing import chirp

SETTINGS = Augmentation()


def energy_above(samples: np.ndarray, hertz: float) -> float:
    power = np.abs(np.fft.rfft(samples)) ** 2
    return float(power[np.fft.rfftfreq(len(samples), 1 / 16_000) > hertz].sum() / power.sum())


def test_same_seed_same_clip_other_seed_another() -> None:
    samples = chirp(0.5)
    one, two, three = (augment(samples, np.random.default_rng(s), SETTINGS)[0] for s in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert len(one) != len(three) or not np.array_equal(one, three)
    assert one.dtype == np.float32 and np.isfinite(one).all()


def test_the_shortest_clip_is_not_cut_to_nothing() -> None:
    for seed in range(5):
        samples, _ = augment(np.ones(20, np.float32), np.random.default_rng(seed), SETTINGS)
        assert len(samples) >= 16 and samples.any()


def test_silence_stays_finite() -> None:
    for seed in range(5):
        samples, _ = augment(np.zeros(1600, np.float32), np.random.default_rng(seed), SETTINGS)
        assert np.isfinite(samples).all()


def test_twice_the_speed_is_half_the_length_and_an_octave_higher() -> None:
    time = np.arange(16_000) / 16_000
    fast = change_speed(np.sin(2 * np.pi * 440 * time).astype(np.float32), 2.0)
    assert len(fast) == 8_000
    assert abs(np.argmax(np.abs(np.fft.rfft(fast))) * 16_000 / 8_000 - 880) < 3


def test_telephone_removes_what_lies_above_four_kilohertz() -> None:
    noise = np.random.default_rng(0).standard_normal(16_384).astype(np.float32)
    always = Augmentation(telephone=1.0)
    assert energy_above(colour(noise, np.random.default_rng(1), always), 4_000) < 1e-6


def test_times_move_with_the_sound() -> None:
    click = np.zeros(16_000, np.float32)
    click[8_000] = 1.0
    clean = Augmentation(reverberation=0, noise=0, telephone=0, equaliser_db=0)
    for seed in range(5):
        moved, when = augment(click, np.random.default_rng(seed), clean)
        assert abs(np.argmax(np.abs(moved)) / 16_000 - float(when(np.array(0.5)))) < 2e-3


def test_joined_clips_keep_their_order() -> None:
    low, high = (np.full(100, value, np.float32) for value in (-0.5, 0.5))
    joined = join([low, high], np.random.default_rng(0))
    assert joined[:100].max() < 0 < joined[-100:].min()


def test_stretching_moves_a_tone_to_a_lower_band_and_keeps_its_length() -> None:
    time = torch.arange(8_000) / 16_000
    features = log_mel(torch.sin(2 * torch.pi * 2_000 * time))[None]
    higher = Augmentation(tract=(1.25, 1.25))
    stretched = stretch_formants(features, np.random.default_rng(0), [higher] * len(features))
    expected = log_mel(torch.sin(2 * torch.pi * 1_600 * time))
    assert stretched.shape == features.shape
    assert abs(int(stretched[0, 20].argmax()) - int(expected[20].argmax())) <= 1
    same = stretch_formants(
        features, np.random.default_rng(0), [Augmentation(tract=(1.0, 1.0))] * len(features)
    )
    torch.testing.assert_close(same, features)


def test_masks_leave_padding_and_the_original_alone() -> None:
    features = torch.randn(2, 50, 80)
    frames = torch.tensor([50, 20])
    before = features.clone()
    masked = mask_features(features, frames, np.random.default_rng(0), [SETTINGS] * len(frames))
    assert torch.equal(features, before)
    assert torch.equal(masked[1, 20:], features[1, 20:])
    assert not torch.equal(masked, features)


def test_overdriven_clips_are_flat_where_they_were_loud() -> None:
    samples = chirp(0.3)
    settings = replace(Augmentation(), clipping_db=(6.0, 6.0))
    cut = overdrive(samples, np.random.default_rng(0), settings)
    limit = np.abs(samples).max() * 10 ** (-6 / 20)
    quiet = np.abs(samples) <= limit
    np.testing.assert_array_equal(cut[quiet], samples[quiet])
    np.testing.assert_allclose(np.abs(cut[~quiet]), limit, rtol=1e-6)
    assert 0 < quiet.sum() < len(samples)
