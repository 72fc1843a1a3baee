"""Where the answer looked: cross-attention over the picture for every token of the answer.

Axes: T answer tokens, S memory positions, H query heads, G key/value heads, D head dim, R rows and
K columns of patches.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor, nn

from core_llm.adapters import Assistant
from core_llm.chat import Image, Message, Text
from core_llm.errors import UserError
from core_llm.sampling import Sampling
from vision_adapter.cross_attention import CrossAttentionBlock
from vision_adapter.encoders import ImageEncoder, View, mllama_view, nano_view
from vision_adapter.images import Picture, decode


@dataclass(frozen=True, eq=False)
class Explanation:
    """An answer, and where over the picture each of its tokens was read.

    tokens: the answer's, as text. maps [T, R, K]: the share of attention on each patch when the token was
    chosen, mean over layers and heads; sums to 1 with what fell on positions without a place. view: where
    the patches lie. picture: upright and RGB.
    """

    question: str
    answer: str
    tokens: tuple[str, ...]
    maps: Tensor
    view: View
    picture: Pillow.Image

    def heat(self, which: Tensor) -> np.ndarray:
        """A map [R, K] at the picture's own size [height, width], padding cut off, zero where none was read.

        In multiples of what attention spread evenly over the patches would give.
        """
        values = (which * which.numel()).float().numpy()
        rows, columns = values.shape
        width, height = self.picture.size
        left, top, right, bottom = self.view.box
        across, down = columns / (right - left), rows / (bottom - top)  # patches per pixel
        first = min(max(0, round(left)), width - 1), min(max(0, round(top)), height - 1)
        inner = (  # a pixel at least: of a very long picture some towers see less than that
            *first,
            max(first[0] + 1, min(width, round(right))),
            max(first[1] + 1, min(height, round(bottom))),
        )
        source = (
            max(0.0, (inner[0] - left) * across),
            max(0.0, (inner[1] - top) * down),
            min(float(columns), (inner[2] - left) * across),
            min(float(rows), (inner[3] - top) * down),
        )
        size = (inner[2] - inner[0], inner[3] - inner[1])
        seen = Pillow.fromarray(values).resize(size, Pillow.Resampling.BILINEAR, box=source)
        heat = np.zeros((height, width), np.float32)
        heat[inner[1] : inner[3], inner[0] : inner[2]] = np.asarray(seen)
        return heat


def explain(assistant: Assistant, picture: Picture, question: str, max_new_tokens: int = 64) -> Explanation:
    """Answer a question about a picture, greedily, and say where every token of the answer looked.

    Raises `MediaError` for an unreadable picture, `UserError` for an empty question or answer, or where no
    adapter reads pictures by cross-attention.
    """
    if not question.strip():
        raise UserError("the question is empty: ask something about the picture")
    adapter = _adapter(assistant)
    upright = decode(picture)
    conversation = [Message("user", [Image(upright), Text(question)])]
    completion = assistant.complete([conversation], Sampling(max_new_tokens=max_new_tokens))[0]
    if not completion.tokens:
        raise UserError("the model gave no answer, so there is nothing to explain; ask something else")
    layers = attention_weights(assistant, adapter, conversation, completion.tokens)
    mean = torch.stack([weights.mean(dim=0) for weights in layers.values()]).mean(dim=0)
    where = view(adapter, *upright.size)
    return Explanation(
        question=question,
        answer=completion.text.strip(),
        tokens=tuple(assistant.tokenizer.decode([token]) for token in completion.tokens),
        maps=mean[:, where.index.to(mean.device)].cpu(),
        view=where,
        picture=upright,
    )


@torch.inference_mode()
def attention_weights(
    assistant: Assistant, adapter: nn.Module, conversation: Sequence[Message], tokens: Sequence[int]
) -> dict[int, Tensor]:
    """Per cross-attention block, fp32 [H, T, S]: what the positions that choose `tokens` read of the picture.

    The conversation holds one picture and is answered by `tokens`; one pass without a cache.
    """
    core = assistant.core
    with recorded(adapter) as (queries, keys):
        request = assistant.prepare([conversation])
        if request.embeddings is None or request.interleave is None or _pictures(conversation) != 1:
            raise UserError("cross-attention is explained for a conversation with exactly one picture")
        answered = core.embed(
            torch.tensor([list(tokens[:-1])], dtype=torch.long, device=core.lm_head.weight.device)
        )
        embeddings = torch.cat([request.embeddings, answered.to(request.embeddings.dtype)], dim=1)
        positions = torch.arange(embeddings.shape[1], device=embeddings.device)[None]
        core.hidden(embeddings=embeddings, interleaved=request.interleave(positions))
    found = {}
    for layer, q in queries.items():
        q = q[0, :, request.width - 1 :].float()  # a token is chosen by the position before it
        k = keys[layer][0].float()
        k = k.repeat_interleave(len(q) // len(k), dim=0)
        found[layer] = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return found


def _pictures(conversation: Sequence[Message]) -> int:
    return sum(isinstance(part, Image) for message in conversation for part in message.parts)


def _adapter(assistant: Assistant) -> nn.Module:
    for adapter in assistant.adapters:
        blocks = getattr(adapter, "cross_attention", None)
        if adapter.part is Image and isinstance(adapter, nn.Module) and isinstance(blocks, nn.ModuleDict):
            return adapter
    raise UserError("this model has no adapter that reads pictures by cross-attention: attach one")


@contextmanager
def recorded(adapter: nn.Module) -> Iterator[tuple[dict[int, Tensor], dict[int, Tensor]]]:
    """Queries [B, H, T, D] and keys [P, G, S, D] of every cross-attention block, as they are computed."""
    queries: dict[int, Tensor] = {}
    keys: dict[int, Tensor] = {}

    def keep(module: nn.Module, inputs: Any, output: Tensor, into: dict[int, Tensor], layer: int) -> None:
        into[layer] = output

    hooks = []
    blocks = adapter.cross_attention
    assert isinstance(blocks, nn.ModuleDict)
    for name, block in blocks.items():
        assert isinstance(block, CrossAttentionBlock)
        for norm, into in ((block.q_norm, queries), (block.k_norm, keys)):
            hooks.append(norm.register_forward_hook(partial(keep, into=into, layer=int(name))))
    try:
        yield queries, keys
    finally:
        for hook in hooks:
            hook.remove()


def view(adapter: nn.Module, width: int, height: int) -> View:
    """Where the adapter's memory positions lie over a picture of `width` x `height` pixels.

    Raises `UserError` for an adapter whose positions have no known place.
    """
    from vision_adapter.adapter import VisionAdapter
    from vision_adapter.mllama_adapter import MllamaAdapter

    encoder = getattr(adapter, "encoder", None)
    if isinstance(encoder, ImageEncoder):
        return encoder.view(width, height)
    if isinstance(adapter, VisionAdapter):
        return nano_view(adapter.config, width, height)
    if isinstance(adapter, MllamaAdapter):
        return mllama_view(adapter.config, width, height)
    raise UserError(f"{type(adapter).__name__}: it is not known where its image positions lie")
