"""Training under torchrun: two processes give what one gives, whatever the shares are."""

import json
import runpy
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core_llm import processes
from core_llm.errors import UserError
from core_llm.testing import torchrun
from core_llm.train.shares import rows, share, weighed

# A task whose loss is a mean over unequally many targets per row, whose parameters do not all take part in
# each share, and one of whose parameters never does.
SCRIPT = """
    import sys
    from collections.abc import Mapping
    from dataclasses import dataclass
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from core_llm import processes
    from core_llm.train.fit import FitConfig, fit


    @dataclass(frozen=True, eq=False)
    class Batch:
        step: int
        x: Tensor
        counts: list[int]


    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 1)
            self.special, self.unused = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(2, 2))


    class Uneven:
        name = "uneven"

        def __init__(self, crash_at=-1):
            torch.manual_seed(processes.rank())  # the first process's weights must win
            self.model, self.crash_at = Model(), crash_at

        def modules(self):
            return {"model": self.model}

        def parameter_groups(self):
            return [{"params": list(self.model.parameters())}]

        def batch(self, step):
            if step == self.crash_at:
                raise KeyboardInterrupt
            x = torch.randn(7, 3, generator=torch.Generator().manual_seed(step))
            return Batch(step, x, [1, 5, 2, 0, 0, 3, 1])

        def weight(self, batch):
            return float(sum(batch.counts))

        def loss(self, batch):
            seen = self.model.last(torch.tanh(self.model.first(batch.x)))[:, 0]
            if batch.counts[0] == 1:  # of the first row alone, which one process has
                seen = torch.cat([seen[:1] * self.model.special, seen[1:]])
            counts = torch.tensor(batch.counts, dtype=torch.float)
            return (counts * (seen - batch.x.sum(-1)).square()).sum() / counts.sum(), {"rows": len(batch.x)}

        def evaluate(self):
            return {"norm": sum(p.square().sum() for p in self.model.parameters()).item()}


    out = Path(sys.argv[1])
    # Without autocast: a bf16 product over seven rows is rounded elsewhere than two over three and four.
    config = dict(steps=12, save_every=4, log_every=1, warmup=2, lr=1e-2, autocast=False)
    processes.start()
    fit(Uneven(), FitConfig(out / "whole", **config))
    try:
        fit(Uneven(crash_at=6), FitConfig(out / "broken", **config))
    except KeyboardInterrupt:
        pass
    fit(Uneven(), FitConfig(out / "broken", **config))
    (out / f"rank{processes.rank()}").write_text("done")
"""


def metrics(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_processes_train_as_one_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    for count in ("1", "2"):
        (tmp_path / count).mkdir()
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "1")])
    runpy.run_path(str(script), run_name="__main__")
    torchrun(script, tmp_path / "2")
    assert (tmp_path / "2" / "rank1").exists() and not (tmp_path / "1" / "rank1").exists()
    one, two = (metrics(tmp_path / n / "whole" / "uneven.metrics.jsonl") for n in ("1", "2"))
    assert len(one) == len(two) == 13  # one process writes
    for a, b in zip(one[:-1], two[:-1], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
    # Rows 0-2 hold 8 targets of 12, rows 3-6 the others: figures are weighed as the loss is.
    assert two[0]["rows"] == pytest.approx((8 * 3 + 4 * 4) / 12)
    states = {
        (n, kind): torch.load(tmp_path / n / kind / "uneven.state.pt", weights_only=True)
        for n in ("1", "2")
        for kind in ("whole", "broken")
    }
    expected = states["1", "whole"]["modules"]["model"]
    assert torch.equal(expected["unused"], torch.ones(2, 2))
    for key, state in states.items():
        for name, tensor in state["modules"]["model"].items():
            assert torch.allclose(tensor, expected[name], atol=1e-5), (key, name)
    for n in ("1", "2"):  # resumed from step 4, bit for bit
        whole, broken = states[n, "whole"]["modules"]["model"], states[n, "broken"]["modules"]["model"]
        assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert states["2", "whole"]["rng"].shape[0] == 2


@dataclass(frozen=True, eq=False)
class Columns:
    step: int
    x: Tensor
    names: list[str]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_are_the_whole_in_order(count: int) -> None:
    x = torch.arange(10).view(5, 2)
    names = list("abcde")
    for batch in (x, names, (x, x + 1), {"x": x, "names": names}, Columns(3, x, names)):
        parts = [share(batch, rank, count) for rank in range(count)]
        assert sum(rows(part) for part in parts) == 5 == rows(batch)
        assert max(map(rows, parts)) - min(map(rows, parts)) <= 1
    shares = [share(Columns(3, x, names), rank, count) for rank in range(count)]
    assert [name for part in shares for name in part.names] == names
    named = [share({"x": x, "names": names}, rank, count) for rank in range(count)]
    assert [name for part in named for name in part["names"]] == names
    assert torch.equal(torch.cat([part["x"] for part in named]), x)
    assert torch.equal(torch.cat([part.x for part in shares]), x) and {part.step for part in shares} == {3}


def test_a_batch_that_cannot_be_split_says_so() -> None:
    with pytest.raises(UserError, match="batch of 2 cannot be split over 3"):
        share([1, 2], 0, 3)
    with pytest.raises(ValueError, match="no single number of rows"):
        rows((torch.zeros(2), torch.zeros(3)))
    with pytest.raises(ValueError, match="type str"):
        rows("text")


def test_a_program_that_runs_alone_is_left_alone() -> None:
    batch: Any = object()  # not even looked at
    assert weighed(None, batch) == (batch, 1.0)
    assert (processes.count(), processes.rank(), processes.is_writer()) == (1, 0, True)
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    weight.sum().backward()
    before = weight.grad
    processes.sum_gradients([weight])
    assert weight.grad is before and processes.gathered(4) == [4]
    figures = {"a": 1.0}
    assert processes.weighted_means(figures, 0.0) == figures
    assert processes.all_rows(weight) is weight
    with processes.writer_first():
        pass
