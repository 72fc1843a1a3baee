"""Training of the guard: language of the safety sets first, verdicts second."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from core_llm.data.near_duplicates import THRESHOLD
from core_llm.errors import UserError
from core_llm.lora import LoRA
from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer
from core_llm.train.fit import FitConfig, fit
from guard import examples, own_data
from guard.batches import Epochs, encode, encode_forced
from guard.data_card import SetCard, set_card
from guard.decontaminate import Dropped, HeldOut, decontaminated
from guard.distillation import Distillation, DistilTask
from guard.examples import Example
from guard.guard import Guard
from guard.policy import Policy
from guard.tasks import LanguageTask, Recipe, VerdictTask
from guard.teacher import baseline_scores

DEV = ("diasafety", "openai_moderation")
TEMPLATES = "templates"
SETS = (*examples.MIXTURE, TEMPLATES)


@dataclass(frozen=True)
class DataConfig:
    """What is trained on. sets: names of `SETS`; files: JSONL of one's own; threshold: of near-duplicates,
    0 to look for none; once: drop repetitions too; held_out: share of the contexts of a file that is held
    out; cache: a file that keeps which rows were dropped. Raises `UserError` for an unknown set or nothing
    to train on.
    """

    root: Path | None = None
    sets: tuple[str, ...] = SETS
    files: tuple[Path, ...] = ()
    threshold: float = THRESHOLD
    once: bool = False
    cache: Path | None = None
    held_out: float = 0.1
    teacher_weight: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.sets if name not in SETS]
        if unknown or not (self.sets or self.files):
            what = f"unknown set '{unknown[0]}'" if unknown else "nothing to train on: give --sets or --data"
            raise UserError(f"{what}; known sets: {', '.join(SETS)}")
        named = [path.stem for path in self.files]
        twice = [name for i, name in enumerate(named) if name in [*self.sets, *named[:i]]]
        if twice:
            raise UserError(f"two sets are called '{twice[0]}': rename the file")


@dataclass
class TrainingData:
    """parts: (examples, how many per epoch) by name; held_out: by name; cards: what there is of each set."""

    parts: dict[str, tuple[list[Example], int | None]] = field(default_factory=dict)
    held_out: dict[str, list[Example]] = field(default_factory=dict)
    cards: list[SetCard] = field(default_factory=list)

    @property
    def all_parts(self) -> list[tuple[list[Example], int | None]]:
        """The parts in order."""
        return list(self.parts.values())


def load_data(config: DataConfig, policy: Policy) -> TrainingData:
    """The chosen sets and files without what repeats held-out rows.

    Raises `UserError` where no row is left to train on, `DataError` for what cannot be read.
    """
    made = TrainingData()
    loaded: dict[str, tuple[list[Example], int | None]] = {}
    for path in config.files:
        rows, held_out = own_data.load(path, list(policy.shown), config.held_out)
        if not rows:
            raise UserError(f"{path}: all of its rows are held out, none is left to train on")
        loaded[path.stem] = rows, None
        made.held_out |= {path.stem: held_out} if held_out else {}
    for name, part in examples.MIXTURE.items():
        if name in config.sets:
            loaded[name] = examples.load(name, config.root), part.per_epoch
    made.held_out |= {
        name: examples.load(name, config.root, split="dev") for name in DEV if name in config.sets
    }
    if TEMPLATES in config.sets:
        loaded[TEMPLATES] = examples.templates(examples.TEMPLATES, config.seed), examples.TEMPLATES_PER_EPOCH
    _keep_apart(made, loaded, config)
    return made


def _keep_apart(
    made: TrainingData, loaded: Mapping[str, tuple[list[Example], int | None]], config: DataConfig
) -> None:
    known = HeldOut((e for rows in made.held_out.values() for e in rows), config.threshold or 1.0)
    for name, (rows, per_epoch) in loaded.items():
        dropped = Dropped()
        if config.threshold:
            # What the project generates repeats itself on purpose; there is nothing in it to be fair to.
            once = config.once and name != TEMPLATES
            rows, dropped = decontaminated(rows, known, config.threshold, once, _bar(name), config.cache)
        if not rows:
            raise UserError(f"{name}: every row repeats a held-out one, none is left to train on")
        if name in examples.MIXTURE and examples.MIXTURE[name].taught:
            rows = examples.taught(rows, config.teacher_weight)
        made.parts[name] = rows, per_epoch
        made.cards.append(set_card(name, rows, dropped, made.held_out.get(name, ()), per_epoch))


def _bar(name: str) -> Callable[[Sequence[Example]], Iterable[Example]]:
    from tqdm import tqdm

    from core_llm import processes

    def shown(rows: Sequence[Example]) -> Iterable[Example]:
        disable = not processes.is_writer()
        return tqdm(
            rows, f"near-duplicates: {name}", unit="row", mininterval=1.0, leave=False, disable=disable
        )

    return shown


def fine_tune(
    core: Llama, tokenizer: Tokenizer, parts: Sequence[tuple[Sequence[Example], int | None]],
    held_out: Mapping[str, Sequence[Example]], config: FitConfig, recipe: Recipe, policy: Policy,
    lora: LoRA | None = None, distil: Distillation | None = None,
) -> tuple[Guard, dict[str, float]]:  # fmt: skip
    """Train on (examples, how many per epoch) and return the guard with its figures.

    Without `lora` a copy of the core is trained, else the updates that are attached to it. With `distil` the
    examples carry a teacher's opinion, which is learnt in place of the labels. config.steps counts the
    verdict stage; the language stage before it has recipe.language_steps.
    """
    torch.manual_seed(recipe.seed)
    model = core if lora else copy.deepcopy(core).requires_grad_(True)
    coder = encode if distil is None else encode_forced
    encoded = [([coder(e, tokenizer, policy) for e in part], n) for part, n in parts]
    if recipe.language_steps:
        # Reading needs no balance of verdicts: more of the large sets, nothing twice.
        amounts = [(rows, n and min(4 * n, len(rows))) for rows, n in encoded]
        everything = Epochs(amounts, recipe.batch, recipe.seed)
        stage = replace(config, steps=recipe.language_steps, lr=recipe.language_lr, eval_every=0)
        fit(LanguageTask(model, tokenizer, everything, lora), stage)
    epochs = Epochs(encoded, recipe.batch, recipe.seed)
    task = (
        VerdictTask(model, tokenizer, epochs, recipe, policy, held_out, lora)
        if distil is None
        else DistilTask(model, tokenizer, epochs, recipe, policy, held_out, lora, distil)
    )
    figures = fit(task, config)
    return task.finish(), figures


def all_baselines(data: TrainingData) -> dict[str, float]:
    """`baselines` of every held-out set."""
    figures: dict[str, float] = {}
    for name, rows in data.held_out.items():
        figures |= baselines(name, data.parts[name][0], rows)
    return figures


def baselines(name: str, rows: Sequence[Example], held_out: Sequence[Example]) -> dict[str, float]:
    """What a score must be compared with: number of held-out rows, share of unsafe ones, TF-IDF's AUPRC.

    {} where one verdict is all there is to learn or to find.
    """
    from sklearn.metrics import average_precision_score

    labels = [int(e.unsafe) for e in held_out]
    known = [int(e.unsafe) for e in rows]
    if len(set(labels)) < 2 or len(set(known)) < 2:
        return {}
    scores = baseline_scores([e.pair for e in rows], known, [e.pair for e in held_out])
    return {
        f"rows_{name}": float(len(labels)),
        f"base_rate_{name}": sum(labels) / len(labels),
        f"tfidf_{name}": float(average_precision_score(labels, scores)),
    }
