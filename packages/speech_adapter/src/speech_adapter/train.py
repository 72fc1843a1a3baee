"""Training of the speech adapter on a frozen core.

First CTC alone (`warmup_steps`): the outputs learn to be the embeddings of what is said. Then the core's own
loss on recognition and on spoken questions, with CTC beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core_llm.adapters import Assistant, Spans
from core_llm.chat import Audio, Message, Text
from core_llm.checkpoint import core_hash, load_core
from core_llm.model import Llama
from core_llm.sampling import Sampling
from core_llm.tokenizer import Tokenizer
from core_llm.train.fit import FitConfig, fit
from speech_adapter.adapter import SpeechAdapter, SpeechInputs, SpeechMemory
from speech_adapter.audio import SAMPLE_RATE
from speech_adapter.augment import Augmentation, augment, join, mask_features
from speech_adapter.config import SpeechConfig
from speech_adapter.corpus import (
    Corpus,
    Spoken,
    build_corpus,
    held_out_questions,
    interleaved,
    recorded_digits,
)
from speech_adapter.ctc import EmbeddingCTC, PhonemeHead


@dataclass(frozen=True)
class Recipe:
    """What a batch holds and how the two losses are weighed; steps and learning rate are FitConfig's."""

    warmup_fraction: float = 0.5  # of all steps: CTC alone
    ctc_weight: float = 0.3  # beside the core's loss
    recorded: int = 18  # clips of each kind per two steps
    digits: int = 10
    phrases: int = 6
    questions: int = 18
    join_probability: float = 0.4  # of a recorded digit: followed by one to three more
    n_synthetic: int = 16_000
    max_seconds: float = 4.5
    augmentation: Augmentation = field(default_factory=Augmentation)


@dataclass(frozen=True, eq=False)
class Example:
    """An augmented clip; `starts` are its phonemes' in the augmented waveform (seconds)."""

    clip: Spoken
    waveform: np.ndarray
    starts: np.ndarray | None


@dataclass(frozen=True, eq=False)
class SpeechBatch:
    """Augmented clips with their texts."""

    step: int
    examples: list[Example]


class RecordingAdapter:
    """An Adapter that masks features and keeps the encoded clips, so that CTC needs no second pass."""

    part: type = Audio

    def __init__(self, adapter: SpeechAdapter, rng: np.random.Generator, settings: Augmentation) -> None:
        self.adapter = adapter
        self.rng = rng
        self.settings = settings
        self.memory: SpeechMemory | None = None

    def preprocess(self, parts: Sequence[Any]) -> SpeechInputs:
        """Features under SpecAugment."""
        inputs = self.adapter.preprocess(parts)
        masked = mask_features(inputs.log_mel, inputs.frames, self.rng, self.settings)
        return SpeechInputs(masked, inputs.frames)

    def encode(self, inputs: SpeechInputs) -> SpeechMemory:
        """Encode and remember."""
        self.memory = self.adapter.encode(inputs)
        return self.memory

    def place(self, memory: SpeechMemory) -> list[Tensor]:
        """As the adapter does."""
        return self.adapter.place(memory)

    def interleave(self, memory: SpeechMemory, spans: Spans) -> Mapping[int, Any]:
        """As the adapter does."""
        return self.adapter.interleave(memory, spans)


class SpeechTask:
    """A `core_llm.train.fit.Task`: only the adapter and the CTC blank are trained."""

    name = "speech"

    def __init__(
        self,
        adapter: SpeechAdapter,
        core: Llama,
        tokenizer: Tokenizer,
        corpus: Corpus,
        held_out: Mapping[str, Sequence[Spoken]],
        recipe: Recipe,
        steps: int,
        seed: int,
    ) -> None:
        self.adapter, self.core, self.tokenizer = adapter, core, tokenizer
        self.corpus, self.held_out, self.recipe, self.seed = corpus, held_out, recipe, seed
        self.warmup_steps = round(steps * recipe.warmup_fraction)
        self.ctc = EmbeddingCTC(core.embed_tokens.weight)
        self.phonemes = PhonemeHead(adapter.config.dim, corpus.inventory())
        self._pair: tuple[int, list[Example]] | None = None
        self.recorded = [(speaker, clips) for speaker, clips in sorted(corpus.recorded.items())]

    def modules(self) -> Mapping[str, nn.Module]:
        """What a resume restores."""
        return {"adapter": self.adapter, "ctc": self.ctc, "phonemes": self.phonemes}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Adapter and blank; the core is frozen."""
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
        clips = [self._recorded(rng) for _ in range(recipe.recorded)]
        for kind, n in (
            (self.corpus.digits, recipe.digits),
            (self.corpus.phrases, recipe.phrases),
            (self.corpus.questions, recipe.questions),
        ):
            clips += [kind[int(i)] for i in rng.integers(0, len(kind), n)]
        examples = [self._example(clip, rng) for clip in clips]
        limit = recipe.max_seconds * SAMPLE_RATE
        return sorted((e for e in examples if len(e.waveform) <= limit), key=lambda e: len(e.waveform))

    def _example(self, clip: Spoken, rng: np.random.Generator) -> Example:
        waveform, moved = augment(clip.waveform(), rng, self.recipe.augmentation)
        return Example(clip, waveform, None if clip.starts is None else moved(clip.starts))

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
        """CTC alone during warm-up, then the core's cross-entropy plus weighted CTC."""
        rng = np.random.default_rng((self.seed, batch.step, 1))
        view = RecordingAdapter(self.adapter, rng, self.recipe.augmentation)
        parts = [Audio(example.waveform, SAMPLE_RATE) for example in batch.examples]
        figures: dict[str, float] = {}
        total = torch.zeros(())
        if batch.step < self.warmup_steps:
            view.encode(view.preprocess(parts))
            weight = 1.0
        else:
            assistant = Assistant(self.core, self.tokenizer, [view])
            pairs = zip(batch.examples, parts, strict=True)
            total = assistant.loss([conversation(example.clip, part) for example, part in pairs])
            figures["core_loss"] = total.item()
            weight = self.recipe.ctc_weight
        assert view.memory is not None
        targets = [self.tokenizer.encode(" " + example.clip.text) for example in batch.examples]
        ctc = self.ctc.loss(view.memory.vectors, view.memory.lengths, targets)
        phonemes = self.phonemes.loss(view.memory.hidden, self._labels(batch, view.memory))
        figures.update(ctc_loss=ctc.item(), phoneme_loss=phonemes.item())
        return total + weight * (ctc + phonemes), figures

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
        """Word error rates (CTC and core) and accuracy of answers on held-out clips."""
        figures: dict[str, float] = {}
        for name, clips in self.held_out.items():
            figures.update({f"{name}_{key}": value for key, value in self._score(clips).items()})
        return figures

    def _score(self, clips: Sequence[Spoken], size: int = 50) -> dict[str, float]:
        import jiwer

        assistant = Assistant(self.core, self.tokenizer, [self.adapter])
        heard: list[str] = []
        answers: list[str] = []
        for i in range(0, len(clips), size):
            part = [(clip, Audio(clip.waveform(), SAMPLE_RATE)) for clip in clips[i : i + size]]
            memory = self.adapter.encode(self.adapter.preprocess([audio for _, audio in part]))
            spelled = self.ctc.decode(memory.vectors, memory.lengths)
            heard += [self.tokenizer.decode(ids).strip() for ids in spelled]
            asked = [conversation(clip, audio)[:-1] for clip, audio in part]
            answers += assistant.generate(asked, Sampling(max_new_tokens=24))
        texts, wanted = [clip.text for clip in clips], [clip.answer for clip in clips]
        shuffled = answers[1:] + answers[:1] if len(set(wanted)) > 1 else answers
        right = [answer.lower() == clip.answer for answer, clip in zip(answers, clips, strict=True)]
        return {
            "ctc_wer": jiwer.wer(texts, heard),
            "wer": jiwer.wer(wanted, answers),
            "wer_shuffled": jiwer.wer(wanted, shuffled),
            "accuracy": float(np.mean(right)),
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
) -> dict[str, float]:
    """Train an adapter for a core and save it under `out`; returns held-out figures.

    Raises UserError when espeak or the dataset is missing, or the core's files are damaged.
    """
    recipe = recipe or Recipe()
    core, tokenizer = load_core(core_dir)
    before = core_hash(core)
    cache_dir = out / "speech_cache"
    corpus = build_corpus(data_root, cache_dir, recipe.n_synthetic, seed)
    held_out = {
        "digits": interleaved(recorded_digits(data_root, "dev"), 200),
        "questions": held_out_questions(150, cache_dir),
    }
    torch.manual_seed(seed)
    scale = float(core.embed_tokens.weight.std())
    adapter = SpeechAdapter(SpeechConfig(core_dim=core.config.dim, output_scale=scale))
    task = SpeechTask(adapter, core, tokenizer, corpus, held_out, recipe, steps, seed)
    figures = fit(task, FitConfig(out=out, steps=steps, lr=lr, warmup=min(100, steps // 5 + 1), seed=seed))
    if core_hash(core) != before:
        raise RuntimeError("training changed the frozen core")
    adapter.save(out, core)
    return figures
