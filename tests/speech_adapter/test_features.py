import numpy as np
import torch
import torchaudio
import whisper

from speech_adapter.features import N_MELS, level_scale, log_mel, mel_filters, n_frames, whisper_scale
from speech_adapter.testing import chirp


def test_mel_filters_equal_torchaudios_slaney_filters() -> None:
    fbanks = torchaudio.functional.melscale_fbanks
    theirs = fbanks(201, 0.0, 8000.0, N_MELS, 16_000, norm="slaney", mel_scale="slaney")
    torch.testing.assert_close(mel_filters(), theirs.T, atol=2e-6, rtol=2e-4)


def test_log_mel_equals_whispers() -> None:
    samples = torch.from_numpy(chirp(1.3))
    theirs = whisper.log_mel_spectrogram(samples, n_mels=N_MELS).T
    torch.testing.assert_close(whisper_scale(log_mel(samples)), theirs, atol=2e-5, rtol=0)


def test_one_frame_per_ten_milliseconds() -> None:
    for n in (400, 479, 480, 16_000, 16_159):
        assert log_mel(torch.zeros(n)).shape == (n_frames(n), N_MELS)


def test_level_scale_ignores_the_recording_level() -> None:
    samples = torch.from_numpy(chirp(0.5))
    loud, quiet = (level_scale(log_mel(samples * gain), 6.0) for gain in (1.0, 0.05))
    torch.testing.assert_close(loud, quiet, atol=1e-3, rtol=0)
    assert loud.max() == 1.0 and loud.min() >= -1.0


def test_silence_is_the_lowest_level() -> None:
    assert torch.equal(level_scale(log_mel(torch.zeros(1600)), 6.0), torch.full((10, N_MELS), -1.0))


def test_bf16_autocast_does_not_reach_the_features() -> None:
    samples = torch.from_numpy(chirp(0.5))
    with torch.autocast("cpu", torch.bfloat16):
        inside = log_mel(samples)
    np.testing.assert_array_equal(inside.numpy(), log_mel(samples).numpy())
