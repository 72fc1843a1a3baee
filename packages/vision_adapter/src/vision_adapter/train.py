"""How the adapter learns: first the encoder to see, then the adapter to let a frozen core answer.

Axes: B pictures, T text positions, N answer tokens, C core width.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core_llm.adapters import Spans
from core_llm.data.levels import LEVELS, ask, sample_level_scene
from core_llm.data.scenes import WORDS
from core_llm.kernels import Mask
from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer
from core_llm.train.fit import FitConfig, fit
from vision_adapter.adapter import ImageMemory, VisionAdapter
from vision_adapter.encoder import Encoder
from vision_adapter.explain import recorded
from vision_adapter.images import tile
from vision_adapter.pointing import MENTION, cells, pointing_loss
from vision_adapter.samples import KINDS, Packed, Sample, easy_vqa, pack, scene_sample, vary
from vision_adapter.scenes import LABELS, draw, draw_layout, layout, patch_labels

_NEVER = torch.iinfo(torch.long).max


@dataclass(frozen=True)
class Recipe:
    """What `vision-adapter train` does by default; tuned for the nano core on two CPU cores."""

    steps: int = 2200  # of the adapter
    warm_up_steps: int = 2000  # encoder alone
    warm_up_pictures: int = 64
    warm_up_lr: float = 2e-3
    warm_up_shares: tuple[float, ...] = (
        0.15,
        0.35,
        0.3,
        0.2,
        0.0,
        0.0,
        0.0,
    )  # of the pictures, as in `KINDS`
    pictures: int = 32  # per step of the adapter
    easy_share: float = 0.15  # of the pictures, where easy-VQA is at hand
    kind_shares: tuple[float, ...] = (0.15, 0.55, 0.15, 0.15, 0.0, 0.0, 0.0)  # of the drawn ones
    dialogues: int = 5  # per picture
    describe_share: float = 0.1
    lr: float = 2e-3
    negation_from: float = 0.2  # negated questions: kept at this rate at first, ...
    negation_until: float = 0.3  # ... all of them from this share of the steps on (see `negated_share`)
    presence_weight: float = 1.0  # of an auxiliary loss (see `VisionTask.presence_loss`)
    cell_weight: float = 0.5  # of another (see `VisionTask.cell_loss`)
    pointing_weight: float = 0.5  # of a third (see `pointing.pointing_loss`)
    held_out: int = 192  # drawn pictures per skill on which it is measured
    gate_lr_scale: float = 30.0  # at the base rate the gates, zero at first, hold everything back
    encoder_lr_scale: float = 0.3


class EncoderTask:
    """Encoder warm-up: say of every patch what lies under it (see `patch_labels`), and where it is itself.

    Whatever a cross-attention layer is to read has to be in the features first. What is only true of the
    whole picture, such as a word or how many items share a colour, is asked of the patches that it concerns,
    because there the text will look.
    """

    name = "encoder"

    def __init__(self, encoder: Encoder, size: int, seed: int, recipe: Recipe) -> None:
        dim = encoder.norm.normalized_shape[0]
        self.places = (size // 8) ** 2
        sizes = {"place": self.places - 1, **LABELS}
        self.encoder = encoder
        self.heads = nn.ModuleDict(
            {name: nn.Linear(dim, n + 1) for name, n in sizes.items()}
        )  # 0: nothing there
        self.size, self.seed, self.recipe = size, seed, recipe

    def modules(self) -> Mapping[str, nn.Module]:
        """Encoder and the heads that are thrown away afterwards."""
        return {"encoder": self.encoder, "heads": self.heads}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All at one rate."""
        return [{"params": [*self.encoder.parameters(), *self.heads.parameters()]}]

    def batch(self, step: int) -> dict[str, Tensor]:
        """ "tiles" [B, 3, size, size], and under the name of each head its labels [B, S]."""
        rng = random.Random(f"{self.seed} {self.name} {step}")
        rows = []
        for _ in range(self.recipe.warm_up_pictures):
            kind = KINDS[rng.choices(list(KINDS), self.recipe.warm_up_shares)[0]]
            scene = sample_level_scene(rng, kind.level, next(iter(kind.skills)))
            plan = layout(scene, rng)
            labels = {name: label.flatten() for name, label in patch_labels(plan, self.size // 8).items()}
            labels["place"] = torch.arange(self.places)
            rows.append({"tiles": tile(draw_layout(plan, rng, self.size), self.size), **labels})
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Sum of the cross-entropies, and how often each is right where there is something."""
        device = next(self.encoder.parameters()).device
        features = self.encoder(batch["tiles"].to(device))
        total = torch.zeros((), device=device)
        figures = {}
        for name, head in self.heads.items():
            target = batch[name].to(device).flatten()
            logits = head(features).float().flatten(0, 1)
            total = total + F.cross_entropy(logits, target)
            right = (logits.argmax(-1) == target)[target > 0].float()
            figures[name] = right.mean().item() if len(right) else 1.0
        return total, figures

    def evaluate(self) -> dict[str, float]:
        """Accuracies on pictures of no training step."""
        return self.loss(self.batch(-1))[1]


class VisionTask:
    """Answer questions about pictures through the frozen core; only the adapter learns."""

    name = "vision"

    def __init__(
        self,
        core: Llama,
        tokenizer: Tokenizer,
        adapter: VisionAdapter,
        easy: Mapping[str, Sequence[Sample]],
        seed: int,
        recipe: Recipe,
    ) -> None:
        self.core, self.tokenizer, self.adapter = core.requires_grad_(False), tokenizer, adapter
        self.easy, self.seed, self.recipe = easy, seed, recipe
        # Of every block: is it there (1 score), and in which cell (9)?
        self.probes = nn.ModuleDict(
            {name: nn.Linear(core.config.dim, 10) for name in adapter.cross_attention}
        )
        self.probes.to(core.embed_tokens.weight.device)

    def modules(self) -> Mapping[str, nn.Module]:
        """The adapter, and the probes that are thrown away afterwards; the core is never touched."""
        return {"adapter": self.adapter, "probes": self.probes}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Gates much faster than the rest, the warmed-up encoder slower."""
        named = list(self.adapter.named_parameters())
        gates = [p for name, p in named if name.endswith("_gate")]
        encoder = [p for name, p in named if name.startswith("encoder.")]
        rest = [p for name, p in named if not name.endswith("_gate") and not name.startswith("encoder.")]
        return [
            {"params": [*rest, *self.probes.parameters()]},
            {"params": encoder, "lr_scale": self.recipe.encoder_lr_scale},
            {"params": gates, "lr_scale": self.recipe.gate_lr_scale},
        ]

    def batch(self, step: int) -> Packed:
        """Pictures of easy-VQA and drawn ones, each with several dialogues."""
        rng = random.Random(f"{self.seed} {self.name} {step}")
        recipe, size = self.recipe, self.adapter.config.image_size
        negated_share = self.negated_share(step)
        samples = []
        for _ in range(recipe.pictures):
            if self.easy.get("train") and rng.random() < recipe.easy_share:
                sample = vary(rng.choice(self.easy["train"]), rng, recipe.dialogues, negated_share)
            else:
                kind = KINDS[rng.choices(list(KINDS), recipe.kind_shares)[0]]
                sample = scene_sample(kind, rng, size, recipe.describe_share, negated_share)
                sample = vary(sample, rng, recipe.dialogues)
            samples.append(sample)
        return pack(samples, self.tokenizer, self.adapter.config.token_rows)

    def negated_share(self, step: int) -> float:
        """How many negated questions are kept at a step.

        Presence asked one half of the time in the negative is a parity, on which neither the picture nor
        the wording alone says anything about the answer: so the picture is learned first, then the negation.
        """
        progress = step / max(1, self.recipe.steps) / self.recipe.negation_until
        return min(1.0, self.recipe.negation_from + (1 - self.recipe.negation_from) * progress)

    def loss(self, batch: Packed) -> tuple[Tensor, dict[str, float]]:
        """Mean cross-entropy (nats per answer token) and the auxiliary loss; accuracies and the gates."""
        seen: dict[int, Tensor] = {}
        with recorded(self.adapter) as (queries, keys):
            logits, targets, _ = self.answer_logits(batch, seen=seen)
        loss = F.cross_entropy(logits.float(), targets)
        figures = {"token_accuracy": (logits.argmax(-1) == targets).float().mean().item()}
        figures |= {"answer_loss": loss.item(), **self.adapter.gates()}
        presence, figures["presence"] = self.presence_loss(seen, batch.present.to(loss.device))
        regions, kinds = batch.regions.to(loss.device), batch.pointers.to(loss.device)
        pointing, figures["pointing"] = pointing_loss(queries, keys, regions, kinds)
        cell, figures["cell"] = self.cell_loss(seen, regions, kinds == MENTION)
        recipe = self.recipe
        loss = loss + recipe.presence_weight * presence + recipe.cell_weight * cell
        return loss + recipe.pointing_weight * pointing, figures

    def presence_loss(self, seen: Mapping[int, Tensor], present: Tensor) -> tuple[Tensor, float]:
        """Is the colour or shape that a question names in the picture? Read off the word's own hidden state.

        seen: hidden states [B, T, C] behind each cross-attention block; present: see `Packed`. Whether two
        things are equal shows in neither alone, so the answer's loss has little to go by at first; here a
        linear probe behind every block asks for the comparison where question and picture meet.
        Returns the mean loss and the accuracy behind the last block that has one.
        """
        where = present >= 0
        labels = present[where].float()
        if not len(labels):
            return torch.zeros((), device=present.device), 1.0
        losses, accuracy = [], 0.0
        for score in self._probed(seen, where):
            losses.append(F.binary_cross_entropy_with_logits(score[:, 0], labels))
            accuracy = max(accuracy, ((score[:, 0] > 0) == (labels > 0)).float().mean().item())
        return torch.stack(losses).mean(), accuracy

    def cell_loss(
        self, seen: Mapping[int, Tensor], regions: Tensor, mentions: Tensor
    ) -> tuple[Tensor, float]:
        """Where in a grid of 3 × 3 is what a question names? Read off the last token that names it.

        regions [B, T, S], mentions [B, T] bool. Returns the mean loss and the best accuracy of a block.
        """
        if not mentions.any():
            return torch.zeros((), device=mentions.device), 1.0
        target = cells(regions[mentions])
        losses, accuracy = [], 0.0
        for score in self._probed(seen, mentions):
            losses.append(F.cross_entropy(score[:, 1:], target))
            accuracy = max(accuracy, (score[:, 1:].argmax(-1) == target).float().mean().item())
        return torch.stack(losses).mean(), accuracy

    def _probed(self, seen: Mapping[int, Tensor], where: Tensor) -> Iterator[Tensor]:
        for layer, hidden in seen.items():
            normed = F.rms_norm(hidden[where].float(), hidden.shape[-1:])
            yield self.probes[str(layer)](normed).float()

    def answer_logits(
        self, batch: Packed, shuffled: bool = False, seen: dict[int, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [N, V] for every answer token, the tokens [N], and the number of their dialogue [N].

        Every picture is encoded once for all its dialogues. shuffled: each row sees the next row's picture.
        seen: filled with the hidden states behind each cross-attention block.
        """
        device = self.core.embed_tokens.weight.device
        batch = replace(batch, **{name: value.to(device) for name, value in vars(batch).items()})
        rows = torch.arange(len(batch.tokens), device=device)
        memory = self.adapter.encode(batch.tiles)
        if shuffled:
            memory = memory.select(rows.roll(-1))
        hidden = self._hidden(batch, memory, rows, seen)
        row, position = batch.loss_mask[:, 1:].nonzero(as_tuple=True)
        dialogue = row * (int(batch.documents.max()) + 1) + batch.documents[row, position + 1]
        return self.core.logits(hidden[row, position]), batch.tokens[row, position + 1], dialogue

    def _hidden(
        self, batch: Packed, memory: ImageMemory, rows: Tensor, seen: dict[int, Tensor] | None
    ) -> Tensor:
        placed = torch.cat(self.adapter.place(memory))
        embeddings = self.core.embed(batch.tokens)
        embeddings = embeddings.index_put(batch.image.nonzero(as_tuple=True), placed.to(embeddings.dtype))
        spans = Spans(rows, batch.starts, torch.full_like(rows, _NEVER), batch.positions)
        layers = dict(self.adapter.interleave(memory, spans))
        if seen is not None:
            layers = {index: _recorded(layer, index, seen) for index, layer in layers.items()}
        return self.core.hidden(
            embeddings=embeddings,
            positions=batch.positions,
            mask=Mask.packed(batch.documents, shared_prefix=True),
            interleaved=layers,
        )

    def exact_match(self, samples: Sequence[Sample], shuffled: bool = False) -> float:
        """Share of dialogues whose answer would be generated word for word by greedy decoding."""
        right: list[Tensor] = []
        for start in range(0, len(samples), 64):
            batch = pack(samples[start : start + 64], self.tokenizer, self.adapter.config.token_rows)
            logits, targets, dialogue = self.answer_logits(batch, shuffled)
            wrong = (logits.argmax(-1) != targets).float()
            misses = torch.zeros(int(dialogue.max()) + 1, device=wrong.device).index_add(0, dialogue, wrong)
            right.append(misses[dialogue.unique()] == 0)
        return torch.cat(right).float().mean().item()

    def evaluate(self) -> dict[str, float]:
        """Exact match on held-out pictures: easy-VQA with its control, drawn scenes by skill."""
        figures: dict[str, float] = {}
        if self.easy.get("dev"):
            figures["easy_vqa"] = self.exact_match(self.easy["dev"])
            figures["easy_vqa_shuffled"] = self.exact_match(self.easy["dev"], shuffled=True)
        size = self.adapter.config.image_size
        for skill, samples in skill_samples(size, self.seed, self.recipe.held_out).items():
            figures[skill] = self.exact_match(samples)
            figures[f"{skill}_shuffled"] = self.exact_match(samples, shuffled=True)
        return figures


def _recorded(
    layer: Callable[[Tensor], Tensor], index: int, seen: dict[int, Tensor]
) -> Callable[[Tensor], Tensor]:
    def call(hidden: Tensor) -> Tensor:
        seen[index] = layer(hidden)
        return seen[index]

    return call


def skill_samples(size: int, seed: int, per_skill: int) -> dict[str, list[Sample]]:
    """Drawn pictures of no training step with one question each, by level and skill."""
    found: dict[str, list[Sample]] = {}
    for level, shape in LEVELS.items():
        for skill in shape.skills:
            rng = random.Random(f"{seed} held out {level} {skill}")
            rows = []
            for _ in range(per_skill):
                scene, (question,) = ask(rng, level, skill)
                picture = tile(draw(scene, rng, size), size)
                rows.append(Sample(picture, [[(question.text, question.answer)]]))
            found[f"{level}-{skill}"] = rows
    return found


def warm_up(encoder: Encoder, size: int, out: Path, seed: int, recipe: Recipe) -> dict[str, float]:
    """The first stage, which needs no core; returns accuracies on pictures of no training step."""
    torch.manual_seed(seed)  # fixes the heads
    task = EncoderTask(encoder.requires_grad_(True), size, seed, recipe)
    task.heads.to(encoder.positions.device)
    return fit(task, FitConfig(out, recipe.warm_up_steps, lr=recipe.warm_up_lr, seed=seed))


def train(
    core: Llama,
    tokenizer: Tokenizer,
    adapter: VisionAdapter,
    out: Path,
    data_root: Path | None,
    seed: int = 0,
    recipe: Recipe | None = None,
    eval_every: int = 0,
) -> dict[str, float]:
    """Both stages; returns the held-out figures. Without `data_root` the drawn scenes are all there is.

    Raises `DataError` where the data root holds no easy-VQA.
    """
    recipe = recipe or Recipe()
    size = adapter.config.image_size
    easy: dict[str, Sequence[Sample]] = {}
    if data_root is not None:
        easy = {split: easy_vqa(data_root, split, size) for split in ("train", "dev")}
    adapter.requires_grad_(True)
    if recipe.warm_up_steps:
        warm_up(adapter.encoder, size, out, seed, recipe)
    second = VisionTask(core, tokenizer, adapter, easy, seed, recipe)
    settings = FitConfig(out, recipe.steps, lr=recipe.lr, seed=seed, eval_every=eval_every, save_every=50)
    return fit(second, settings)


def card(adapter: VisionAdapter, figures: Mapping[str, float], command: str, easy: bool) -> str:
    """The model card that is saved beside the weights."""
    n = sum(parameter.numel() for parameter in adapter.parameters())
    data = "easy-VQA (MIT), train split, and scenes" if easy else "scenes"
    rows = "\n".join(
        f"| {name} | {value:.3f} | {figures[f'{name}_shuffled']:.3f} |"
        for name, value in figures.items()
        if f"{name}_shuffled" in figures
    )
    return f"""# Vision adapter

Gated cross-attention with a convolution-stem Vision Transformer, for the frozen core named by the hash in
`config.json`. {n:,} parameters, {adapter.config.image_size} x {adapter.config.image_size} pixels.

- **Data:** {data} that the project draws itself (shapes, colours, counts, places, words).
- **Command:** `{command}`
- **Limits:** it knows plain shapes and {len(WORDS)} written words on light backgrounds, not photographs.

Exact match on held-out pictures, and with the pictures shuffled between rows:

| skill | score | shuffled |
|---|---|---|
{rows}
"""
