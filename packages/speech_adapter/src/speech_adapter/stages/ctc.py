"""CTC warm-up: the encoder learns to spell, or encoder and adapter learn to say the core's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from core_llm.errors import DataError
from core_llm.tokenizer import Tokenizer
from speech_adapter.adapter import SpeechAdapter
from speech_adapter.ctc import CharacterCTC
from speech_adapter.examples import Example
from speech_adapter.scores import word_error_rates
from speech_adapter.stages.clips import Clip, ClipTask
from speech_adapter.stages.presets import StageConfig


class CTCTask(ClipTask[Example]):
    """Characters train the encoder under a head that is thrown away; tokens train the adapter too."""

    name = "ctc"

    def __init__(
        self,
        tokenizer: Tokenizer,
        adapter: SpeechAdapter,
        items: Sequence[Example],
        held_out: Sequence[Example],
        config: StageConfig,
        seed: int = 0,
    ) -> None:
        known = [item for item in items if item.text]
        if not known:
            raise DataError("no recording has a text: CTC needs what is said")
        super().__init__(adapter, known, [item for item in held_out if item.text], config, seed)
        self.tokenizer = tokenizer
        self.characters: CharacterCTC | None = None
        adapter.requires_grad_(config.units == "tokens")
        adapter.encoder.requires_grad_(True)
        if config.units == "characters":
            torch.manual_seed(seed)  # fixes the head
            alphabet = sorted({character for item in known for character in item.text.lower()})
            self.characters = CharacterCTC(adapter.encoder.width, alphabet).to(self.device)
        else:
            for boundary in (adapter.projector.begin, adapter.projector.end):
                boundary.requires_grad_(False)  # CTC does not see them

    def modules(self) -> Mapping[str, nn.Module]:
        """Adapter, and the head of characters."""
        head = {} if self.characters is None else {"characters": self.characters}
        return {"adapter": self.adapter, **head}

    def part_loss(
        self, clips: Sequence[Clip[Example]], total: float, share: float
    ) -> tuple[Tensor, dict[str, float]]:
        """Mean over clips of the nats per character or token."""
        inputs = self.features(clips)
        texts = [clip.example.text for clip in clips]
        if self.characters is not None:
            encoded = self.adapter.encoder.encode(inputs.log_mel, inputs.frames)
            loss = self.characters.loss(encoded.hidden, encoded.lengths, texts)
        else:
            memory = self.adapter.encode(inputs)
            targets = [self.tokenizer.encode(f" {text}") for text in texts]
            loss = self.adapter.reader.loss(memory.vectors, memory.lengths, targets)
        return loss * share, {}

    def heard(self, clips: Sequence[Clip[Example]]) -> list[str]:
        """What greedy decoding spells."""
        inputs = self.features(clips)
        if self.characters is not None:
            encoded = self.adapter.encoder.encode(inputs.log_mel, inputs.frames)
            return self.characters.decode(encoded.hidden, encoded.lengths)
        memory = self.adapter.encode(inputs)
        spelled = self.adapter.reader.decode(memory.vectors, memory.lengths)
        return [self.tokenizer.decode(ids).strip() for ids in spelled]

    def evaluate(self) -> dict[str, float]:
        """Loss, character and word error rate on held-out clips, and the latter with the clips shuffled."""
        found = super().evaluate()
        if not found:
            return found
        import jiwer

        said = [clip.example.text.lower() for clip in self.held_out]
        heard = [self.heard([clip])[0].lower() for clip in self.held_out]
        return {
            **found,
            "held_out_cer": jiwer.cer(said, heard),
            **{f"held_out_{name}": rate for name, rate in word_error_rates(said, heard).items()},
        }
