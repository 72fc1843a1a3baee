"""CTC over the core's own vocabulary, through its frozen embedding matrix or random codes of its tokens.

Axes: P clips, T adapter frames (80 ms), C core width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speech_adapter.chunks import FRAME_MS

FRAME_SECONDS = FRAME_MS / 1000  # of an encoder frame
_NO_LABEL = -100
_MARGIN = 12.0  # nats between a frame's own token and a typical other one when it lies on its embedding


class EmbeddingCTC(nn.Module):
    """Scores a frame x against token v by -sharpness · ½|x - e_v|², and against one learned blank vector.

    The nearer an adapter output lies to the embedding of what is said, the likelier: the loss pulls the
    outputs to where the frozen core already reads them as text. Only the blank vector is trained.

    With a seed of `codes` the e_v are random vectors instead, which lie far apart where the embeddings of
    words that the core treats alike lie close together; `denoise` then gives the embeddings. They depend on
    tokenizer and width only, so that what was learned with them serves every core that shares both.
    """

    embeddings: Tensor
    codes: Tensor | None
    half_norms: Tensor

    def __init__(self, embeddings: Tensor, codes: int | None = None) -> None:
        super().__init__()
        embeddings = embeddings.detach().float()
        self.register_buffer("embeddings", embeddings, persistent=False)
        coded = (
            None
            if codes is None
            else token_codes(len(embeddings), embeddings.shape[1], codes).to(embeddings.device)
        )
        self.register_buffer("codes", coded, persistent=False)
        table = self.table
        self.register_buffer("half_norms", 0.5 * table.square().sum(-1), persistent=False)
        # Half the mean squared distance of two embeddings is their total variance.
        self.sharpness = _MARGIN / float(table.var(dim=0).sum().clamp(min=1e-12))
        self.scale = float(table.std())
        self.offset = nn.Parameter(torch.zeros(table.shape[1]))

    @property
    def table(self) -> Tensor:
        """The vectors that stand for the tokens in what is heard, [V, C]."""
        return self.embeddings if self.codes is None else self.codes

    @property
    def blank(self) -> Tensor:
        """The blank vector [C], in units that the optimizer's step size suits."""
        return self.offset * self.scale

    @property
    def blank_id(self) -> int:
        """The blank's index, one past the vocabulary."""
        return self.table.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """x [P, T, C] → log-probabilities fp32 [P, T, V + 1]."""
        tokens = (x @ self.table.T).float() - self.half_norms
        blank = (x.float() * self.blank).sum(-1, keepdim=True) - 0.5 * self.blank.square().sum()
        return (self.sharpness * torch.cat((tokens, blank), dim=-1)).log_softmax(dim=-1)

    def loss(self, x: Tensor, lengths: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
        """Mean CTC loss in nats per target token; clips too short for their text count as zero."""
        return ctc_loss(self(x), lengths, targets, self.blank_id)

    def decode(self, x: Tensor, lengths: Tensor) -> list[list[int]]:
        """Greedy decoding: the best token of each frame, repeats merged, blanks dropped."""
        best = self(x).argmax(dim=-1)
        rows = []
        for row, length in zip(best, lengths.tolist(), strict=True):
            merged = torch.unique_consecutive(row[:length]).tolist()
            rows.append([token for token in merged if token != self.blank_id])
        return rows

    def merge(self, x: Tensor, lengths: Tensor) -> list[Tensor]:
        """The same on the vectors: neighbours that say the same token become their mean, blanks are dropped.

        x [P, T, C], lengths [P] → one [n, C] per clip, n at most its length. What remains stands as close
        together as written words, which is what a core that only ever read text can follow. Gradients reach
        the frames that are kept. Source of the idea: arXiv 2102.01578 (CTC-based compression).
        """
        best = self(x.detach()).argmax(dim=-1)
        rows = []
        for row, tokens, length in zip(x, best, lengths.tolist(), strict=True):
            runs, run_of_frame = torch.unique_consecutive(tokens[:length], return_inverse=True)
            share = F.one_hot(run_of_frame, len(runs)).to(row.dtype).T
            means = (share / share.sum(dim=1, keepdim=True)) @ row[:length]
            rows.append(means[runs != self.blank_id])
        return rows

    def denoise(self, x: Tensor) -> Tensor:
        """Vectors [n, C] → the mean embedding of the core that each stands for, [n, C].

        The scores are those of a Gaussian mixture around the embeddings, so this is the posterior mean of
        the token that was meant: a sure frame becomes the very embedding of its word, a doubtful one stays
        between.
        """
        scores = self.sharpness * ((x @ self.table.to(x.dtype).T).float() - self.half_norms)
        return (scores.softmax(dim=-1) @ self.embeddings.float()).to(x.dtype)


def token_codes(n_tokens: int, dim: int, seed: int) -> Tensor:
    """One standard normal vector per token, fp32 [n_tokens, dim].

    Saved adapters hold the seed alone: they rest on torch drawing the same numbers on a CPU, which a test
    pins.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_tokens, dim, generator=generator)


class PhonemeHead(nn.Module):
    """Names the phoneme of each 40 ms encoder frame; a scaffold for training, thrown away after it.

    espeak says when each phoneme begins, so synthetic clips need no alignment. The encoder learns to hear
    within a few hundred steps where CTC alone would still be looking for where the words are.
    """

    def __init__(self, dim: int, inventory: Sequence[str]) -> None:
        super().__init__()
        self.index = {name: i for i, name in enumerate(inventory)}
        self.out = nn.Linear(dim, len(inventory))

    def labels(self, starts: np.ndarray, phonemes: np.ndarray, n_frames: int, offset: float) -> list[int]:
        """The phoneme in the middle of each frame; `offset` seconds of silence stand before time zero."""
        middles = (np.arange(n_frames) + 0.5) * FRAME_SECONDS - offset
        current = np.searchsorted(starts, middles, side="right") - 1
        return [self.index[str(phonemes[i])] if i >= 0 else self.index["_"] for i in current]

    def loss(self, hidden: Tensor, labels: Sequence[Sequence[int] | None]) -> Tensor:
        """Mean cross-entropy over the frames of the clips [P, S, C'] that have labels; nats per frame."""
        target = torch.full(hidden.shape[:2], _NO_LABEL)
        for row, known in zip(target, labels, strict=True):
            if known is not None:
                row[: len(known)] = torch.tensor(known)
        scores = self.out(hidden).float()
        total = F.cross_entropy(
            scores.flatten(0, 1), target.flatten().to(scores.device), ignore_index=_NO_LABEL, reduction="sum"
        )
        return total / max(1, int((target != _NO_LABEL).sum()))


class CharacterCTC(nn.Module):
    """CTC over characters on the encoder's own frames of 40 ms; a scaffold for warming an encoder up.

    One letter takes longer than 40 ms, so that every text has room; case is not heard, and is left out.
    """

    def __init__(self, dim: int, alphabet: Sequence[str]) -> None:
        super().__init__()
        self.alphabet = tuple(alphabet)
        self.index = {character: i for i, character in enumerate(self.alphabet)}
        self.out = nn.Linear(dim, len(self.alphabet) + 1)

    def targets(self, text: str) -> list[int]:
        """Indices of the characters of a text; those outside the alphabet are left out."""
        return [self.index[character] for character in text.lower() if character in self.index]

    def forward(self, hidden: Tensor) -> Tensor:
        """[P, S, E] → log-probabilities fp32 [P, S, characters + 1], the blank last."""
        return self.out(hidden).float().log_softmax(dim=-1)

    def loss(self, hidden: Tensor, lengths: Tensor, texts: Sequence[str]) -> Tensor:
        """Mean CTC loss in nats per character; clips too short for their text count as zero."""
        targets = [self.targets(text) for text in texts]
        return ctc_loss(self(hidden), lengths, targets, len(self.alphabet))

    def decode(self, hidden: Tensor, lengths: Tensor) -> list[str]:
        """Greedy decoding."""
        best = self(hidden).argmax(dim=-1)
        rows = []
        for row, length in zip(best, lengths.tolist(), strict=True):
            merged = torch.unique_consecutive(row[:length]).tolist()
            rows.append("".join(self.alphabet[i] for i in merged if i < len(self.alphabet)))
        return rows


def ctc_loss(log_probs: Tensor, lengths: Tensor, targets: Sequence[Sequence[int]], blank: int) -> Tensor:
    """Mean over clips of the loss per target; log_probs [P, S, V + 1], lengths [P] real frames of each."""
    device = log_probs.device
    flat = torch.tensor([token for target in targets for token in target], dtype=torch.long, device=device)
    sizes = torch.tensor([len(target) for target in targets], device=device)
    return F.ctc_loss(log_probs.transpose(0, 1), flat, lengths, sizes, blank=blank, zero_infinity=True)
