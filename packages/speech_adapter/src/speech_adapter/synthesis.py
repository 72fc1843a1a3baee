"""Text to speech with espeak-ng, for training data and for asking questions by voice.

espeak-ng (GPL-3) is an optional dependency: the package `espeakng-loader` brings the library and its voices,
and this module only talks to it at run time through ctypes. Its state is global in a process (one voice, one
callback), so calls are serialised here and parallel work uses processes (`speak_all`).
"""

from __future__ import annotations

import ctypes
import hashlib
import multiprocessing
import os
import sys
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from core_llm.errors import UserError

Job = TypeVar("Job")
Done = TypeVar("Done")
INSTALL_HINT = "no speech synthesis: install it with pip install 'speech-adapter[espeak]'"

_TRAIN_ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-us-nyc", "en-gb-x-gbclan", "en-gb-x-gbcwmd")
TRAIN_TIMBRES = (
    "", "+m1", "+m2", "+m3", "+m5", "+m6", "+m8", "+f1", "+f2", "+f4", "+f5", "+klatt", "+klatt3",
    "+Alex", "+Alicia", "+Andrea", "+Annie", "+Gene", "+Hugo", "+Jacky", "+Lee", "+Marco", "+Michael",
    "+Denis", "+adam", "+anika", "+belinda", "+benjamin", "+boris", "+caleb", "+david", "+ed",
    "+edward", "+grandma", "+ian", "+iven", "+john", "+linda", "+max", "+norbert", "+paul", "+quincy",
    "+rob", "+steph", "+travis", "+zac",
)  # fmt: skip
TRAIN_VOICES: tuple[str, ...] = tuple(a + t for t in TRAIN_TIMBRES for a in _TRAIN_ACCENTS)
# No timbre and, in half of them, no accent of these is used in training.
HELD_OUT_VOICES: tuple[str, ...] = (
    "en-us+m4", "en-us+f3", "en+m7", "en+f3", "en-us+steph2", "en+robert",
    "en-gb-scotland+m4", "en-gb-scotland+f3", "en-029+m7", "en-029+shelby",
)  # fmt: skip


class SynthesisError(UserError):
    """Speech cannot be synthesised: the optional dependency or the voice is missing."""


@dataclass(frozen=True)
class Utterance:
    """What to say and how: speed in words per minute (80 to 450), pitch and range in 0 to 99."""

    text: str
    voice: str = "en-us"
    speed: int = 165
    pitch: int = 50
    range: int = 50

    def key(self) -> str:
        """Name of this utterance in a cache folder."""
        fields = "\0".join(map(str, (self.text, self.voice, self.speed, self.pitch, self.range)))
        return hashlib.sha256(fields.encode()).hexdigest()[:24]

    def seed(self) -> int:
        """Of the noise in some voices, where nobody chooses one: the same for the same utterance."""
        return int(self.key()[:7], 16)


@dataclass(frozen=True, eq=False)
class Speech:
    """A spoken utterance: int16 mono samples [N], and which phoneme begins at which time in seconds [K].

    Phonemes are espeak's mnemonics without stress marks; "_" is silence.
    """

    samples: np.ndarray
    starts: np.ndarray
    phonemes: np.ndarray


class _Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h; `text` is its union, which holds a phoneme's mnemonic."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("milliseconds", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("text", ctypes.c_char * 8),
    ]


_lock = threading.Lock()
_SYNCHRONOUS, _UTF8, _PHONEME_EVENTS = 2, 1, 1
_RATE, _PITCH, _RANGE = 1, 3, 4
_END_OF_EVENTS, _PHONEME = 0, 7
_STRESS_AND_LENGTH = "',=%:|"
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


class _Engine:
    """The initialised library of this process, and what the running synthesis has given so far."""

    def __init__(self, library_path: str, data_path: str) -> None:
        self.library = ctypes.CDLL(library_path)
        self.chunks: list[np.ndarray] = []
        self.phonemes: list[tuple[float, str]] = []
        path = _short_path(data_path).encode()
        self.rate = self.library.espeak_Initialize(_SYNCHRONOUS, 0, path, _PHONEME_EVENTS)
        if self.rate <= 0:
            raise SynthesisError("espeak-ng cannot read its voices: reinstall espeakng-loader")
        # Kept as an attribute: the library holds only a raw pointer to it.
        self.callback = _CALLBACK(self._collect)
        self.library.espeak_SetSynthCallback(self.callback)
        self.library.espeak_Synth.argtypes = [
            ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint,
            ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip

    def _collect(
        self, samples: "ctypes._Pointer[ctypes.c_short]", count: int, events: "ctypes._Pointer[_Event]"
    ) -> int:
        if samples and count > 0:
            self.chunks.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        i = 0
        while events and events[i].type != _END_OF_EVENTS:
            if events[i].type == _PHONEME:
                mnemonic = events[i].text.decode(errors="replace")
                # Lengthening and stress do not make another sound.
                bare = mnemonic.strip(_STRESS_AND_LENGTH) or "_"
                self.phonemes.append((events[i].sample / self.rate, "_" if bare.startswith("_") else bare))
            i += 1
        return 0

    def choose(self, voice: str) -> None:
        """Speak in this voice from now on."""
        if self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            known = ", ".join(HELD_OUT_VOICES)
            raise SynthesisError(f"unknown espeak voice '{voice}'; try one of {known}")

    def speak(self, utterance: Utterance, seed: int) -> np.ndarray:
        """int16 samples [N] at `self.rate`; the phonemes are left in `self.phonemes`."""
        self.library.espeak_ng_SetRandSeed(seed & 0x7FFFFFFF)  # else the clock seeds the noise of some voices
        self.choose(utterance.voice)
        settings = ((_RATE, utterance.speed), (_PITCH, utterance.pitch), (_RANGE, utterance.range))
        for parameter, value in settings:
            self.library.espeak_SetParameter(parameter, int(value), 0)
        self.chunks, self.phonemes = [], []
        data = utterance.text.encode() + b"\0"
        if self.library.espeak_Synth(data, len(data), 0, 0, 0, _UTF8, None, None) != 0:
            raise SynthesisError(f"espeak-ng could not speak: {utterance.text!r}")
        return np.concatenate(self.chunks) if self.chunks else np.zeros(0, dtype=np.int16)


def _short_path(path: str) -> str:
    """espeak-ng cuts its data path at 160 characters: reach a deep virtual environment through a link."""
    if len(path.encode()) < 140:
        return path
    link = Path(tempfile.gettempdir()) / f"espeak-{hashlib.sha256(path.encode()).hexdigest()[:12]}"
    if not link.exists():
        temporary = link.with_name(f"{link.name}.{os.getpid()}")
        temporary.symlink_to(path)
        temporary.replace(link)
    return str(link)


@cache
def _engine() -> _Engine:
    try:
        import espeakng_loader
    except ImportError:
        raise SynthesisError(INSTALL_HINT) from None
    return _Engine(espeakng_loader.get_library_path(), espeakng_loader.get_data_path())


def available() -> bool:
    """Whether espeak-ng is installed and loads."""
    try:
        _engine()
    except (SynthesisError, OSError):
        return False
    return True


def check_voices(voices: Sequence[str]) -> None:
    """Raise SynthesisError that names a voice which espeak-ng does not have."""
    with _lock:
        for voice in voices:
            _engine().choose(voice)


def speak(text: str, voice: str = "en-us", speed: int = 165, pitch: int = 50) -> tuple[np.ndarray, int]:
    """Speak `text`: float32 mono samples [N] in -1 to 1 and the sample rate (22,050 Hz).

    espeak's flutter depends on what the process spoke before: a repetition differs by some milliseconds.
    Raises SynthesisError when espeak-ng is not installed or does not know the voice.
    """
    with _lock:
        engine = _engine()
        utterance = Utterance(text, voice, speed, pitch)
        samples = engine.speak(utterance, utterance.seed())
        return samples.astype(np.float32) / 32768.0, engine.rate


def speak_one(utterance: Utterance, seed: int) -> tuple[np.ndarray, int]:
    """int16 mono samples [N] and their rate; like `speak`, with range, and empty where nothing is said.

    seed: of the noise of some voices. The flutter of others still runs on from what this process said before.
    """
    with _lock:
        engine = _engine()
        return engine.speak(utterance, seed), engine.rate


def _speak_at(utterance: Utterance, rate: int) -> Speech:
    import soxr

    with _lock:
        engine = _engine()
        samples = engine.speak(utterance, utterance.seed())
        phonemes = list(engine.phonemes)
    resampled = soxr.resample(samples, engine.rate, rate) if len(samples) else samples
    starts = np.array([start for start, _ in phonemes], dtype=np.float32)
    return Speech(resampled, starts, np.array([name for _, name in phonemes], dtype="U8"))


def speak_all(
    utterances: Sequence[Utterance], cache_dir: Path, rate: int = 16_000, processes: int = 2, chunk: int = 500
) -> list[Speech]:
    """Speak many utterances at `rate` samples per second, with a progress bar.

    The same utterances in the same order give the same samples. Finished chunks stay in `cache_dir` as .npz
    files, so a second call only reads them, and an interrupted one continues. Processes, not threads:
    espeak's state is global.
    """
    from tqdm import tqdm

    if not available():
        raise SynthesisError(INSTALL_HINT)
    cache_dir.mkdir(parents=True, exist_ok=True)
    chunks = [utterances[i : i + chunk] for i in range(0, len(utterances), chunk)]
    files = [cache_dir / f"{_chunk_key(part, rate)}.npz" for part in chunks]
    todo = [
        (part, rate, file) for part, file in zip(chunks, files, strict=True) if not _intact(file, len(part))
    ]
    if todo:
        # The voices' flutter runs on from clip to clip: only a fresh library speaks a chunk the same way
        # every time.
        done = in_processes(_write_chunk, todo, processes, fresh=True)
        for _ in tqdm(done, total=len(todo), desc="synthesis", unit="chunk", mininterval=2.0):
            pass
    return [speech for file in files for speech in _read_chunk(file)]


def in_processes(
    function: Callable[[Job], Done], jobs: Sequence[Job], workers: int, fresh: bool
) -> Iterator[Done]:
    """function(job) of every job, in any order, in `workers` processes at a time; `fresh`: one for each job.

    What a job raises is raised here; SynthesisError where a process dies.
    """
    # spawn: a forked copy of a process that already uses torch's threads can hang.
    pool_of = partial(ProcessPoolExecutor, mp_context=multiprocessing.get_context("spawn"))

    def alone(job: Job) -> Done:
        with pool_of(1) as pool:
            return pool.submit(function, job).result()

    workers = max(1, min(workers, len(jobs)))
    with ThreadPoolExecutor(workers) if fresh else pool_of(workers) as pool:
        running = [pool.submit(alone if fresh else function, job) for job in jobs]
        try:
            for each in as_completed(running):
                yield each.result()
        except BrokenProcessPool:
            raise SynthesisError(
                "a process that speaks has died: out of memory, or called from a script without "
                "`if __name__ == '__main__':`; what is finished is kept"
            ) from None
        finally:
            for each in running:
                each.cancel()


def _chunk_key(utterances: Sequence[Utterance], rate: int) -> str:
    return hashlib.sha256("".join(u.key() for u in utterances).encode() + str(rate).encode()).hexdigest()[:24]


def _write_chunk(job: tuple[Sequence[Utterance], int, Path]) -> None:
    utterances, rate, file = job
    spoken = [_speak_at(utterance, rate) for utterance in utterances]
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        np.savez(
            stream,
            lengths=np.array([(len(s.samples), len(s.starts)) for s in spoken], dtype=np.int64),
            samples=np.concatenate([s.samples for s in spoken]),
            starts=np.concatenate([s.starts for s in spoken]),
            phonemes=np.concatenate([s.phonemes for s in spoken]),
        )
    temporary.replace(file)


def _intact(file: Path, n: int) -> bool:
    """Whether a file of n utterances can be read; a damaged one is named, and will be spoken again."""
    if not file.exists():
        return False
    try:
        if len(_read_chunk(file)) == n:
            return True
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        pass
    print(f"warning: {file}: damaged, it is spoken again", file=sys.stderr, flush=True)
    return False


def _read_chunk(file: Path) -> list[Speech]:
    with np.load(file, allow_pickle=False) as data:
        sample_ends, phoneme_ends = np.cumsum(data["lengths"], axis=0)[:-1].T
        return [
            Speech(*parts)
            for parts in zip(
                np.split(data["samples"], sample_ends),
                np.split(data["starts"], phoneme_ends),
                np.split(data["phonemes"], phoneme_ends),
                strict=True,
            )
        ]
