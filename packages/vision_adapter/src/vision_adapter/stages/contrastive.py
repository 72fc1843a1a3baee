"""Contrastive pre-training of the image encoder: pictures and their captions meet in one space.

open_clip gives the loss and the text tower; the tower and both projections are thrown away afterwards.
Axes: B pairs, S patches, E encoder width, D shared width, T caption tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core_llm import processes
from core_llm.data.rows import spread
from core_llm.tokenizer import Tokenizer
from core_llm.train.accumulate import accumulated, split
from core_llm.train.answers import picked
from vision_adapter.encoders import ImageEncoder, encoder_of, keep_statistics
from vision_adapter.examples import Example, only_pairs
from vision_adapter.stages.presets import StageConfig

if TYPE_CHECKING:
    from vision_adapter.adapter import ImageAdapter

_FIRST_SCALE, _LAST_SCALE = 1 / 0.07, 100.0  # of the logits (arXiv 2103.00020, section 2.5)


class TwoTowers(nn.Module):
    """The image encoder with mean pooling and a projection, a text tower, and the temperature."""

    def __init__(self, adapter: nn.Module, tokenizer: Tokenizer, config: StageConfig) -> None:
        super().__init__()
        from open_clip.transformer import TextTransformer

        # A tuple: the module that is trained and stored is the encoder itself.
        self._reader = (encoder_of(adapter),)
        self.encoder = adapter.encoder
        self.image_projection = nn.Linear(self.reader.width, config.embedding, bias=False)
        self.text = TextTransformer(
            context_length=config.text_length,
            vocab_size=tokenizer.vocab_size,
            width=config.text_dim,
            heads=config.text_heads,
            layers=config.text_layers,
            output_dim=config.embedding,
            pool_type="eos",
            eos_id=tokenizer.eot_id,
        )
        self.log_scale = nn.Parameter(torch.tensor(_FIRST_SCALE).log())

    @property
    def reader(self) -> ImageEncoder:
        """The encoder, as something that prepares pictures too."""
        return self._reader[0]

    def train(self, mode: bool = True) -> "TwoTowers":
        """As `nn.Module.train`, but for statistics over a batch, which stay as they are."""
        super().train(mode)
        keep_statistics(self.encoder)
        return self

    def images(self, inputs: Any) -> Tensor:
        """What the encoder made of B pictures → unit vectors [B, D]."""
        features = self.reader.encode(inputs)
        if len(set(features.counts)) == 1:
            pooled = features.values.unflatten(0, (len(features.counts), -1)).mean(dim=1)
        else:
            pooled = torch.stack([part.mean(dim=0) for part in features.values.split(features.counts)])
        return F.normalize(self.image_projection(pooled).float(), dim=-1)

    def texts(self, tokens: Tensor) -> Tensor:
        """[B, T] → unit vectors [B, D]."""
        return F.normalize(self.text(tokens).float(), dim=-1)

    def scale(self) -> Tensor:
        """Factor of the cosines."""
        return self.log_scale.exp().clamp(max=_LAST_SCALE)


class ContrastiveTask:
    """Trains the encoder of an adapter; the rest of the adapter and the core take no part."""

    name = "contrastive"

    def __init__(
        self,
        tokenizer: Tokenizer,
        adapter: "ImageAdapter",
        examples: Sequence[Example],
        held_out: Sequence[Example],
        config: StageConfig,
        seed: int = 0,
    ) -> None:
        from open_clip.loss import ClipLoss

        only_pairs((*examples, *held_out), "contrastive")
        torch.manual_seed(seed)  # fixes the text tower
        adapter.requires_grad_(False)
        adapter.encoder.requires_grad_(True)
        self.towers = TwoTowers(adapter, tokenizer, config)
        self.towers.to(adapter.projector.weight.device)
        self.tokenizer, self.config, self.seed = tokenizer, config, seed
        self.examples, self.held_out = examples, spread(held_out, 256)
        self.clip_loss = ClipLoss()

    def modules(self) -> Mapping[str, nn.Module]:
        """Both towers."""
        return {"towers": self.towers}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All at one rate."""
        return [{"params": list(self.towers.parameters())}]

    def batch(self, step: int) -> list[Example]:
        """Pairs of the step."""
        return picked(self.examples, step, self.config.batch, f"{self.seed} {self.name}")

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Ids [B, T], each caption cut to fit and closed by an end token."""
        length = self.config.text_length
        rows = [self.tokenizer.encode(text)[: length - 1] + [self.tokenizer.eot_id] for text in captions]
        pad = self.tokenizer.pad_id
        filled = [row + [pad] * (length - len(row)) for row in rows]
        return torch.tensor(filled, device=self.towers.log_scale.device)

    def _inputs(self, examples: Sequence[Example]) -> tuple[Any, Tensor]:
        return self.towers.reader.preprocess([e.image for e in examples]), self.tokens(
            [e.caption for e in examples]
        )

    def loss(self, batch: Sequence[Example]) -> tuple[Tensor, dict[str, float]]:
        """The symmetric loss over all pairs of the batch; retrieval accuracy and the scale.

        Each picture is told from all captions of the batch, so the micro-batches cannot be taken alone: the
        features of all come first, without a graph, then each micro-batch passes again and receives the
        gradient of its own features (arXiv 2101.06983). Under torchrun the features of all processes meet the
        same way, and the loss is that of the whole batch in each of them.
        """
        parts = [self._inputs(part) for part in split(batch, self.config.micro_batch)]
        together = processes.count() > 1 and torch.is_grad_enabled()  # else every process has the same pairs
        if len(parts) == 1 and not together:
            images, texts = self.towers.images(parts[0][0]), self.towers.texts(parts[0][1])
            return self.clip_loss(images, texts, self.towers.scale()), self._figures(images, texts)
        with torch.no_grad():
            images = torch.cat([self.towers.images(pixels) for pixels, _ in parts])
            texts = torch.cat([self.towers.texts(tokens) for _, tokens in parts])
        n, start = len(images), 0
        if together:
            start = sum(processes.gathered(n)[: processes.rank()])
            images, texts = processes.all_rows(images), processes.all_rows(texts)
        # `fit` weighs a process by its rows, which is right for means over rows, as this loss is not.
        factor = len(images) / n
        losses = self._pieces(parts, images.requires_grad_(), texts.requires_grad_(), start, factor)
        total = accumulated(losses, list(self.towers.parameters()))
        return total, self._figures(images.detach(), texts.detach())

    def _pieces(
        self,
        parts: Sequence[tuple[Any, Tensor]],
        images: Tensor,
        texts: Tensor,
        start: int,
        factor: float,
    ) -> Iterator[Tensor]:
        """Scalars whose values sum to the loss and whose gradients sum to its gradient.

        images, texts: all vectors [B, D]; those of `parts` begin at row `start`, and their gradients are
        multiplied by `factor`.
        """
        loss = self.clip_loss(images, texts, self.towers.scale())
        if not torch.is_grad_enabled():
            yield loss
            return
        by_image, by_text = torch.autograd.grad(loss, (images, texts), retain_graph=True)
        yield loss  # of the parameters only the scale is in its graph
        for pixels, tokens in parts:
            end = start + len(tokens)
            surrogate = (self.towers.images(pixels) * by_image[start:end]).sum()
            surrogate = surrogate + (self.towers.texts(tokens) * by_text[start:end]).sum()
            surrogate = factor * surrogate
            yield surrogate - surrogate.detach()  # the value is in `loss` already
            start = end

    def _figures(self, images: Tensor, texts: Tensor) -> dict[str, float]:
        found = (images.detach() @ texts.detach().T).argmax(dim=1)
        right = (found == torch.arange(len(found), device=found.device)).float().mean().item()
        return {"retrieved": right, "scale": self.towers.scale().item()}

    def evaluate(self) -> dict[str, float]:
        """On held-out pairs: the loss, how often a picture finds its caption, and the share by chance."""
        if len(self.held_out) < 2:
            return {}
        loss, figures = self.loss(self.held_out)
        return {
            "held_out_loss": loss.item(),
            "held_out_retrieved": figures["retrieved"],
            "chance": 1 / len(self.held_out),
        }
