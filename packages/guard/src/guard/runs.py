"""What `guard train` and `guard prune` do, with the settings of their flags (see `cli_train`)."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from core_llm import processes
from core_llm.checkpoint import core_hash, load_core
from core_llm.devices import chosen_device
from core_llm.errors import CheckpointError, UserError
from core_llm.files import lock, read_json, write_text
from core_llm.lora import ALL_LINEAR, LoRA, LoRAConfig
from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer
from core_llm.train.fit import FitConfig
from guard import card, data_card, stored
from guard.compress import Compression, Stage, compress, report, write_report
from guard.distillation import Distillation, with_opinions
from guard.guard import Guard
from guard.policy import Policy
from guard.pruning import check
from guard.tasks import Recipe
from guard.train import DataConfig, TrainingData, all_baselines, fine_tune, load_data


@dataclass(frozen=True, kw_only=True)
class Run:
    """What both have: the data, how long and how fast to learn from them, and where."""

    out: Path
    data_root: Path | None
    sets: tuple[str, ...]
    data: tuple[Path, ...]
    held_out: float
    near_duplicates: float
    drop_repeated: bool
    temperature: float
    steps: int
    lr: float
    batch: int
    seed: int
    device: Literal["auto", "cpu", "cuda"]
    resume: bool


@dataclass(frozen=True, kw_only=True)
class TrainRun(Run):
    """A guard out of a core."""

    core: str
    policy: Path | None
    rules: bool
    lora_rank: int
    keep_apart: bool
    teacher: str | None
    language_steps: int | None

    def __post_init__(self) -> None:
        if self.keep_apart and not self.lora_rank:
            raise UserError("--keep-apart is for low-rank updates: give --lora-rank too")
        if min(self.steps, self.batch) < 1 or self.lr <= 0:
            raise UserError("--steps, --batch and --lr must be positive")
        if (self.language_steps or 0) < 0 or self.lora_rank < 0:
            raise UserError("--language-steps and --lora-rank must not be negative")

    @property
    def _reading(self) -> int:
        """Steps of the language stage."""
        if self.language_steps is None:
            return 0 if self.rules or self.lora_rank else 250
        return self.language_steps

    def _recipe(self) -> Recipe:
        values = {"language_steps": self._reading, "batch": self.batch, "seed": self.seed}
        return Recipe.for_rules(**values) if self.rules else Recipe(**values)  # type: ignore[arg-type]

    def run(self) -> None:
        """Train, save, print."""
        where = chosen_device(self.device)
        policy = replace(Policy() if self.policy is None else Policy.read(self.policy), brief=not self.rules)
        core, tokenizer = load_core(self.core, mapped=False)
        recipe = self._recipe()
        # Either the regression's opinion or the larger guard's.
        weight = 0.0 if self.teacher else recipe.teacher_weight
        chosen = _chosen(self, weight)
        with _alone(self.out, self.core, self.teacher):
            data = load_data(chosen, policy)
            _begin(self.out, _settings(self, core, policy, data), self.resume)
            self._train(core, tokenizer, where, recipe, policy, data)

    def _train(
        self, core: Llama, tokenizer: Tokenizer, where: torch.device, recipe: Recipe, policy: Policy,
        data: TrainingData,
    ) -> None:  # fmt: skip
        parts = data.all_parts
        distil = None
        if self.teacher is not None:
            distil = Distillation(self.temperature)
            teacher = Guard.load(self.teacher)
            teacher.core.to(where)
            cache = self.out / "state" / "opinions.jsonl"
            parts = [(with_opinions(teacher, rows, cache), n) for rows, n in parts]
            del teacher
        core.to(where)
        lora = None
        if self.lora_rank:
            lora = LoRA(core, LoRAConfig(self.lora_rank, 2.0 * self.lora_rank, targets=ALL_LINEAR), self.seed)
        settings = FitConfig(
            self.out / "state", self.steps, self.lr, seed=self.seed, resume=self.resume, save_every=50
        )
        guard, figures = fine_tune(
            core, tokenizer, parts, data.held_out, settings, recipe, policy, lora, distil
        )
        self._save(guard, lora, data, figures | all_baselines(data))

    def _save(self, guard: Guard, lora: LoRA | None, data: TrainingData, figures: dict[str, float]) -> None:
        text = card.write(self._command(), figures, data.cards, guard.policy, self.teacher is not None)
        if lora is not None and self.keep_apart:
            settings = guard.prompter.settings()
            stored.save_apart(self.out, lora, self.core, guard.tokenizer, settings, text)
        else:
            if lora is not None:
                lora.merge()
            guard.save(self.out, text)
        data_card.write(self.out, data.cards, self.near_duplicates or None)
        for name, value in figures.items():
            print(f"{name}: {value:.4f}")
        print(f"guard saved in {self.out}")

    def _command(self) -> str:
        """The command line, without the places of files."""
        parts = ["guard train --core", self.core if self.core == "nano" else "DIR"]
        parts += [f"--steps {self.steps} --language-steps {self._reading} --lr {self.lr}"]
        parts += [f"--batch {self.batch}", f"--seed {self.seed}"]
        parts += ["--rules True"] * self.rules + [f"--lora-rank {self.lora_rank}"] * bool(self.lora_rank)
        parts += ["--data FILE"] * len(self.data) + ["--policy FILE"] * bool(self.policy)
        parts += ["--drop-repeated True"] * self.drop_repeated
        parts += [f"--teacher DIR --temperature {self.temperature}"] * bool(self.teacher)
        return " ".join([*parts, "--out DIR"])


@dataclass(frozen=True, kw_only=True)
class PruneRun(Run):
    """A smaller guard out of a guard."""

    model: str
    layers: int | None
    ffn: int | None
    head: Literal["full", "verdict"]
    quantize: Literal["none", "int8", "int4"]
    qat: bool
    rows: int

    def __post_init__(self) -> None:
        if self.steps < 0 or self.lr <= 0:
            raise UserError("--steps must not be negative, and --lr positive")

    def run(self) -> None:
        """Prune, heal, quantise, save, print."""
        scheme = None if self.quantize == "none" else self.quantize
        settings = Compression(
            self.layers, self.ffn, self.head == "verdict", scheme, self.qat, self.rows, self.batch,
            seed=self.seed, distillation=Distillation(self.temperature),
        )  # fmt: skip
        where = chosen_device(self.device)
        guard = Guard.load(self.model)
        check(guard.core, self.layers, self.ffn, scheme)  # before the data is read
        chosen = _chosen(self, 0.0)
        guard.core.to(where)
        config = FitConfig(
            self.out / "state", self.steps, self.lr, warmup=20, seed=self.seed, resume=self.resume,
            save_every=50,
        )  # fmt: skip
        with _alone(self.out, self.model):
            data = load_data(chosen, guard.policy)
            _begin(self.out, _settings(self, guard.core, guard.policy, data), self.resume)
            small, stages = compress(guard, data.all_parts, data.held_out, config, settings)
            self._save(small, stages, data)

    def _save(self, small: Guard, stages: list[Stage], data: TrainingData) -> None:
        small.core.to("cpu")
        table = report(stages)
        small.save(
            self.out, f"# A smaller guard\n\nMade of {Path(self.model).name} by `guard prune`.\n\n{table}"
        )
        write_report(self.out, stages)
        data_card.write(self.out, data.cards, self.near_duplicates or None)
        print(table)
        print(f"guard saved in {self.out}")


# Where things lie and what computes changes nothing of a run; the core and the data are told by content.
_ELSEWHERE = {"out", "core", "model", "policy", "data", "data_root", "device", "resume"}


def _settings(run: Run, core: Llama, policy: Policy, data: TrainingData) -> dict[str, Any]:
    """All that decides what a run comes to."""
    flags = {
        f"--{field.name.replace('_', '-')}": getattr(run, field.name)
        for field in fields(run)
        if field.name not in _ELSEWHERE
    }
    rows = {card.name: [card.rows, card.unsafe, card.held_out] for card in data.cards}
    content = {"weights": core_hash(core), "policy": policy.digest, "rows": rows}
    return dict(json.loads(json.dumps(flags | content)))


@contextmanager
def _alone(out: Path, *sources: str | None) -> Iterator[None]:
    """Keep other programs out of the folder, before any work; `sources`: what the run is made from.

    Raises `UserError` where a program is at work there, or where the result would replace a source.
    """
    for source in sources:
        if source is not None and Path(source).is_dir() and out.resolve() == Path(source).resolve():
            raise UserError(f"{out}: is what this run is made from; choose another folder")
    if not processes.is_writer():
        yield
        return
    fresh, state = not out.exists(), out / "state"
    try:
        state.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"{out}: cannot write there ({error.strerror}); choose another folder") from error
    try:
        if not lock(descriptor):
            raise UserError(f"{out}: another run is writing there; wait for it, or choose another folder")
        try:
            yield
        finally:
            if [path.name for path in state.iterdir()] == ["lock"]:  # nothing was begun: nothing stays
                shutil.rmtree(state)
                if fresh:
                    with suppress(OSError):  # somebody else put something there
                        out.rmdir()
    finally:
        os.close(descriptor)


def _begin(out: Path, settings: dict[str, Any], resume: bool) -> None:
    """Keep the state of other settings out of this run.

    Raises `UserError` where a run with other or unknown settings would be continued.
    """
    if not processes.is_writer():
        return
    known = out / "state" / "settings.json"
    states = sorted(known.parent.glob("*.state.pt"))
    if resume and states:
        try:
            before = read_json(known)
        except CheckpointError as error:
            raise UserError(f"{error}; begin anew with --resume False") from error
        _check_same(out, before, settings)
    elif not resume:
        # Or a run that is killed before it saves would be continued from the state of the one before.
        for path in states:
            path.unlink()
    write_text(known, json.dumps(settings, indent=2) + "\n")


def _check_same(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            told = f"{name} {before.get(name)}" if name.startswith("--") else f"other {name}"
            raise UserError(
                f"{out}: the run there had {told}; give the same, choose another folder, or begin anew "
                "with --resume False"
            )


def _chosen(run: Run, teacher_weight: float) -> DataConfig:
    """What to learn from; raises `UserError` for what could not be read or makes no sense."""
    if not 0 <= run.held_out < 1:
        raise UserError(f"--held-out must be in [0, 1), got {run.held_out}")
    if run.drop_repeated and not run.near_duplicates:
        raise UserError("--drop-repeated needs an overlap: give --near-duplicates more than 0")
    cache = run.out / "state" / "near_duplicates.json"
    return DataConfig(
        run.data_root, run.sets, run.data, run.near_duplicates, run.drop_repeated, cache, run.held_out,
        teacher_weight, run.seed,
    )  # fmt: skip
