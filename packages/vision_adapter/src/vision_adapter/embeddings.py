"""Pictures and texts as unit vectors, for curation: plain pixels, or an open_clip model.

Axes: N pictures or texts, D width of a vector.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image as Pillow

from core_llm.errors import UserError

PIXELS = "pixels"
_SIDE = 16  # of the thumbnail, pixels


class Embedder(Protocol):
    """What curation needs of a model."""

    def images(self, pictures: Sequence[Pillow.Image]) -> np.ndarray:
        """RGB pictures → fp32 unit vectors [N, D]."""
        ...


class TextEmbedder(Embedder, Protocol):
    """One whose texts lie in the space of its pictures."""

    def texts(self, captions: Sequence[str]) -> np.ndarray:
        """Captions → fp32 unit vectors [N, D]."""
        ...


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows [N, D] of length one; a zero row stays zero."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(length, 1e-12)).astype(np.float32)


class PixelEmbedder:
    """A thumbnail's pixels, their mean taken off: copies, scaled and re-encoded pictures lie together.

    It knows nothing of content: for crops and mirrored pictures an open_clip model is needed.
    """

    def images(self, pictures: Sequence[Pillow.Image]) -> np.ndarray:
        """RGB pictures → fp32 unit vectors [N, 3 · 16 · 16]."""
        rows = []
        for picture in pictures:
            small = picture.resize((_SIDE, _SIDE), Pillow.Resampling.BOX)
            pixels = np.asarray(small, dtype=np.float32).reshape(-1)
            rows.append(pixels - pixels.mean())
        return unit(np.stack(rows)) if rows else np.zeros((0, 3 * _SIDE * _SIDE), np.float32)


class ClipEmbedder:
    """Both towers of an open_clip model.

    pretrained: a tag of open_clip (fetched from the hub) or a file of weights; "" for random ones, which is
    good for tests alone. Raises `UserError` for a name that open_clip does not have, or weights out of reach.
    """

    def __init__(self, model: str, pretrained: str, device: str = "cpu") -> None:
        import open_clip
        import torch

        if model not in open_clip.list_models():
            raise UserError(f"open_clip has no model '{model}'; see `open_clip.list_models()`")
        try:
            self.model, _, self.preprocess = open_clip.create_model_and_transforms(
                model, pretrained=pretrained or None, device=device
            )
        except Exception as error:  # the hub's client raises many kinds
            raise UserError(
                f"open_clip model {model}: weights '{pretrained}' cannot be loaded "
                f"({type(error).__name__}); check the tag and the network, or give a file"
            ) from error
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(model)
        self.device = torch.device(device)

    def images(self, pictures: Sequence[Pillow.Image]) -> np.ndarray:
        """RGB pictures → fp32 unit vectors [N, D]."""
        import torch

        with torch.inference_mode():
            pixels = torch.stack([self.preprocess(picture) for picture in pictures])
            return self.model.encode_image(pixels.to(self.device), normalize=True).float().cpu().numpy()

    def texts(self, captions: Sequence[str]) -> np.ndarray:
        """Captions → fp32 unit vectors [N, D]; what exceeds the model's context is cut."""
        import torch

        with torch.inference_mode():
            tokens = self.tokenizer(list(captions)).to(self.device)
            return self.model.encode_text(tokens, normalize=True).float().cpu().numpy()
