"""Who reads a line aloud: espeak-ng, or a neural voice through transformers, behind one protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from core_llm.errors import UserError
from speech_adapter.synthesis import (
    HELD_OUT_VOICES,
    INSTALL_HINT,
    TRAIN_TIMBRES,
    TRAIN_VOICES,
    SynthesisError,
    Utterance,
    available,
    check_voices,
    speak_one,
)

NEURAL = "hf:"  # begins the name of a neural voice


@dataclass(frozen=True)
class Line:
    """What to say and how; `seed` is for speakers that draw at random."""

    utterance: Utterance
    seed: int


class Speaker(Protocol):
    """Reads lines aloud. Two speakers of the same name say the same line with the same samples.

    fresh: how it sounds depends on what its process said before, so every chunk needs a process of its own.
    """

    fresh: bool

    def speak(self, line: Line) -> tuple[np.ndarray, int]:
        """int16 mono samples [N] and their rate in Hz; N is 0 where there is nothing to say."""
        ...


class EspeakSpeaker:
    """espeak-ng through `synthesis`: many voices, speeds and pitches; robotic, and exact."""

    fresh = True  # the flutter of the voices runs on from line to line

    def speak(self, line: Line) -> tuple[np.ndarray, int]:
        """See `Speaker`."""
        return speak_one(line.utterance, line.seed)


class NeuralSpeaker:
    """A text-to-speech model of transformers that needs text alone (VITS, MMS): a hub id or a local folder.

    The utterance's speed changes the speaking rate where the model has one (VITS); pitch and range do
    nothing. A model with several speakers takes the number behind the last "#" of the voice.
    """

    fresh = False

    def __init__(self, name: str) -> None:
        """Raises `SynthesisError` where transformers or the model is missing."""
        try:
            from transformers import pipeline
        except ImportError:
            raise SynthesisError(
                "no neural voices: install them with pip install 'speech-adapter[neural]'"
            ) from None
        if name.startswith((".", "/")) and not Path(name).is_dir():
            raise SynthesisError(f"{name}: no such folder with a text-to-speech model")
        try:
            build: Any = pipeline  # its overloads know no "text-to-speech", which the library takes
            self.pipeline = build("text-to-speech", model=name)
        except Exception as error:  # the library raises many kinds; all mean that there is no such model
            reason = str(error).strip().splitlines()
            raise SynthesisError(
                f"{name}: cannot be loaded as a text-to-speech model "
                f"({type(error).__name__}: {reason[0] if reason else ''}); "
                "check the spelling and the network, or give a local folder"
            ) from error
        self.model: Any = self.pipeline.model
        self.rate_of_model = float(getattr(self.model, "speaking_rate", 1.0))

    def speak(self, line: Line) -> tuple[np.ndarray, int]:
        """See `Speaker`."""
        import torch

        torch.manual_seed(line.seed)
        if hasattr(self.model, "speaking_rate"):
            self.model.speaking_rate = self.rate_of_model * line.utterance.speed / Utterance.speed
        _, number = _model_and_number(line.utterance.voice)
        options = {} if number is None else {"speaker_id": number}
        said = self.pipeline(line.utterance.text, forward_params=options)
        samples = np.asarray(said["audio"], dtype=np.float32).reshape(-1)
        samples = np.nan_to_num(samples) / max(1.0, float(np.abs(samples).max(initial=0.0)))
        return np.round(samples * 32767).astype(np.int16), int(said["sampling_rate"])

    def voices(self) -> tuple[str, ...]:
        """One per speaker of the model."""
        n = int(getattr(self.model.config, "num_speakers", 1) or 1)
        return tuple(f"#{i}" for i in range(n)) if n > 1 else ("",)


def speaker(voice: str) -> Speaker:
    """The speaker of a voice by its name; a model is loaded once per process."""
    if voice.startswith(NEURAL):
        return _neural(_model_and_number(voice)[0])
    return EspeakSpeaker()


@cache
def _neural(name: str) -> NeuralSpeaker:
    return NeuralSpeaker(name)


def _model_and_number(voice: str) -> tuple[str, int | None]:
    """ "hf:MODEL#3" → ("MODEL", 3); without a number, None."""
    name, mark, number = voice.removeprefix(NEURAL).rpartition("#")
    return (name, int(number)) if mark and number.isdigit() else (voice.removeprefix(NEURAL), None)


def chosen_voices(names: str, language: str) -> tuple[Sequence[str], Sequence[str]]:
    """Voices for training and voices held apart from it.

    names: "train", "held-out", a list of espeak voices with commas, or "hf:" with a model, all of whose
    speakers take part unless "#" and a number name one. language: of the
    texts; for another than English the accents of the training voices give way to it. Raises
    `SynthesisError` where the voice or what speaks it is missing.
    """
    if names.startswith(NEURAL):
        name, number = _model_and_number(names)
        known = _neural(name).voices()
        if number is None:
            return [names + voice for voice in known], []
        if f"#{number}" not in known:
            raise UserError(f"{names}: the model has {len(known)} speakers, numbered from 0")
        return [names], []
    if not available():
        raise SynthesisError(INSTALL_HINT)
    train: Sequence[str] = TRAIN_VOICES
    apart: Sequence[str] = HELD_OUT_VOICES
    if language != "en":
        train = [language + timbre for timbre in TRAIN_TIMBRES]
        apart = sorted({f"{language}+{voice.partition('+')[2]}" for voice in HELD_OUT_VOICES})
        check_voices([language])
    if names == "train":
        return train, apart
    if names == "held-out":
        return [], apart
    listed = [name.strip() for name in names.split(",") if name.strip()]
    if not listed:
        raise UserError("--voice is empty: give train, held-out, espeak voices, or hf:MODEL")
    check_voices(listed)
    return listed, []
