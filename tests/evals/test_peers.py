"""openai-whisper as the model under test: a tiny one with random weights, through the harness."""

from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

from core_llm.chat import Audio, Message, Text
from core_llm.errors import UserError
from evals import run, runner
from evals.models import open_model
from evals.tasks import Options, find, registry
from evals.tasks.speech import TRANSCRIPT_METRICS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    from whisper.model import ModelDimensions, Whisper

    torch.manual_seed(0)
    sizes = ModelDimensions(80, 1500, 16, 2, 1, 51_864, 16, 16, 2, 1)
    path = tmp_path_factory.mktemp("whisper") / "tiny-random.pt"
    torch.save({"dims": vars(sizes), "model_state_dict": Whisper(sizes).state_dict()}, path)
    return f"whisper:{path}"


def spoken(seconds: float, rate: int = 16_000) -> list[Message]:
    noise = np.random.default_rng(0).standard_normal(int(seconds * rate)).astype(np.float32) * 0.1
    return [Message("user", (Text("Repeat after me in English:"), Audio(noise, rate)))]


def test_answers_are_openai_whispers_own(checkpoint: str) -> None:
    import whisper

    subject = open_model(checkpoint)
    conversations = [spoken(0.5), spoken(2.0, 8_000), spoken(1.0)]
    answers = subject.generate(conversations, max_new_tokens=16)
    model = whisper.load_model(checkpoint.removeprefix("whisper:"), device="cpu")
    for i in (0, 2):
        clip = conversations[i][0].parts[1]
        assert isinstance(clip, Audio) and isinstance(clip.data, np.ndarray)
        mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(clip.data))
        options = whisper.DecodingOptions(language="en", without_timestamps=True, fp16=False)
        assert answers[i] == whisper.decode(model, mel, options).text.strip()


def test_a_clip_of_more_than_thirty_seconds_is_transcribed_in_windows(checkpoint: str) -> None:
    subject = open_model(checkpoint)
    short, long = spoken(0.5), spoken(31.0)
    answers = subject.generate([long, short], max_new_tokens=16)
    assert len(answers) == 2 and answers[1] == subject.generate([short], 16)[0]


def test_a_speech_task_runs_on_whisper_and_is_resumed(checkpoint: str, tmp_path: Path) -> None:
    task = registry()["spoken-digits"]
    done = runner.evaluate(task, open_model(checkpoint), Options(limit=2), tmp_path)
    assert set(done.scored.estimates) == set(TRANSCRIPT_METRICS)
    assert done.scored.estimates["wer"].value > 0
    again = runner.evaluate(task, open_model(checkpoint), Options(limit=2), tmp_path)
    assert again.reused > 0 and again.outputs == done.outputs


def test_other_tasks_and_quantisation_are_refused(checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only transcribes"):
        run.run_tasks(find(["spoken-scenes"]), checkpoint, Options(limit=1), tmp_path / "records")
    with pytest.raises(UserError, match="--quantize"):
        open_model(checkpoint, quantization="int8")
    assert not (tmp_path / "records").exists()


def test_without_weights_one_line_says_where_to_put_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"put tiny\.pt into .*whisper:PATH\.pt") as caught:
        run.run_tasks(find(["spoken-digits"]), "whisper:tiny", Options(limit=1), tmp_path / "records")
    assert "\n" not in str(caught.value) and not (tmp_path / "records").exists()
