"""Training of the nano speech adapter: CTC against a random vector per token, and espeak's phonemes.

What is heard becomes the core's own embeddings of the tokens (`EmbeddingCTC.denoise`), so that the core has
no part in the training, and what was learned serves every core of the same width and tokenizer. Training
through a core, as the Llama 3 paper does it, is `stages.sft`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core_llm import processes
from core_llm.adapters import Assistant
from core_llm.chat import Audio, Message, Text
from core_llm.checkpoint import core_hash, load_core
from core_llm.data.rows import spread
from core_llm.model import Llama
from core_llm.sampling import Sampling
from core_llm.tokenizer import Tokenizer
from core_llm.train.fit import FitConfig, fit
from speech_adapter.adapter import SpeechAdapter, SpeechInputs, SpeechMemory, create
from speech_adapter.audio import SAMPLE_RATE
from speech_adapter.augment import Augmentation, augment, join, mask_features, stretch_formants
from speech_adapter.card import model_card
from speech_adapter.corpus import (
    Corpus,
    Spoken,
    build_corpus,
    held_out_commands,
    held_out_questions,
    recorded_digits,
)
from speech_adapter.ctc import PhonemeHead
from speech_adapter.scores import word_error_rates

GENTLE = Augmentation(
    speed=(0.9, 1.12), equaliser_db=3.0, telephone=0.1, reverberation=0.05, noise=0.25,
    noise_snr_db=(15.0, 40.0), clipping=0.1, tract=(0.94, 1.07), frequency_masks=1, time_masks=0,
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What a batch holds and how the two losses are weighed; steps and learning rate are FitConfig's."""

    codes: int = 0  # seed of the random vectors
    recorded: int = 12  # clips of each kind per two steps: many small steps teach more than few large ones
    digits: int = 4
    commands: int = 11
    questions: int = 6
    join_probability: float = 0.4  # of a recorded digit: followed by one to three more
    n_synthetic: int = 16_000
    max_seconds: float = 4.5
    augmentation: Augmentation = field(default_factory=Augmentation)  # of recorded clips
    gentle: Augmentation = GENTLE  # of most synthetic ones: their voices differ enough
    rough_share: float = 0.3  # of the synthetic clips: augmented like recorded ones; all digits are


@dataclass(frozen=True, eq=False)
class Example:
    """An augmented clip; `starts` are its phonemes' in the augmented waveform (seconds)."""

    clip: Spoken
    waveform: np.ndarray
    starts: np.ndarray | None
    augmentation: Augmentation


@dataclass(frozen=True, eq=False)
class SpeechBatch:
    """Augmented clips with their texts."""

    step: int
    examples: list[Example]


class SpeechTask:
    """A `core_llm.train.fit.Task`: hear phonemes and tokens, whatever core will read them."""

    name = "speech"

    def __init__(
        self,
        adapter: SpeechAdapter,
        core: Llama,
        tokenizer: Tokenizer,
        corpus: Corpus,
        held_out: Mapping[str, Sequence[Spoken]],
        recipe: Recipe,
        seed: int,
    ) -> None:
        self.adapter, self.core, self.tokenizer = adapter, core, tokenizer
        self.corpus, self.held_out, self.recipe, self.seed = corpus, held_out, recipe, seed
        self.phonemes = PhonemeHead(adapter.encoder.width, corpus.inventory())
        self._pair: tuple[int, list[Example]] | None = None
        self.recorded = [(speaker, clips) for speaker, clips in sorted(corpus.recorded.items())]

    def modules(self) -> Mapping[str, nn.Module]:
        """What a resume restores."""
        return {"adapter": self.adapter, "phonemes": self.phonemes}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Adapter and phoneme head; the core has none here."""
        return [{"params": [p for module in self.modules().values() for p in module.parameters()]}]

    def batch(self, step: int) -> SpeechBatch:
        """Augmented clips; depends on seed and step only.

        Two steps share one draw of clips, sorted by length: the short half and the long half. Padding then
        costs half as much as in mixed batches.
        """
        if self._pair is None or self._pair[0] != step // 2:
            self._pair = (step // 2, self._draw(step // 2))
        drawn = self._pair[1]
        lengths = [len(example.waveform) for example in drawn]
        # As many padded seconds in one half as in the other.
        costs = [i * lengths[i - 1] - (len(drawn) - i) * lengths[-1] for i in range(1, len(drawn))]
        middle = 1 + int(np.argmin(np.abs(costs)))
        return SpeechBatch(step, drawn[:middle] if step % 2 == 0 else drawn[middle:])

    def _draw(self, pair: int) -> list[Example]:
        """Clips of all kinds for two steps, augmented, shortest first."""
        rng = np.random.default_rng((self.seed, pair))
        recipe = self.recipe
        clips = [(self._recorded(rng), 1.0) for _ in range(recipe.recorded)]
        for kind, n, rough in (
            (self.corpus.digits, recipe.digits, 1.0),
            (self.corpus.commands, recipe.commands, recipe.rough_share),
            (self.corpus.questions, recipe.questions, recipe.rough_share),
        ):
            clips += [(kind[int(i)], rough) for i in rng.integers(0, len(kind), n)]
        examples = [self._example(clip, rough, rng) for clip, rough in clips]
        limit = recipe.max_seconds * SAMPLE_RATE
        return sorted((e for e in examples if len(e.waveform) <= limit), key=lambda e: len(e.waveform))

    def _example(self, clip: Spoken, rough: float, rng: np.random.Generator) -> Example:
        chosen = self.recipe.augmentation if rng.random() < rough else self.recipe.gentle
        waveform, moved = augment(clip.waveform(), rng, chosen)
        return Example(clip, waveform, None if clip.starts is None else moved(clip.starts), chosen)

    def _recorded(self, rng: np.random.Generator) -> Spoken:
        _, own = self.recorded[int(rng.integers(len(self.recorded)))]
        first = own[int(rng.integers(len(own)))]
        if rng.random() >= self.recipe.join_probability:
            return first
        clips = [first] + [own[int(i)] for i in rng.integers(0, len(own), int(rng.integers(1, 4)))]
        text = " ".join(clip.text for clip in clips)
        samples = np.round(join([clip.waveform() for clip in clips], rng) * 32767).astype(np.int16)
        return Spoken(samples, text, first.prompt, text)

    def loss(self, batch: SpeechBatch) -> tuple[Tensor, dict[str, float]]:
        """CTC over tokens plus cross-entropy over phonemes."""
        memory = self.adapter.encode(self._inputs(batch))
        targets = [self.tokenizer.encode(" " + example.clip.text) for example in batch.examples]
        ctc = self.adapter.reader.loss(memory.vectors, memory.lengths, targets)
        phonemes = self.phonemes.loss(memory.hidden, self._labels(batch, memory))
        return ctc + phonemes, {"ctc_loss": ctc.item(), "phoneme_loss": phonemes.item()}

    def _inputs(self, batch: SpeechBatch) -> SpeechInputs:
        rng = np.random.default_rng((self.seed, batch.step, 1))
        settings = [example.augmentation for example in batch.examples]
        inputs = self.adapter.preprocess([Audio(e.waveform, SAMPLE_RATE) for e in batch.examples])
        stretched = stretch_formants(inputs.log_mel, rng, settings)
        return SpeechInputs(mask_features(stretched, inputs.frames, rng, settings), inputs.frames)

    def _labels(self, batch: SpeechBatch, memory: SpeechMemory) -> list[list[int] | None]:
        offset = self.adapter.config.edge_ms / 1000
        labels: list[list[int] | None] = []
        for example, n in zip(batch.examples, memory.stacked.tolist(), strict=True):
            known = example.clip.phonemes
            if example.starts is None or known is None:
                labels.append(None)
            else:
                labels.append(self.phonemes.labels(example.starts, known, n, offset))
        return labels

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out clips, each with the name of its set."""
        figures: dict[str, float] = {}
        for name, clips in self.held_out.items():
            figures.update({f"{name}_{key}": value for key, value in self.score(clips).items()})
        return figures

    def score(self, clips: Sequence[Spoken], size: int = 50) -> dict[str, float]:
        """Word error rates of greedy CTC, the answers, answers to shuffled clips; share of exact answers."""
        import jiwer

        assistant = Assistant(self.core, self.tokenizer, [self.adapter])
        heard: list[str] = []
        answers: list[str] = []
        for i in range(0, len(clips), size):
            parts = [Audio(clip.waveform(), SAMPLE_RATE) for clip in clips[i : i + size]]
            memory = self.adapter.encode(self.adapter.preprocess(parts))
            spelled = self.adapter.reader.decode(memory.vectors, memory.lengths)
            heard += [self.tokenizer.decode(ids).strip() for ids in spelled]
            asked = [conversation(*pair)[:-1] for pair in zip(clips[i : i + size], parts, strict=True)]
            answers += assistant.generate(asked, Sampling(max_new_tokens=24))
        wanted = [clip.answer for clip in clips]
        return {
            "ctc_wer": jiwer.wer([clip.text for clip in clips], heard),
            **word_error_rates(wanted, answers),
            "accuracy": float(np.mean([a.lower() == w for a, w in zip(answers, wanted, strict=True)])),
        }


def conversation(clip: Spoken, audio: Audio) -> list[Message]:
    """Prompt and sound from the user, answer from the assistant."""
    return [Message("user", (Text(clip.prompt), audio)), Message("assistant", clip.answer)]


def train(
    core_dir: str,
    data_root: Path | None,
    out: Path,
    steps: int,
    lr: float,
    seed: int,
    recipe: Recipe | None = None,
    encoder: str = "conformer",
) -> dict[str, float]:
    """Train an adapter for a core and save it under `out`; returns held-out figures.

    `encoder` as in `adapter.create`. Raises UserError when espeak or the dataset is missing, or the core's
    files are damaged.
    """
    recipe = recipe or Recipe()
    core, tokenizer = load_core(core_dir)
    create(encoder, core)  # what is wrong with it is said before any work
    before = core_hash(core)
    cache_dir = out / "speech_cache"
    with processes.writer_first():  # of several processes one speaks, and the others read what it left
        corpus = build_corpus(data_root, cache_dir, recipe.n_synthetic, seed)
        questions, commands = held_out_questions(150, cache_dir), held_out_commands(150, cache_dir)
    unseen = [clip for own in recorded_digits(data_root, "dev").values() for clip in own]
    held_out = {"digits": spread(unseen, 200), "commands": commands, "questions": questions}
    torch.manual_seed(seed)
    adapter = create(encoder, core, codes=recipe.codes)
    task = SpeechTask(adapter, core, tokenizer, corpus, held_out, recipe, seed)
    config = FitConfig(
        out=out, steps=steps, lr=lr, warmup=min(150, steps // 5 + 1), save_every=400, seed=seed
    )
    figures = fit(task, config)
    if core_hash(core) != before:
        raise RuntimeError("training changed the frozen core")
    shown = core_dir if core_dir == "nano" else "DIR"  # no path of this machine in a published card
    command = f"speech-adapter train --core {shown} --steps {steps} --lr {lr:g} --seed {seed}"
    if encoder != "conformer":
        command += f" --encoder whisper:{Path(encoder.removeprefix('whisper:')).name}"
    adapter.save(out, core, model_card(adapter, figures, command, seed))
    return figures
