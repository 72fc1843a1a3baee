"""Llama: embed → blocks → norm → head, with the two seams that adapters use.

Axes: B batch, T text positions, C model width, V vocabulary.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from core_llm.cache import KVCache
from core_llm.config import LlamaConfig
from core_llm.errors import UserError
from core_llm.kernels import Mask
from core_llm.layers import Block, Linear, RMSNorm
from core_llm.rope import rope_frequencies, rotations


class Llama(nn.Module):
    """A Llama 3 decoder. Source: arXiv 2407.21783, section 3.2.

    Seam 1: `hidden` takes token ids or ready embeddings. Seam 2: `interleaved[i]` is called with the
    hidden states before block i. Without either, the pass is exactly the text model's.
    """

    frequencies: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = Linear(config.dim, config.vocab_size)
        if config.tied_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Llama":
        """What `to`, `bfloat16`, `cuda` and their like do; the rotary frequencies stay at least fp32.

        Rounded to bf16 they turn far positions by wrong angles, which multiplies the error of the logits.
        """
        super()._apply(fn, recurse)
        if self.frequencies.itemsize < 4:
            self.frequencies = rope_frequencies(self.config).to(self.frequencies.device)
        return self

    def initialise(self, seed: int) -> "Llama":
        """Fresh weights: normal with deviation 1/sqrt(C), residual outputs shrunk by depth."""
        generator = torch.Generator().manual_seed(seed)
        deviation = self.config.dim**-0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                nn.init.ones_(parameter)
                continue
            shrink = (
                (2 * self.config.n_layers) ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight"))
                else 1
            )
            nn.init.normal_(parameter, std=deviation * shrink, generator=generator)
        return self

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [B, T] → embeddings [B, T, C]."""
        return self.embed_tokens(tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., C] → next-token logits [..., V]."""
        return self.lm_head(hidden)

    def hidden(
        self,
        tokens: Tensor | None = None,
        *,
        embeddings: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Mask | None = None,
        cache: KVCache | None = None,
        lengths: Tensor | None = None,
        interleaved: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
    ) -> Tensor:
        """Final hidden states [B, T, C] of `tokens` [B, T] or `embeddings` [B, T, C].

        positions [B, T] default to 0..T-1, or to what follows the cache; mask defaults to causal.
        With a cache, the new keys are appended; `lengths` [B] says how many of the T positions are
        real in each row (right padding), all of them by default.
        Raises `UserError` where the text is longer than the model's context.
        """
        if (tokens is None) == (embeddings is None):
            raise ValueError("give token ids or embeddings, one of the two")
        x = self.embed(tokens) if tokens is not None else embeddings
        assert x is not None
        n_new = x.shape[1]
        if positions is None:
            positions = cache.positions(n_new) if cache else torch.arange(n_new, device=x.device)[None]
        if cache is None:
            self._check_length(n_new)
        else:
            cache.check_room(n_new)
        if mask is None:
            begun = cache is not None and (cache.longest or cache.static)
            mask = Mask.cached(cache.lengths) if cache and begun else Mask.causal()
        rotation = rotations(positions, self.frequencies, x.dtype)
        for index, block in enumerate(self.layers):
            if interleaved and index in interleaved:
                x = interleaved[index](x)
            x = block(x, rotation, mask, cache, index)
        if cache is not None:
            cache.advance(n_new, lengths)
        return self.norm(x)

    def forward(self, tokens: Tensor | None = None, **kwargs: object) -> Tensor:
        """Logits [B, T, V]; takes what `hidden` takes."""
        return self.logits(self.hidden(tokens, **kwargs))  # type: ignore[arg-type]

    def _check_length(self, length: int) -> None:
        if length > self.config.max_positions:
            raise UserError(
                f"the text is {length} tokens long, the model's context holds {self.config.max_positions}; "
                "shorten the prompt"
            )
