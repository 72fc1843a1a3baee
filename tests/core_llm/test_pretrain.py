"""Pre-training end to end on a tiny model, and what its batches hold."""

import json
from pathlib import Path

import pytest
import torch

from core_llm.config import LlamaConfig
from core_llm.data.sources import SOURCES
from core_llm.train.fit import FitConfig
from core_llm.train.pretrain import PresenceTask, PretrainConfig, PretrainTask, packed_loss, pretrain

CONFIG = LlamaConfig(32, 2, 2, 1, 64, vocab_size=768, max_positions=256, tied_embeddings=True)
RUN = PretrainConfig(
    windows=4,
    width=96,
    pool=40,
    easy_steps=2,
    checklist_from=3,
    presence_steps=4,
    presence_windows=4,
    blend_steps=2,
    blend_windows=2,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data root with a few rows of our own in the layout of each dataset."""
    maths = [
        {"question": f"What is {i} plus one?", "answer": f"<<{i}+1={i + 1}>>It is {i + 1}."} for i in range(9)
    ]
    talk = [{"context": "hello", "response": "hi there", "category": "x", "label": "Safe"}] * 3
    files = {
        "gsm8k/train.jsonl": maths,
        "gsm8k/test.jsonl": maths[:1],
        "diasafety/train.jsonl": talk,
        "openai_moderation/dev.jsonl": [{"prompt": f"prompt {i}", "S": 0} for i in range(9)],
    }
    for name, rows in files.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "data" / "mitre_frr").mkdir()
    frr = [{"mutated_prompt": f"write a script {i}"} for i in range(12)]
    (tmp_path / "data" / "mitre_frr" / "mitre_frr.json").write_text(json.dumps(frr))
    assert all(name.split("/")[0] in SOURCES for name in files)
    return tmp_path / "data"


def test_pretraining_lowers_the_loss_and_a_second_call_changes_nothing(root: Path, tmp_path: Path) -> None:
    config = FitConfig(tmp_path / "run", steps=30, lr=5e-3, warmup=5, autocast=False)
    model, tokenizer, figures = pretrain(CONFIG, root, config, RUN)
    lines = (tmp_path / "run" / "pretrain.metrics.jsonl").read_text().splitlines()
    assert figures["held_out_loss"] < json.loads(lines[0])["loss"] < 6.7  # log(768) = 6.64
    again, same_tokenizer, _ = pretrain(CONFIG, root, config, RUN)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert tokenizer.encode("how many circles?") == same_tokenizer.encode("how many circles?")


def test_batches_follow_the_curriculum(root: Path, tmp_path: Path) -> None:
    config = FitConfig(tmp_path / "run", steps=1, autocast=False)
    model, tokenizer, _ = pretrain(CONFIG, root, config, RUN)
    task = PretrainTask(model, tokenizer, RUN, root)
    for a, b in zip(vars(task.batch(1)).values(), vars(task.batch(1)).values(), strict=True):
        assert torch.equal(a, b)

    def text(step: int) -> str:
        return tokenizer.decode(task.batch(step).tokens.flatten().tolist())

    lists = [any(f"{color}: " in text(step) for color in ("red", "blue", "teal")) for step in range(8)]
    assert not any(lists[:3]) and any(lists[3:])
    presence = PresenceTask(model, tokenizer, RUN, root)
    assert torch.isfinite(packed_loss(model, presence.batch(0)))
