"""Which device a name means, alone and under torchrun."""

import pytest
import torch
import torch.distributed as dist

from core_llm import processes
from core_llm.devices import chosen_device
from core_llm.errors import UserError


def pretend(monkeypatch: pytest.MonkeyPatch, gpus: int, here: int = 1, rank: int = 0) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if here > 1:
        for name, value in {"WORLD_SIZE": here, "LOCAL_WORLD_SIZE": here, "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, str(value))


def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, gpus=0)
    assert chosen_device("auto") == chosen_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="no CUDA GPU.*--device cpu"):
        chosen_device("cuda")


def test_a_gpu_is_taken_where_there_is_one_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    backends: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: taken[-1] if taken else 0)
    monkeypatch.setattr(dist, "init_process_group", backends.append)
    monkeypatch.setattr(processes.atexit, "register", lambda function: None)
    pretend(monkeypatch, gpus=1)
    assert chosen_device("auto") == chosen_device("cuda") == torch.device("cuda", 0)
    assert not backends  # alone there is nothing to join
    pretend(monkeypatch, gpus=2, here=2, rank=1)
    assert chosen_device("auto") == torch.device("cuda", 1)
    assert taken == [1] and backends == ["cpu:gloo,cuda:nccl"]
    pretend(monkeypatch, gpus=1, here=2, rank=1)  # the second process has none: all stay on the CPU
    assert chosen_device("auto") == torch.device("cpu")
    processes.start()
    assert taken == [1] and backends[-1] == "gloo"
    with pytest.raises(UserError, match="for each process"):
        chosen_device("cuda")
