"""Learning to answer sound through a frozen core: recognition, translation, spoken questions.

Axes: N answer tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from core_llm.adapters import Assistant
from core_llm.errors import DataError
from core_llm.model import Llama
from core_llm.sampling import Sampling
from core_llm.tokenizer import Tokenizer
from core_llm.train.answers import answer_logits, n_answer_tokens
from speech_adapter.adapter import SpeechAdapter
from speech_adapter.examples import Asked
from speech_adapter.recording import RecordingAdapter
from speech_adapter.scores import word_error_rates
from speech_adapter.stages.clips import Clip, ClipTask
from speech_adapter.stages.presets import StageConfig


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student) of logits [N, V] divided by T, nats, summed over N (arXiv 1503.02531)."""
    return temperature**2 * F.kl_div(
        (student / temperature).log_softmax(-1),
        (teacher / temperature).log_softmax(-1),
        reduction="sum",
        log_target=True,
    )


class SFTTask(ClipTask[Asked]):
    """Encoder and adapter learn; the core never changes.

    loss = (1 - kl_weight) · cross-entropy + kl_weight · distance from what the core says when it reads the
    text in place of the sound + ctc_weight · CTC against the core's tokens. The first two are means over
    answer tokens, the last over clips.
    """

    name = "sft"

    def __init__(
        self,
        core: Llama,
        tokenizer: Tokenizer,
        adapter: SpeechAdapter,
        items: Sequence[Asked],
        held_out: Sequence[Asked],
        config: StageConfig,
        seed: int = 0,
    ) -> None:
        if not items:
            raise DataError("nothing to learn: no recording has a text, a translation or an answer")
        if config.kl_weight:
            silent = next((item for item in items if not item.example.text), None)
            if silent is not None:
                raise DataError(f"{silent.example.id}: distillation needs the text of every recording")
        super().__init__(adapter, items, held_out, config, seed)
        adapter.requires_grad_(True)
        adapter.reader.requires_grad_(config.ctc_weight > 0)
        self.core, self.tokenizer = core.requires_grad_(False), tokenizer
        self.reading = Assistant(core, tokenizer)

    def weight(self, batch: Sequence[Clip[Asked]]) -> float:
        """Answer tokens."""
        return float(n_answer_tokens(self.reading, [clip.item.written() for clip in batch]))

    def part_loss(
        self, clips: Sequence[Clip[Asked]], total: float, share: float
    ) -> tuple[Tensor, dict[str, float]]:
        """What a micro-batch adds to the mean per answer token; its parts are logged."""
        config = self.config
        view = RecordingAdapter(self.adapter, lambda inputs: self.masked(inputs, clips))
        listening = Assistant(self.core, self.tokenizer, [view])
        logits, tokens, _ = answer_logits(listening, [clip.item.conversation(clip.audio) for clip in clips])
        spoken = F.cross_entropy(logits, tokens, reduction="sum") / total
        loss, figures = (1 - config.kl_weight) * spoken, {"answer_loss": spoken.item()}
        if config.kl_weight:
            with torch.no_grad():
                written, same, _ = answer_logits(self.reading, [clip.item.written() for clip in clips])
            assert torch.equal(tokens, same)
            kl = distillation(logits, written, config.temperature) / total
            loss, figures["kl"] = loss + config.kl_weight * kl, kl.item()
        if config.ctc_weight and any(clip.example.text for clip in clips):
            known = sum(bool(clip.example.text) for clip in clips) / len(clips)
            ctc = self._ctc(view, clips) * known * share  # a clip without text counts as zero
            loss, figures["ctc_loss"] = loss + config.ctc_weight * ctc, ctc.item()
        return loss, figures

    def _ctc(self, view: RecordingAdapter, clips: Sequence[Clip[Asked]]) -> Tensor:
        memory = view.memory
        assert memory is not None
        known = [i for i, clip in enumerate(clips) if clip.example.text]
        targets = [self.tokenizer.encode(f" {clips[i].example.text}") for i in known]
        return self.adapter.reader.loss(memory.vectors[known], memory.lengths[known], targets)

    def evaluate(self) -> dict[str, float]:
        """Held-out loss, word error rates of answers and of exchanged answers, share of exact ones."""
        found = super().evaluate()
        if len(self.held_out) < 2:
            return found
        answering = Assistant(self.core, self.tokenizer, [self.adapter])
        wanted = [clip.item.answer for clip in self.held_out]
        longest = max(len(self.tokenizer.encode(answer)) for answer in wanted)
        answers = []
        for clip in self.held_out:
            asked = clip.item.conversation(clip.audio)[:-1]
            answers += answering.generate([asked], Sampling(max_new_tokens=2 * longest + 8))
        return {
            **found,
            **{f"held_out_{name}": rate for name, rate in word_error_rates(wanted, answers).items()},
            "held_out_exact": sum(map(str.__eq__, wanted, answers)) / len(wanted),
        }
