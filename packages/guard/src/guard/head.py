"""An output head that scores the tokens of a verdict and no others.

Llama Guard 3-1B-INT4 keeps 20 of 128,256 rows of its head (arXiv 2411.17713, section 2.2). Axes: R kept
tokens, V vocabulary, C model width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from core_llm.errors import CheckpointError, UserError
from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer
from guard.prompt import VerdictTokens, answer_ids


class VerdictHead(nn.Module):
    """Logits of some tokens; those of all others are minus infinity, so their probability is 0.

    weight [R, C], tokens [R]: the rows of a whole head, and which tokens they belong to.
    """

    tokens: Tensor

    def __init__(self, weight: Tensor, tokens: Tensor, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("tokens", tokens)
        self.vocab_size = vocab_size

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., C] → logits [..., V]."""
        kept = nn.functional.linear(hidden, self.weight)
        whole = kept.new_full((*kept.shape[:-1], self.vocab_size), float("-inf"))
        return whole.index_copy(-1, self.tokens, kept)

    @classmethod
    def load(cls, tensors: dict[str, Tensor], core: Llama, where: object) -> "VerdictHead":
        """From tensors as the state dict names them; raises `CheckpointError` unless they fit the core."""
        if set(tensors) != {"weight", "tokens"}:
            raise CheckpointError(f"{where}: holds {', '.join(sorted(tensors))} instead of weight and tokens")
        weight, tokens = tensors["weight"], tensors["tokens"].long()
        vocabulary, width = core.config.vocab_size, core.config.dim
        shapes_fit = tokens.dim() == 1 and weight.shape == (len(tokens), width) and len(tokens) > 0
        if not shapes_fit or not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
            raise CheckpointError(
                f"{where}: {tuple(weight.shape)} rows for {tuple(tokens.shape)} tokens do not fit a core of "
                f"width {width} with {vocabulary} tokens"
            )
        dtype = core.embed_tokens.weight.dtype
        return cls(weight.to(dtype), tokens, vocabulary)


def verdict_tokens(tokenizer: Tokenizer, codes: Sequence[str]) -> list[int]:
    """Every token that a verdict over these codes can hold, in the order of their ids."""
    VerdictTokens.of(tokenizer, list(codes))  # raises where the vocabulary cannot tell the answers apart
    found = set(answer_ids([], tokenizer)) | set(answer_ids(list(codes), tokenizer))
    # `\n\n` stands before the verdict of released guards; digits let policies name other codes.
    for text in ("\n\n", *map(str, range(10))):
        found |= set(tokenizer.encode(text))
    return sorted(found)


def cut_head(core: Llama, tokenizer: Tokenizer, codes: Sequence[str]) -> int:
    """Exchange the core's head for one over the tokens of a verdict; returns how many rows are left.

    Raises `UserError` where that has been done, or the head is quantised.
    """
    if isinstance(core.lm_head, VerdictHead):
        raise UserError("this guard's head is cut to the verdict's tokens already: leave --head out")
    weight = getattr(core.lm_head, "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        raise UserError("the head is quantised: cut the head of the guard that this one was made from")
    kept = torch.tensor(verdict_tokens(tokenizer, codes), device=weight.device)
    core.lm_head = VerdictHead(  # type: ignore[assignment]
        weight.detach()[kept].clone(), kept, core.config.vocab_size
    )
    return len(kept)
