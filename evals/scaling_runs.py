"""The runs behind `evals scaling`: cores of several sizes, trained by `fit` on the project's own scenes.

Axes: B windows, T positions in a window.
"""

import hashlib
import json
import math
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core_llm.errors import DataError, UserError
from core_llm.journal import Journal
from evals.scaling import Run, budgets_of, line, parabola, sizes
from evals.tasks.base import Sample

if TYPE_CHECKING:
    from torch import Tensor, nn

    from core_llm.config import LlamaConfig
    from core_llm.data.packing import Document, Packed
    from core_llm.tokenizer import Tokenizer

BENCHMARK = "text-qa"
VOCABULARY = 768  # 512 words and the special tokens: the scenes have few words
# Width and depth of the cores, about twice as many parameters from one to the next.
SHAPES = ((8, 2), (16, 2), (24, 2), (32, 2), (48, 2), (64, 3), (96, 3), (128, 4))
_SAVE_EVERY = 250  # steps
_HEAD = 8  # width of an attention head
_VERSION = 1  # of what a run does: older results are not taken for it


@dataclass(frozen=True)
class Plan:
    """Which models are trained and how. budgets in FLOPs; the last one, one run of the size that the others
    recommend, is held out. A run is left out where it would take fewer or more steps than named.
    """

    budgets: tuple[float, ...] = (2e10, 4e10, 8e10, 1.6e11, 3.2e11)
    held_out: float = 1.28e12
    shapes: tuple[tuple[int, int], ...] = SHAPES
    windows: int = 4
    width: int = 128
    fewest_steps: int = 30
    most_steps: int = 4000
    questions: int = 400
    lr: float = 4e-3  # at width 64; falls with the root of the width
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.budgets) < 3 or sorted(set(self.budgets)) != list(self.budgets):
            raise UserError("--budgets takes three or more FLOP counts, each larger than the one before")
        if self.held_out <= max(self.budgets):
            raise UserError(f"--held-out must be larger than the budgets, not {self.held_out:g} FLOPs")


def shape_config(width: int, depth: int) -> "LlamaConfig":
    """A core of that width and depth, with heads of 8 channels and tied embeddings."""
    from core_llm.config import LlamaConfig

    heads = width // _HEAD
    ffn = math.ceil(8 * width / 3 / 8) * 8
    return LlamaConfig(
        width, depth, heads, heads, ffn, vocab_size=VOCABULARY, max_positions=1024, tied_embeddings=True
    )


def parameters(config: "LlamaConfig") -> int:
    """Weights that every token is multiplied with: those of the blocks, and the head."""
    d = config.dim
    attention = 2 * d * d + 2 * d * config.n_kv_heads * config.head_dim
    return config.n_layers * (attention + 3 * d * config.ffn_dim) + d * config.vocab_size


def flops_per_token(config: "LlamaConfig", context: int) -> float:
    """Training FLOPs of one position: 6 per parameter, and 6 T C per layer for causal attention.

    Forward and backward count two and four per multiplication and addition (Kaplan et al. 2020, section 2.1);
    a position attends to half of the T others on average.
    """
    return 6.0 * parameters(config) + 6.0 * config.n_layers * context * config.dim


@dataclass(frozen=True)
class Job:
    """One run to do."""

    budget: float
    shape: tuple[int, int]
    steps: int
    compute: float
    parameters: int
    held_out: bool = False

    @property
    def name(self) -> str:
        return f"width{self.shape[0]}-depth{self.shape[1]}-{self.budget:.2e}"

    def key(self, plan: Plan) -> str:
        """What makes two runs the same run."""
        settings = {k: v for k, v in asdict(plan).items() if k in _OF_A_RUN}
        fields = [_VERSION, VOCABULARY, self.budget, self.shape, self.steps, settings]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


_OF_A_RUN = ("windows", "width", "questions", "lr", "seed")


def job(plan: Plan, budget: float, shape: tuple[int, int], held_out: bool = False) -> Job:
    """The run of a shape that spends a budget, to the nearest step."""
    config = shape_config(*shape)
    per_step = flops_per_token(config, plan.width) * plan.windows * plan.width
    steps = max(1, round(budget / per_step))
    return Job(budget, shape, steps, steps * per_step, parameters(config), held_out)


def jobs(plan: Plan) -> list[Job]:
    """All runs but the held-out one, cheapest budget first.

    Raises `UserError` where a budget has fewer than three sizes within the steps allowed.
    """
    found = []
    for budget in plan.budgets:
        of_budget = [job(plan, budget, shape) for shape in plan.shapes]
        kept = [j for j in of_budget if plan.fewest_steps <= j.steps <= plan.most_steps]
        if len(kept) < 3:
            raise UserError(
                f"a budget of {budget:g} FLOPs has {len(kept)} sizes that train for {plan.fewest_steps} to "
                f"{plan.most_steps} steps, and a parabola needs 3; choose other --budgets"
            )
        found += kept
    return found


def held_out_job(plan: Plan, runs: Sequence[Run]) -> Job:
    """The largest run, of the shape next to the size that the others recommend for its budget.

    Where they recommend none, the shape whose loss was lowest in their largest budget.
    """
    groups = {b: g for b, g in budgets_of(runs).items() if len(sizes(g)) >= 3}
    found = [p for b, g in groups.items() if (p := parabola(b, g)).inside]
    if len(found) >= 2:
        wanted = line([p.budget for p in found], [p.best for p in found]).at(plan.held_out)
    else:
        wanted = min(groups[max(groups)], key=lambda run: run.loss).parameters
    candidates = [job(plan, plan.held_out, shape, held_out=True) for shape in plan.shapes]
    return min(candidates, key=lambda j: abs(math.log(j.parameters / wanted)))


def train_all(plan: Plan, folder: Path) -> list[Run]:
    """Every run of the plan; what `folder` holds already is not trained again, and a killed run goes on.

    Raises `UserError` where another program trains there.
    """
    from tqdm import tqdm

    todo = jobs(plan)
    total = sum(each.compute for each in todo) + plan.held_out
    with Journal(folder / "runs.jsonl", flag="--runs") as journal:
        world: World | None = None
        done: list[Run] = []
        with tqdm(total=total, desc="scaling", unit="FLOP", unit_scale=True, dynamic_ncols=True) as bar:
            while todo:
                each = todo.pop(0)
                key = each.key(plan)
                if key not in journal.known:
                    world = world or World(plan, folder)
                    bar.set_postfix_str(f"{each.name}, {each.steps} steps", refresh=True)
                    journal.append(
                        [{"key": key, "name": each.name, "output": _trained(plan, each, world, folder)}]
                    )
                done.append(_run(plan, each, journal.known[key]))
                bar.update(each.compute)
                if not todo and not each.held_out:
                    todo = [held_out_job(plan, done)]
    return done


def _run(plan: Plan, each: Job, figures: Mapping[str, float]) -> Run:
    return Run(
        name=each.name,
        budget=each.budget,
        compute=each.compute,
        parameters=each.parameters,
        tokens=each.steps * plan.windows * plan.width,
        loss=figures["loss"],
        nll=figures["nll"],
        accuracy=figures["accuracy"],
        questions=plan.questions,
    )


def _trained(plan: Plan, each: Job, world: "World", folder: Path) -> dict[str, float]:
    """Train one core; its state is kept while it runs, and removed at the end."""
    from core_llm.model import Llama
    from core_llm.train.fit import FitConfig, fit

    config = shape_config(*each.shape)
    model = Llama(config).initialise(plan.seed)
    out = folder / each.name
    figures = fit(
        ScalingTask(model, world, each.name),
        FitConfig(
            out,
            each.steps,
            lr=plan.lr * math.sqrt(64 / config.dim),
            warmup=max(1, min(100, each.steps // 10)),
            final_lr_fraction=0.1,
            seed=plan.seed,
            save_every=_SAVE_EVERY,
        ),
    )
    shutil.rmtree(out)
    return figures


class World:
    """What all runs share: the vocabulary, the stream of training text, held-out text, the benchmark."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        from core_llm.data.packing import pack
        from core_llm.data.phrases import sample_texts
        from core_llm.tokenizer import Tokenizer

        self.plan = plan
        saved = folder / "tokenizer.json"
        if saved.exists():
            self.tokenizer = Tokenizer.load(saved)
        else:
            self.tokenizer = Tokenizer.train(sample_texts(seed=0, n=4000), VOCABULARY)
            self.tokenizer.save(saved)
        self._batches: dict[int, "Packed"] = {}
        rng = random.Random("scaling held-out")
        texts = [self._document(rng) for _ in range(500)]
        self.held_out = pack(texts, plan.width, 96, self.tokenizer.pad_id)
        self.questions = questions(self.tokenizer, plan.questions)

    def _document(self, rng: random.Random) -> "Document":
        from core_llm.data.phrases import sample_conversation
        from core_llm.train.pretrain import document

        return document(sample_conversation(rng), self.tokenizer, rng, context_share=1.0)

    def batch(self, step: int) -> "Packed":
        """Fresh text for every step, the same in all runs."""
        from core_llm.data.packing import pack

        if step not in self._batches:
            rng = random.Random(f"scaling {self.plan.seed} {step}")

            def stream() -> "Iterator[Document]":
                while True:
                    yield self._document(rng)

            plan = self.plan
            self._batches[step] = pack(stream(), plan.width, plan.windows, self.tokenizer.pad_id)
        return self._batches[step]


class ScalingTask:
    """Next-token prediction on every token of the scenes' conversations."""

    def __init__(self, model: Any, world: World, name: str) -> None:
        self.model, self.world, self.name = model, world, name

    def modules(self) -> "Mapping[str, nn.Module]":
        """The core."""
        return {"core": self.model}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All weights at one rate."""
        return [{"params": list(self.model.parameters())}]

    def batch(self, step: int) -> "Packed":
        """Windows of the step."""
        return self.world.batch(step)

    def loss(self, batch: "Packed") -> "tuple[Tensor, dict[str, float]]":
        """Cross-entropy, nats per token."""
        from core_llm.train.pretrain import packed_loss

        return packed_loss(self.model, batch), {}

    def weight(self, batch: "Packed") -> float:
        """What the mean of the loss is over."""
        return batch.weights[:, 1:].sum().item()

    def evaluate(self) -> dict[str, float]:
        """Loss on held-out conversations; log-likelihood and accuracy on the benchmark."""
        from core_llm.train.pretrain import packed_loss

        nll, accuracy = answer(self.model, self.world.questions)
        return {"loss": packed_loss(self.model, self.world.held_out).item(), "nll": nll, "accuracy": accuracy}


@dataclass(frozen=True)
class Questions:
    """The benchmark as windows of one question each; weights are 1 on the answer and its end."""

    packed: "Packed"
    characters: int


def questions(tokenizer: "Tokenizer", n: int) -> Questions:
    """The first `n` rows of the harness's own benchmark of questions about scenes told in words."""
    from core_llm.chat import Message, render
    from core_llm.data.packing import Document, pack
    from evals.tasks import find
    from evals.tasks.base import Options

    rows: list[Sample] = find([BENCHMARK])[0].load(Options())[:n]
    if len(rows) < n:
        raise UserError(f"the benchmark {BENCHMARK} has {len(rows)} questions, not {n}; lower --questions")
    documents = []
    for row in rows:
        told = render([*row.messages, Message("assistant", row.target)], tokenizer, generation_prompt=False)
        documents.append(Document(told.ids, [float(said) for said in told.loss_mask]))
    width = max(len(document.ids) for document in documents)
    # A window as wide as the longest row may hold two short ones: each gets its own.
    windows = [pack([document], width, 1, tokenizer.pad_id) for document in documents]
    return Questions(_joined(windows), sum(len(row.target) for row in rows))


def _joined(windows: "Sequence[Packed]") -> "Packed":
    import torch

    from core_llm.data.packing import Packed

    return Packed(
        torch.cat([w.tokens for w in windows]),
        torch.cat([w.documents for w in windows]),
        torch.cat([w.weights for w in windows]),
    )


def answer(model: Any, asked: Questions) -> tuple[float, float]:
    """Negative log-likelihood of the right answers (nats per character), and the share of them given.

    A greedy decoder gives the right answer exactly where each of its tokens is the likeliest after the ones
    before it, so that one forward pass tells both.
    """
    import torch.nn.functional as F

    from core_llm.kernels import Mask

    packed, total, right = asked.packed, 0.0, 0
    for start in range(0, len(packed.tokens), 50):
        rows = slice(start, start + 50)
        tokens, weights = packed.tokens[rows], packed.weights[rows, 1:]
        hidden = model.hidden(tokens, mask=Mask.packed(packed.documents[rows]))
        row, at = weights.nonzero(as_tuple=True)
        logits = model.logits(hidden[row, at]).float()
        truth = tokens[row, at + 1]
        total += float(F.cross_entropy(logits, truth, reduction="sum"))
        wrong = set(row[logits.argmax(-1) != truth].tolist())
        right += len(tokens) - len(wrong)
    return total / asked.characters, right / len(packed.tokens)


COLUMNS = ("parameters", "tokens", "loss")


def read_csv(path: Path) -> list[Run]:
    """Runs from a table: parameters, tokens, loss; if known compute, budget, nll, accuracy, questions, name.

    Compute is 6 x parameters x tokens where it is not given. Raises `DataError` that names the line.
    """
    import csv

    try:
        with open(path, encoding="utf-8-sig", newline="") as opened:
            rows = list(csv.DictReader(opened))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: is no readable table of runs ({error})") from error
    missing = [name for name in COLUMNS if not rows or name not in rows[0]]
    if missing:
        raise DataError(
            f"{path}: has no column {', '.join(missing)}, or no row; a run needs {', '.join(COLUMNS)}"
        )
    return [_from_row(row, f"{path}, line {i}", i) for i, row in enumerate(rows, start=2)]


def _from_row(row: Mapping[str, str | None], where: str, number: int) -> Run:
    def figure(name: str, most: float = math.inf) -> float | None:
        text = (row.get(name) or "").strip()
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            raise DataError(f"{where}: {name} is '{text}', not a number") from None
        if not 0 <= value <= most or not math.isfinite(value):
            raise DataError(f"{where}: {name} is {text}, which cannot be")
        return value

    def needed(name: str) -> float:
        value = figure(name)
        if not value:
            raise DataError(f"{where}: {name} is missing or zero")
        return value

    size, tokens = needed("parameters"), needed("tokens")
    compute = figure("compute") or 6 * size * tokens
    return Run(
        name=row.get("name") or f"run {number - 1}",
        budget=figure("budget") or compute,
        compute=compute,
        parameters=size,
        tokens=tokens,
        loss=needed("loss"),
        nll=figure("nll"),
        accuracy=figure("accuracy", 1.0),
        questions=int(figure("questions") or 0),
    )
