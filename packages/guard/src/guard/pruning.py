"""Fewer layers and narrower feed-forward blocks, chosen by what the guard's own data needs.

As for Llama Guard 3-1B-INT4 (arXiv 2411.17713, section 2.1), with two differences: a layer's importance is
the change of the verdicts when it is left out, measured again after every layer that goes; a neuron's is the
mean size of what it adds to the residual stream.
Axes: B conversations, T positions, C model width, F width of the feed-forward block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core_llm.errors import UserError
from core_llm.layers import Block, FeedForward, Linear
from core_llm.lora import has_updates
from core_llm.model import Llama
from guard.batches import Batch
from guard.distillation import read_logits
from guard.prompt import VerdictTokens


@dataclass(frozen=True)
class Shape:
    """What is left of a core. layers: numbers of the old layers; ffn: neurons of each."""

    layers: tuple[int, ...]
    ffn: int


def check(core: Llama, layers: int | None, ffn: int | None, scheme: str | None = None) -> None:
    """Raise `UserError` for a shape that the core cannot be cut to or that cannot be quantised."""
    config = core.config
    if has_updates(core):
        raise UserError("this guard keeps its updates apart: train it without --keep-apart, then prune it")
    if not all(isinstance(block.mlp.down_proj, nn.Linear) for block in _blocks(core)):
        raise UserError("this guard is quantised: prune the guard that it was made from, then quantise that")
    for what, wanted, there in (("layers", layers, config.n_layers), ("ffn", ffn, config.ffn_dim)):
        if wanted is not None and not 1 <= wanted <= there:
            raise UserError(f"--{what} must be between 1 and the {there} of this guard, got {wanted}")
    if scheme == "int4" and (ffn or config.ffn_dim) % 64:
        raise UserError(
            f"int4 weights come in groups of 64: --ffn {ffn or config.ffn_dim} is not divisible by 64"
        )


def _readings(core: Llama, batches: Sequence[Batch], tokens: VerdictTokens) -> list[tuple[Tensor, Tensor]]:
    """Log-probabilities of the two verdicts [B, 2] and of the categories [B, K], in fp32."""
    found = []
    for batch in batches:
        logp, categories = read_logits(core, batch, core.hidden(batch.tokens))
        pair = logp[:, [tokens.safe, tokens.unsafe]].log_softmax(-1)
        found.append((pair, categories.log_softmax(-1)))
    return found


def _divergence(before: list[tuple[Tensor, Tensor]], after: list[tuple[Tensor, Tensor]]) -> float:
    """Mean Kullback-Leibler divergence in nats of verdict and categories, these as far as it is unsafe."""
    total, count = 0.0, 0
    for (pair, named), (new_pair, new_named) in zip(before, after, strict=True):
        verdict = F.kl_div(new_pair, pair, reduction="none", log_target=True).sum(-1)
        names = F.kl_div(new_named, named, reduction="none", log_target=True).nan_to_num(0.0).sum(-1)
        total += float((verdict + pair[:, 1].exp() * names).sum())
        count += len(pair)
    return total / max(1, count)


@torch.inference_mode()
def important_layers(core: Llama, batches: Sequence[Batch], tokens: VerdictTokens, keep: int) -> list[int]:
    """Numbers of the `keep` layers to keep, in order: one by one the layer goes whose loss changes least.

    batches: rows of `encode_forced`. Costs about L²/2 passes over them for L layers.
    """
    from tqdm import tqdm

    before = _readings(core, batches, tokens)
    blocks = list(core.layers)
    left = list(range(len(blocks)))
    rounds = len(blocks) - keep
    with tqdm(total=rounds, desc="importance of layers", unit="layer", leave=False) as bar:
        while len(left) > keep:
            damage = {}
            for number in left:
                core.layers = nn.ModuleList(blocks[i] for i in left if i != number)
                damage[number] = _divergence(before, _readings(core, batches, tokens))
            left.remove(min(damage, key=lambda number: damage[number]))
            bar.update(1)
    core.layers = nn.ModuleList(blocks)
    return left


@torch.inference_mode()
def neuron_importance(core: Llama, batches: Sequence[Batch]) -> list[Tensor]:
    """Importance [F] of each layer's neurons: mean |activation| of tokens times the norm of its column."""
    sums = [torch.zeros(b.mlp.down_proj.in_features, device=_device(core)) for b in _blocks(core)]
    real: list[Tensor] = []

    def count(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums[layer] += inputs[0][real[-1]].float().abs().sum(0)

        return hook

    hooks = [b.mlp.down_proj.register_forward_pre_hook(count(i)) for i, b in enumerate(_blocks(core))]
    try:
        for batch in batches:
            positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
            real.append(positions < batch.lengths[:, None])
            core.hidden(batch.tokens)
    finally:
        for hook in hooks:
            hook.remove()
    n = sum(int(mask.sum()) for mask in real)
    return [
        total / max(1, n) * block.mlp.down_proj.weight.float().norm(dim=0)
        for total, block in zip(sums, _blocks(core), strict=True)
    ]


def prune(
    core: Llama, batches: Sequence[Batch], tokens: VerdictTokens, layers: int | None, ffn: int | None
) -> Shape:
    """Cut the core in place; what is not given stays. Raises `UserError`, see `check`."""
    check(core, layers, ffn)
    kept = list(range(core.config.n_layers))
    if layers is not None and layers < len(kept):
        kept = important_layers(core, batches, tokens, layers)
        core.layers = nn.ModuleList(core.layers[i] for i in kept)
    width = ffn or core.config.ffn_dim
    if width < core.config.ffn_dim:
        importance = neuron_importance(core, batches)
        for block, scores in zip(_blocks(core), importance, strict=True):
            block.mlp = _narrowed(block.mlp, scores.topk(width).indices.sort().values)
    core.config = replace(core.config, n_layers=len(kept), ffn_dim=width)
    return Shape(tuple(kept), width)


def _narrowed(mlp: FeedForward, kept: Tensor) -> FeedForward:
    """The block with some of its neurons."""
    with torch.device("meta"):
        small = FeedForward(mlp.gate_proj.in_features, len(kept))
    for name, rows in (("gate_proj", True), ("up_proj", True), ("down_proj", False)):
        weight = mlp.get_parameter(f"{name}.weight").detach()
        cut = weight[kept] if rows else weight[:, kept]
        linear = Linear(1, 1)
        linear.weight = nn.Parameter(cut.clone(), requires_grad=False)
        linear.out_features, linear.in_features = cut.shape
        setattr(small, name, linear)
    return small.train(mlp.training)


def _device(core: Llama) -> torch.device:
    return core.embed_tokens.weight.device


def _blocks(core: Llama) -> list[Block]:
    return [cast(Block, block) for block in core.layers]
