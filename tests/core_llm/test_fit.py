"""The training loop: exact resume, frozen parts, clear failures."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core_llm.errors import CheckpointError, UserError
from core_llm.train.fit import FitConfig, fit, learning_rate


class Line:
    """Fit a line; optionally stop (as a crash would) at a step."""

    name = "line"

    def __init__(self, crash_at: int = -1, poison: bool = False) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.crash_at, self.poison = crash_at, poison

    def modules(self) -> Mapping[str, nn.Module]:
        return {"model": self.model}

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters())}]

    def batch(self, step: int) -> Tensor:
        if step == self.crash_at:
            raise KeyboardInterrupt
        return torch.randn(16, 3, generator=torch.Generator().manual_seed(step))

    def loss(self, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        loss = (self.model(batch)[:, 0].float() - batch.sum(-1)).square().mean()
        return loss * float("nan") if self.poison else loss, {}

    def evaluate(self) -> dict[str, float]:
        x = torch.eye(3)
        return {"error": (self.model(x)[:, 0] - 1).square().mean().item()}


def test_interrupted_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = Line()
    fit(whole, FitConfig(tmp_path / "a", steps=30, save_every=10))
    with pytest.raises(KeyboardInterrupt):
        fit(Line(crash_at=17), FitConfig(tmp_path / "b", steps=30, save_every=10))
    resumed = Line()
    fit(resumed, FitConfig(tmp_path / "b", steps=30, save_every=10))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters()):
        assert torch.equal(a, b)


def test_training_lowers_the_error_and_logs_it(tmp_path: Path) -> None:
    task = Line()
    before = task.evaluate()["error"]
    after = fit(task, FitConfig(tmp_path, steps=200, lr=2e-2, log_every=50))["error"]
    lines = [json.loads(line) for line in (tmp_path / "line.metrics.jsonl").read_text().splitlines()]
    assert after < 0.3 * before and lines[-1]["error"] == after and "loss" in lines[0]


def test_loss_that_is_no_number_stops_with_advice(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lower --lr"):
        fit(Line(poison=True), FitConfig(tmp_path, steps=3))


def test_state_of_another_run_or_a_corrupt_one_is_refused(tmp_path: Path) -> None:
    fit(Line(), FitConfig(tmp_path, steps=4))
    with pytest.raises(CheckpointError, match="with steps 4, not 5"):
        fit(Line(), FitConfig(tmp_path, steps=5))
    with pytest.raises(CheckpointError, match=r"with lr 0.001, not 0.01"):
        fit(Line(), FitConfig(tmp_path, steps=4, lr=0.01))
    state = tmp_path / "line.state.pt"
    state.write_bytes(state.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        fit(Line(), FitConfig(tmp_path, steps=4))


def test_learning_rate_warms_up_and_decays_to_its_floor() -> None:
    config = FitConfig(Path("."), steps=100, lr=1.0, warmup=10, final_lr_fraction=0.1)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 and rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
