"""The model card that is saved beside an adapter's weights."""

from __future__ import annotations

from collections.abc import Mapping

from speech_adapter.adapter import SpeechAdapter, n_tokens
from speech_adapter.audio import SAMPLE_RATE

_CARD = """# Speech adapter

{size:.2f} M parameters in bf16: log-mel (80 bands, 10 ms), a rotary Conformer of {layers} layers at 40 ms per
frame, a stride-2 adapter at 80 ms per vector. One second of sound becomes {one} vectors in the token stream
of the frozen core, ten seconds become {ten}. The adapter fits only the core whose hash config.json holds.

## Data and licences
- Free Spoken Digit Dataset, train split (its held-out speaker is never heard): CC BY-SA 4.0.
- Speech of espeak-ng (GPL-3, run at training time, nothing of it is contained here) for texts that the
  project generates: digits, short commands, questions about described scenes.
- Augmentation: speed, random equaliser, 4 kHz band limit, rooms, noise, clipping, level, silence,
  SpecAugment.

## Training
`{command}` (seed {seed}): CTC against one random vector per token, and espeak's phonemes. The core has no
part in it and stays as it is; it reads the embeddings of the tokens that are heard.

## Scores at the end of training
`digits` is a speaker of the Free Spoken Digit Dataset that no training clip is from; `commands` are commands
and questions to repeat, `questions` scene questions to answer, in espeak voices that no training clip has.
`wer_shuffled` answers each clip with another's answer.

| measure | value |
|---|---|
{rows}

## Limits
A small vocabulary of digits, shapes, colours and household words, in English. Other words come out as the
nearest known ones. Not for transcribing people's conversations.
"""


def model_card(adapter: SpeechAdapter, figures: Mapping[str, float], command: str, seed: int) -> str:
    """Markdown: what the adapter is, data and licences, command, scores, limits."""
    return _CARD.format(
        size=sum(p.numel() for p in adapter.parameters()) / 1e6,
        layers=adapter.config.n_layers,
        one=n_tokens(SAMPLE_RATE, adapter.config),
        ten=n_tokens(10 * SAMPLE_RATE, adapter.config),
        command=command,
        seed=seed,
        rows="\n".join(f"| {name} | {value:.4f} |" for name, value in figures.items()),
    )
