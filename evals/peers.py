"""Models of others on the same rows: openai-whisper as `whisper:NAME` or `whisper:PATH.pt`."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from core_llm.chat import Audio, Message
from core_llm.errors import UserError
from evals.models import Speaks

if TYPE_CHECKING:
    from whisper import Whisper

WHISPER = "whisper:"
_SAMPLE_RATE = 16_000
_WINDOW = 30 * _SAMPLE_RATE


class WhisperSubject(Speaks):
    """openai-whisper under test, as a `evals.models.Model` that transcribes.

    It is told that the speech is English, as the project's own prompt says. Greedy decoding.
    """

    def __init__(self, where: str, quantization: str | None = None) -> None:
        if quantization:
            raise UserError("--quantize is for the core of the project's own models; leave it out")
        self.name = where
        self.quantization: str | None = None

    @cached_property
    def whisper(self) -> "Whisper":
        from speech_adapter.whisper_weights import load_whisper

        return load_whisper(self.name.removeprefix(WHISPER))

    def require(self, needs: Sequence[str], task: str) -> None:
        """Raise `UserError` unless the task is a transcription, or where the weights cannot be had."""
        if tuple(needs) != ("core", "audio"):
            raise UserError(f"model '{self.name}' only transcribes speech, and task '{task}' needs more")
        self.whisper  # noqa: B018  (so that what is missing is said before any work)

    def generate(self, conversations: Sequence[Sequence[Message]], max_new_tokens: int) -> list[str]:
        """What is said in each conversation's clip; decoded as for the project's adapter, without ffmpeg."""
        from speech_adapter.audio import decode

        clips = [_clip(messages) for messages in conversations]
        samples = [decode(clip.data, clip.rate) for clip in clips]
        short = [i for i, s in enumerate(samples) if len(s) <= _WINDOW]
        texts: dict[int, str] = {}
        if short:
            texts |= dict(zip(short, self._windows([samples[i] for i in short], max_new_tokens), strict=True))
        for i, long in enumerate(samples):
            if i not in texts:
                texts[i] = str(
                    self.whisper.transcribe(long, language="en", temperature=0.0, fp16=False)["text"]
                )
        return [texts[i].strip() for i in range(len(samples))]

    def _windows(self, samples: Sequence[Any], max_new_tokens: int) -> list[str]:
        """Clips of at most 30 s, each filled up with silence, in one batch."""
        import torch
        import whisper

        sizes = self.whisper.dims
        mels = [whisper.log_mel_spectrogram(whisper.pad_or_trim(s), n_mels=sizes.n_mels) for s in samples]
        # Its own limit is half of its text window; a shorter one would be the harness's, not the model's.
        options = whisper.DecodingOptions(language="en", without_timestamps=True, fp16=False)
        found = whisper.decode(self.whisper, torch.stack(mels), options)
        return [result.text for result in found]

    def fingerprint(self, needs: Sequence[str]) -> str:
        """SHA-256 over the weights and the version of openai-whisper."""
        digest = hashlib.sha256(f"openai-whisper {version('openai-whisper')}".encode())
        digest.update(self.part_hashes["whisper"].encode())
        return digest.hexdigest()

    @cached_property
    def part_hashes(self) -> dict[str, str]:
        """SHA-256 of the weights, which decide the answers."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.whisper.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().contiguous().numpy().data)
        return {"whisper": digest.hexdigest()}


def _clip(messages: Sequence[Message]) -> Audio:
    clips = [part for message in messages for part in message.parts if isinstance(part, Audio)]
    if len(clips) != 1:
        raise UserError(f"openai-whisper transcribes one clip at a time, here are {len(clips)}")
    return clips[0]
