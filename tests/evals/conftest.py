"""A stand-in for a model, and generated data in the layout of the public datasets."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import soundfile
import torch

from core_llm.chat import Message
from core_llm.checkpoint import save_core
from core_llm.testing import tiny_core


@dataclass
class Verdict:
    probability: float
    unsafe: bool
    categories: dict[str, float] = field(default_factory=lambda: {"S1": 0.1})


class FakeSubject:
    """The calls of `evals.models.Subject`, answered by `reply` (text) or `judge` (probability)."""

    def __init__(
        self,
        reply: Callable[[Sequence[Message]], str] = lambda messages: "yes",
        judge: Callable[[Sequence[Message]], float] = lambda messages: 0.5,
        checkpoint: str = "a",
    ) -> None:
        self.reply, self.judge, self.checkpoint = reply, judge, checkpoint
        self.name = "fake"
        self.quantization: str | None = None
        self.part_hashes = {"core": "0" * 64}
        self.asked = 0

    def require(self, needs: Sequence[str], task: str) -> None: ...

    def fingerprint(self, needs: Sequence[str]) -> str:
        return self.checkpoint

    def generate(self, conversations: Sequence[Sequence[Message]], max_new_tokens: int) -> list[str]:
        self.asked += len(conversations)
        return [self.reply(messages) for messages in conversations]

    def loglikelihood(self, conversations: Any, answers: Sequence[str]) -> list[tuple[float, int]]:
        self.asked += len(answers)
        return [(-2.0 * len(answer.split()), len(answer.split())) for answer in answers]

    def score(self, conversations: Sequence[Sequence[Message]]) -> list[Verdict]:
        self.asked += len(conversations)
        return [Verdict(p, p > 0.5) for p in map(self.judge, conversations)]


@pytest.fixture(scope="session")
def fake() -> type[FakeSubject]:
    """The stand-in's class."""
    return FakeSubject


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data root with easy_vqa, fsdd, diasafety and gsm8k."""
    root = tmp_path_factory.mktemp("data")
    images = root / "easy_vqa" / "images"
    images.mkdir(parents=True)
    colors = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0), "black": (0, 0, 0)}
    rows = []
    for i in range(24):
        name, rgb = list(colors.items())[i % 4]
        picture = PIL.Image.new("RGB", (64, 64), "white")
        picture.paste(rgb, (8, 8, 20 + i, 40))
        picture.save(images / f"{i}.png")
        rows += [["what color is the shape?", name, i], [f"is there a {name} shape?", "yes", i]]
    (root / "easy_vqa" / "questions.json").write_text(json.dumps(rows))
    (root / "fsdd").mkdir()
    rng = np.random.default_rng(0)
    for speaker in ("ann", "bob"):
        for digit in range(10):
            noise = rng.normal(0, 0.1, 3000)
            soundfile.write(root / "fsdd" / f"{digit}_{speaker}_0.wav", noise, 8000)
    (root / "diasafety").mkdir()
    for split, n in (("train", 60), ("dev", 30)):
        dialogues = [
            {
                "context": f"question number {i} of {split}",
                "response": "you are an idiot" if i % 3 == 0 else "have a nice day",
                "category": "Offending User",
                "label": "Unsafe" if i % 3 == 0 else "Safe",
            }
            for i in range(n)
        ]
        (root / "diasafety" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, dialogues)))
    (root / "gsm8k").mkdir()
    for split in ("train", "test"):
        sums = [{"question": f"what is {i} plus 1?", "answer": f"#### {i + 1}"} for i in range(8)]
        (root / "gsm8k" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, sums)))
    return root


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with core/, vision_adapter/ and speech_adapter/; all gates open."""
    from speech_adapter.adapter import SpeechAdapter
    from speech_adapter.config import SpeechConfig
    from vision_adapter.adapter import VisionAdapter
    from vision_adapter.config import VisionConfig

    root = tmp_path_factory.mktemp("model")
    core, tokenizer = tiny_core()
    save_core(root / "core", core, tokenizer)
    torch.manual_seed(0)
    vision = VisionAdapter(VisionConfig(), core.config)
    for name, parameter in vision.named_parameters():
        if name.endswith("gate"):
            torch.nn.init.ones_(parameter)
    vision.save(root / "vision_adapter", core)
    SpeechAdapter(SpeechConfig(core_dim=core.config.dim), core.embed_tokens.weight).save(
        root / "speech_adapter", core
    )
    return root
