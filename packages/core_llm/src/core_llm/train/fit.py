"""The one training loop. A new method is a new Task, never a copied loop."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from torch import Tensor, nn

from core_llm import processes
from core_llm.errors import CheckpointError, UserError
from core_llm.kernels.steps import multiplies_bf16
from core_llm.train.shares import weighed

_RANK_SEED = 1_000_003  # between the seeds of two processes


class Task(Protocol):
    """What is trained, on what, and how well it does."""

    name: str

    def modules(self) -> Mapping[str, nn.Module]:
        """Modules whose state a resume restores."""
        ...

    def parameter_groups(self) -> list[dict[str, Any]]:
        """AdamW groups: {"params": [...]} with optional "lr_scale" and "weight_decay"."""
        ...

    def batch(self, step: int) -> Any:
        """The batch of a step: a pure function of the step, which makes every resume exact.

        Under torchrun it is split over the processes, see `shares`.
        """
        ...

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        """Scalar loss and figures to log."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Held-out figures; {} where there are none."""
        ...


@dataclass(frozen=True)
class FitConfig:
    """How to train. Learning rate: linear warm-up, then cosine to `final_lr_fraction` of the peak."""

    out: Path
    steps: int
    lr: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.05
    clip: float = 1.0
    final_lr_fraction: float = 0.05
    autocast: bool | None = None  # bf16 matrix products; None: where the hardware has them
    seed: int = 0
    save_every: int = 500
    eval_every: int = 0
    log_every: int = 20
    resume: bool = True


# Settings that a run cannot change on the way: what it comes to would be neither the one nor the other.
_DECIDING = ("steps", "seed", "lr", "warmup", "weight_decay", "clip", "final_lr_fraction")


def learning_rate(step: int, config: FitConfig) -> float:
    """Learning rate at a step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.final_lr_fraction + (1 - config.final_lr_fraction) * cosine)


def fit(
    task: Task, config: FitConfig, evaluated: Callable[[int, dict[str, float]], None] | None = None
) -> dict[str, float]:
    """Train to the last step and return the final held-out figures.

    Writes metrics.jsonl and state.pt under `config.out`; the same call continues an interrupted run
    from its last saved step with the same result. Under torchrun every process trains on its share of each
    batch (see `shares`), gradients are summed in fp32, and one process writes. `evaluated` is called in every
    process after each evaluation, with the number of steps done and the figures.
    Raises `UserError` where the loss stops being a number.
    """
    processes.start()
    torch.manual_seed(config.seed + _RANK_SEED * processes.rank())  # dropout differs between shares
    config.out.mkdir(parents=True, exist_ok=True)
    optimizer = _optimizer(task, config)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device
    autocast = multiplies_bf16(device.type) if config.autocast is None else config.autocast
    state_path = config.out / f"{task.name}.state.pt"
    start = _resume(state_path, task, optimizer, config)
    trained = list(task.modules().values())
    processes.same_everywhere([t for module in trained for t in module.state_dict().values()])
    with _journal(task, config, start) as (log, bar):
        began = time.monotonic()
        for step in range(start, config.steps):
            _set_training(trained, True)
            rate = learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            optimizer.zero_grad(set_to_none=True)
            batch, part = weighed(task, task.batch(step))
            loss, figures = _backward(task, batch, part, device, autocast)
            processes.sum_gradients(parameters)
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip)
            if not torch.isfinite(norm):
                raise UserError(
                    f"{task.name}: the gradient at step {step} is not finite; lower --lr "
                    f"(the last good state is kept in {state_path})"
                )
            optimizer.step()
            bar.update(1)
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                figures = processes.weighted_means({"loss": loss.item(), **figures}, part)
                figures |= {"lr": rate, "grad_norm": norm.item()}
                bar.set_postfix({k: f"{v:.3g}" for k, v in figures.items()}, refresh=False)
                _log(log, done, figures, time.monotonic() - began)
            if config.eval_every and done % config.eval_every == 0 and done < config.steps:
                _log(log, done, _evaluate(task, trained, done, evaluated), time.monotonic() - began)
            if done % config.save_every == 0 or done == config.steps:
                _save(state_path, task, optimizer, done, config)
        final = _evaluate(task, trained, config.steps, evaluated)
        _log(log, config.steps, final, time.monotonic() - began)
    return final


@contextmanager
def _journal(task: Task, config: FitConfig, start: int) -> Iterator[tuple[TextIO, Any]]:
    """The file of metrics and the progress bar; in a process that does not write, neither is seen."""
    from tqdm import tqdm

    writes = processes.is_writer()
    path = config.out / f"{task.name}.metrics.jsonl" if writes else Path(os.devnull)
    bar = tqdm(
        total=config.steps, initial=start, desc=task.name, unit="step", mininterval=2.0, disable=not writes
    )
    with open(path, "a") as log, bar:
        yield log, bar


def _backward(
    task: Task, batch: Any, part: float, device: torch.device, autocast: bool
) -> tuple[Tensor, dict[str, float]]:
    """Gradients of the loss times the part that it has in the whole batch's; the loss and the figures."""
    if not part:  # there is nothing to learn from in these rows
        return torch.zeros((), device=device), {}
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        loss, figures = task.loss(batch)
    (loss if part == 1.0 else loss * part).backward()
    return loss, figures


def _optimizer(task: Task, config: FitConfig) -> torch.optim.AdamW:
    groups = []
    for group in task.parameter_groups():
        parameters = [p for p in group["params"] if p.requires_grad]
        for decayed in (True, False):  # norms, biases and gates are not decayed
            part = [p for p in parameters if (p.dim() >= 2) == decayed]
            if part:
                decay = group.get("weight_decay", config.weight_decay) if decayed else 0.0
                groups.append({"params": part, "lr_scale": group.get("lr_scale", 1.0), "weight_decay": decay})
    if not groups:
        raise UserError(f"{task.name}: nothing is trainable")
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95))


def _set_training(modules: list[nn.Module], mode: bool) -> None:
    for module in modules:
        module.train(mode)


def _evaluate(
    task: Task,
    trained: list[nn.Module],
    done: int,
    evaluated: Callable[[int, dict[str, float]], None] | None,
) -> dict[str, float]:
    _set_training(trained, False)
    with torch.no_grad():
        figures = task.evaluate()
    if evaluated is not None:
        evaluated(done, figures)
    return figures


def _log(file: Any, step: int, figures: Mapping[str, float], seconds: float) -> None:
    if figures:
        file.write(json.dumps({"step": step, "seconds": round(seconds, 1), **figures}) + "\n")
        file.flush()


def _save(path: Path, task: Task, optimizer: torch.optim.Optimizer, step: int, config: FitConfig) -> None:
    # Alone the state of the generator, else one row per process.
    states = processes.gathered(torch.get_rng_state())
    if not processes.is_writer():
        return
    state = {
        "step": step,
        **{name: getattr(config, name) for name in _DECIDING},
        "modules": {name: module.state_dict() for name, module in task.modules().items()},
        "optimizer": optimizer.state_dict(),
        "rng": states[0] if len(states) == 1 else torch.stack(states),
    }
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def _resume(path: Path, task: Task, optimizer: torch.optim.Optimizer, config: FitConfig) -> int:
    if not config.resume or not path.exists():
        return 0
    try:
        # On the CPU first: it may have been saved on a device that is not here, and the random numbers' state
        # belongs there; loading copies the rest to where the modules are.
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name in _DECIDING:
            before, now = state.get(name, getattr(config, name)), getattr(config, name)
            if before != now:
                raise CheckpointError(
                    f"{path}: belongs to a run with {name.replace('_', ' ')} {before}, not {now}; "
                    "give the same, another --out, or delete it"
                )
        for name, module in task.modules().items():
            module.load_state_dict(state["modules"][name])
        optimizer.load_state_dict(state["optimizer"])
        _set_generator(state["rng"], int(state["step"]), config)
        return int(state["step"])
    except CheckpointError:
        raise
    except Exception as error:  # a truncated zip, a missing key, other shapes: the remedy is the same
        raise CheckpointError(f"{path}: cannot be resumed ({error}); delete it to start again") from error


def _set_generator(saved: Tensor, step: int, config: FitConfig) -> None:
    """The generator as it was; another number of processes than before goes on with new numbers."""
    states = saved if saved.dim() == 2 else saved[None]
    if len(states) == processes.count():
        torch.set_rng_state(states[processes.rank()].clone())  # a view of a later row crashes torch
    else:
        torch.manual_seed(config.seed + _RANK_SEED * processes.rank() + step)
