"""How the adapter learns: first the encoder to see, then the adapter to let a frozen core answer.

Axes: B pictures, T text positions, N answer tokens, C core width.
"""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core_llm.adapters import Spans
from core_llm.data.scenes import COLORS, KINDS, SHAPES, SKILLS, WORDS, questions, sample_scene
from core_llm.kernels import Mask
from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer
from core_llm.train.fit import FitConfig, fit
from vision_adapter.adapter import ImageMemory, VisionAdapter
from vision_adapter.encoder import Encoder
from vision_adapter.images import tile
from vision_adapter.samples import Packed, Sample, easy_vqa, pack, scene_sample, vary
from vision_adapter.scenes import ALPHABET, draw, draw_layout, layout, patch_labels

_NEVER = torch.iinfo(torch.long).max


@dataclass(frozen=True)
class Recipe:
    """What `vision-adapter train` does by default; tuned for the nano core on two CPU cores."""

    steps: int = 1200  # of the adapter
    warm_up_steps: int = 500  # encoder alone
    warm_up_pictures: int = 64
    warm_up_lr: float = 2e-3
    warm_up_kind_shares: tuple[float, ...] = (0.3, 0.35, 0.35)  # single, several, word
    pictures: int = 48  # per step of the adapter
    easy_share: float = 0.35  # of the pictures, where easy-VQA is at hand
    kind_shares: tuple[float, ...] = (0.25, 0.55, 0.2)  # of the drawn ones: single, several, word
    dialogues: int = 6  # per picture
    describe_share: float = 0.3
    lr: float = 1e-3
    gate_lr_scale: float = 30.0  # at the base rate the gates, zero at first, hold everything back
    encoder_lr_scale: float = 0.5


class EncoderTask:
    """Encoder warm-up: name colour, shape and letter under every patch, and the written word."""

    name = "encoder"

    def __init__(self, encoder: Encoder, size: int, seed: int, recipe: Recipe) -> None:
        dim = encoder.norm.normalized_shape[0]
        sizes = {"color": len(COLORS), "shape": len(SHAPES), "letter": len(ALPHABET), "word": len(WORDS)}
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

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Tiles [B, 3, size, size]; colours, shapes and letters [B, S]; words [B]."""
        rng = random.Random(f"{self.seed} {self.name} {step}")
        rows = []
        for _ in range(self.recipe.warm_up_pictures):
            scene = sample_scene(rng, rng.choices(KINDS, self.recipe.warm_up_kind_shares)[0])
            plan = layout(scene, rng)
            labels = [label.flatten() for label in patch_labels(plan, self.size // 8)]
            word = torch.tensor(WORDS.index(scene.word) + 1 if scene.word else 0)
            rows.append((tile(draw_layout(plan, rng, self.size), self.size), *labels, word))
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))

    def loss(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, float]]:
        """Sum of the cross-entropies, and how often each is right where there is something."""
        tiles, *targets = (tensor.to(next(self.encoder.parameters()).device) for tensor in batch)
        features = self.encoder(tiles)
        inputs = (features, features, features, features.amax(dim=1))
        total = torch.zeros((), device=tiles.device)
        figures = {}
        for (name, head), x, target in zip(self.heads.items(), inputs, targets, strict=True):
            logits = head(x).float()
            total = total + F.cross_entropy(logits.flatten(0, -2), target.flatten())
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

    def modules(self) -> Mapping[str, nn.Module]:
        """The adapter; the core is never touched."""
        return {"adapter": self.adapter}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Gates much faster than the rest, the warmed-up encoder slower."""
        named = list(self.adapter.named_parameters())
        gates = [p for name, p in named if name.endswith("_gate")]
        encoder = [p for name, p in named if name.startswith("encoder.")]
        rest = [p for name, p in named if not name.endswith("_gate") and not name.startswith("encoder.")]
        return [
            {"params": rest},
            {"params": encoder, "lr_scale": self.recipe.encoder_lr_scale},
            {"params": gates, "lr_scale": self.recipe.gate_lr_scale},
        ]

    def batch(self, step: int) -> Packed:
        """Pictures of easy-VQA and drawn ones, each with several dialogues."""
        rng = random.Random(f"{self.seed} {self.name} {step}")
        recipe, size = self.recipe, self.adapter.config.image_size
        samples = []
        for _ in range(recipe.pictures):
            if self.easy.get("train") and rng.random() < recipe.easy_share:
                sample = rng.choice(self.easy["train"])
            else:
                kind = rng.choices(KINDS, recipe.kind_shares)[0]
                n = 2 if kind == "word" else recipe.dialogues
                sample = scene_sample(kind, rng, size, n, recipe.describe_share)
            samples.append(vary(sample, rng, recipe.dialogues))
        return pack(samples, self.tokenizer, self.adapter.config.token_rows)

    def loss(self, batch: Packed) -> tuple[Tensor, dict[str, float]]:
        """Mean cross-entropy (nats per answer token), the share of right tokens, and the gates."""
        logits, targets, _ = self.answer_logits(batch)
        right = (logits.argmax(-1) == targets).float().mean().item()
        return F.cross_entropy(logits.float(), targets), {"token_accuracy": right, **self.adapter.gates()}

    def answer_logits(self, batch: Packed, shuffled: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [N, V] for every answer token, the tokens [N], and the number of their dialogue [N].

        Every picture is encoded once for all its dialogues. shuffled: each row sees the next row's picture.
        """
        device = self.core.embed_tokens.weight.device
        batch = replace(batch, **{name: value.to(device) for name, value in vars(batch).items()})
        rows = torch.arange(len(batch.tokens), device=device)
        memory = self.adapter.encode(batch.tiles)
        if shuffled:
            memory = memory.select(rows.roll(-1))
        hidden = self._hidden(batch, memory, rows)
        row, position = batch.loss_mask[:, 1:].nonzero(as_tuple=True)
        dialogue = row * (int(batch.documents.max()) + 1) + batch.documents[row, position + 1]
        return self.core.logits(hidden[row, position]), batch.tokens[row, position + 1], dialogue

    def _hidden(self, batch: Packed, memory: ImageMemory, rows: Tensor) -> Tensor:
        placed = torch.cat(self.adapter.place(memory))
        embeddings = self.core.embed(batch.tokens)
        embeddings = embeddings.index_put(batch.image.nonzero(as_tuple=True), placed.to(embeddings.dtype))
        spans = Spans(rows, batch.starts, torch.full_like(rows, _NEVER), batch.positions)
        return self.core.hidden(
            embeddings=embeddings,
            positions=batch.positions,
            mask=Mask.packed(batch.documents, shared_prefix=True),
            interleaved=self.adapter.interleave(memory, spans),
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
        for skill, samples in skill_samples(self.adapter.config.image_size, self.seed).items():
            figures[skill] = self.exact_match(samples)
            figures[f"{skill}_shuffled"] = self.exact_match(samples, shuffled=True)
        return figures


def skill_samples(size: int, seed: int, per_skill: int = 192) -> dict[str, list[Sample]]:
    """Drawn pictures of no training step with one question each, by skill."""
    rng = random.Random(f"{seed} held out")
    found: dict[str, list[Sample]] = defaultdict(list)
    while any(len(found[skill]) < per_skill for skill in SKILLS):
        scene = sample_scene(rng, rng.choices(KINDS, (3, 6, 1))[0])
        question = questions(scene, rng, 1)[0]
        if len(found[question.skill]) < per_skill:
            picture = tile(draw(scene, rng, size), size)
            found[question.skill].append(Sample(picture, [[(question.text, question.answer)]]))
    return {skill: found[skill] for skill in SKILLS}


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
        torch.manual_seed(seed)  # fixes the heads
        first = EncoderTask(adapter.encoder, size, seed, recipe)
        first.heads.to(adapter.projector.weight.device)
        fit(first, FitConfig(out, recipe.warm_up_steps, lr=recipe.warm_up_lr, seed=seed))
    second = VisionTask(core, tokenizer, adapter, easy, seed, recipe)
    return fit(second, FitConfig(out, recipe.steps, lr=recipe.lr, seed=seed, eval_every=eval_every))


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
