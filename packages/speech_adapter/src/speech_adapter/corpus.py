"""Training speech: recorded digits (Free Spoken Digit Dataset) and espeak speech of texts of the core."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core_llm.data.phrases import DIGITS, REPEAT_PROMPT, digits_phrase, question_phrase, spoken_command
from core_llm.data.scenes import KINDS, describe, questions, sample_scene
from core_llm.data.sources import load
from speech_adapter.audio import SAMPLE_RATE, decode
from speech_adapter.synthesis import HELD_OUT_VOICES, TRAIN_VOICES, Speech, Utterance, speak_all

Sampler = Callable[[random.Random], tuple[str, str, str]]  # (text to say, prompt before it, answer)


@dataclass(frozen=True, eq=False)
class Spoken:
    """A clip and what to ask about it.

    samples: int16 mono at 16 kHz. text: what is said. prompt: text before the audio. answer: what the core
    should say after hearing it. starts, phonemes: which phoneme begins when (seconds), where that is known.
    """

    samples: np.ndarray
    text: str
    prompt: str
    answer: str
    starts: np.ndarray | None = None
    phonemes: np.ndarray | None = None

    def waveform(self) -> np.ndarray:
        """float32 samples [N] in -1 to 1."""
        return self.samples.astype(np.float32) / 32768.0


@dataclass(frozen=True)
class Corpus:
    """Recorded digits by speaker, and espeak digits, commands and questions about a described scene."""

    recorded: dict[str, list[Spoken]]
    digits: list[Spoken]
    commands: list[Spoken]
    questions: list[Spoken]

    def inventory(self) -> list[str]:
        """All phonemes of the synthetic clips, and silence."""
        clips = (*self.digits, *self.commands, *self.questions)
        known = [clip.phonemes for clip in clips if clip.phonemes is not None]
        return sorted({str(name) for names in known for name in names} | {"_"})


def recorded_digits(data_root: Path | None, split: str) -> dict[str, list[Spoken]]:
    """FSDD clips of a split by speaker, each with the recognition prompt."""
    speakers: dict[str, list[Spoken]] = {}
    for row in load("fsdd", data_root, split):
        samples = np.round(decode(row.fields["audio"]) * 32767).clip(-32768, 32767).astype(np.int16)
        text = row.fields["text"]
        speakers.setdefault(str(row.group), []).append(Spoken(samples, text, REPEAT_PROMPT, text))
    return speakers


def question_about_scene(rng: random.Random) -> tuple[str, str, str]:
    """A spoken question with its scene as text: (text to say, prompt before the audio, answer)."""
    scene = sample_scene(rng, rng.choices(KINDS, (6, 3, 1))[0])
    question = questions(scene, rng, 1)[0]
    return question.text, describe(scene, rng), question.answer


def _repeat(make: Callable[[random.Random], str]) -> Sampler:
    def sample(rng: random.Random) -> tuple[str, str, str]:
        text = make(rng)
        return text, REPEAT_PROMPT, text

    return sample


def _short_digits(rng: random.Random) -> str:
    """Mostly one digit: the hardest clips are the shortest."""
    return rng.choice(DIGITS) if rng.random() < 0.6 else digits_phrase(rng)


def _command(rng: random.Random) -> str:
    """Mostly commands; some of the questions that elsewhere are answered are to be repeated, too."""
    return spoken_command(rng) if rng.random() < 0.85 else question_phrase(rng)


def synthesise(
    wanted: Sequence[tuple[Sampler, int]], seed: int, cache_dir: Path, voices: Sequence[str]
) -> list[list[Spoken]]:
    """espeak clips: for each (sampler, n), n texts with random voice, speed, pitch and intonation range."""
    rng = random.Random(seed)
    asked = [[sample(rng) for _ in range(n)] for sample, n in wanted]
    utterances = [
        Utterance(text, rng.choice(voices), rng.randint(120, 220), rng.randint(15, 85), rng.randint(20, 80))
        for rows in asked
        for text, _, _ in rows
    ]
    clips = iter(speak_all(utterances, cache_dir))
    spoken = [[_spoken(next(clips), *row) for row in rows] for rows in asked]
    return [[clip for clip in rows if len(clip.samples)] for rows in spoken]


def _spoken(speech: Speech, text: str, prompt: str, answer: str) -> Spoken:
    samples, cut = trim(speech.samples)
    return Spoken(samples, text, prompt, answer, speech.starts - cut / SAMPLE_RATE, speech.phonemes)


def trim(samples: np.ndarray, threshold: int = 160, margin_ms: int = 20) -> tuple[np.ndarray, int]:
    """Cut silence off both ends of an int16 clip: how much surrounds it is the augmentation's choice.

    Returns the clip and the number of samples cut off its beginning.
    """
    loud = np.flatnonzero(np.abs(samples.astype(np.int32)) > threshold)
    if not len(loud):
        return samples, 0
    margin = SAMPLE_RATE * margin_ms // 1000
    start = max(int(loud[0]) - margin, 0)
    return samples[start : int(loud[-1]) + margin], start


def build_corpus(data_root: Path | None, cache_dir: Path, n_synthetic: int, seed: int) -> Corpus:
    """Training speech: every FSDD clip of the train split and `n_synthetic` espeak clips."""
    recorded = recorded_digits(data_root, "train")
    n_digits, n_commands = n_synthetic * 3 // 16, n_synthetic // 2
    wanted: list[tuple[Sampler, int]] = [
        (_repeat(_short_digits), n_digits),
        (_repeat(_command), n_commands),
        (question_about_scene, n_synthetic - n_digits - n_commands),
    ]
    digits, commands, asked = synthesise(wanted, seed, cache_dir, TRAIN_VOICES)
    return Corpus(recorded, digits, commands, asked)


def held_out_commands(n: int, cache_dir: Path, seed: int = 90_002) -> list[Spoken]:
    """Commands in voices that no training clip has."""
    return synthesise([(_repeat(_command), n)], seed, cache_dir, HELD_OUT_VOICES)[0]


def held_out_questions(n: int, cache_dir: Path, seed: int = 90_001) -> list[Spoken]:
    """Questions in voices that no training clip has."""
    return synthesise([(question_about_scene, n)], seed, cache_dir, HELD_OUT_VOICES)[0]
