"""Any image tower of open_clip as an `ImageEncoder`: its tokens before pooling, its own preprocessing.

Axes: P pictures, S positions of one picture, E tower width, R rows and K columns of patches.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core_llm.errors import UserError
from vision_adapter.encoders import Features, View
from vision_adapter.images import Picture, decode


class OpenClipEncoder(nn.Module):
    """The image tower of `open_clip.create_model(name, pretrained)`; text tower and pooling go unused.

    pretrained: a tag of open_clip, fetched from the hub, or a file of weights; None for random ones, which a
    checkpoint then fills. Vision Transformers (with the tower's last norm where it precedes pooling),
    ResNets and towers of timm. Raises `UserError` for an unknown name, or weights out of reach.
    """

    def __init__(self, name: str, pretrained: str | None = None) -> None:
        super().__init__()
        from open_clip.transform import PreprocessCfg, image_transform_v2

        self.tower = _tower(name, pretrained)
        self.preprocessing = PreprocessCfg(**self.tower.preprocess_cfg)  # type: ignore[arg-type]
        self.transform = image_transform_v2(self.preprocessing, is_train=False)
        size = self.preprocessing.size
        self.image_size: tuple[int, int] = (size, size) if isinstance(size, int) else (size[0], size[1])
        # One pass tells width and grid of a tower of any kind.
        training = self.tower.training
        with torch.no_grad():
            tokens, self.n_extra, self.grid = _tokens(self.tower.eval(), torch.zeros(1, 3, *self.image_size))
        self.tower.train(training)
        self.width = tokens.shape[2]

    def preprocess(self, pictures: Sequence[Picture]) -> Tensor:
        """Pictures → fp32 [P, 3, height, width]. Raises `MediaError` that names the unreadable one."""
        if not pictures:
            return torch.zeros(0, 3, *self.image_size)
        return torch.stack([self.transform(decode(picture)) for picture in pictures])

    def encode(self, inputs: Tensor) -> Features:
        """[P, 3, height, width] → tokens before pooling, those of no place (class token) first."""
        weight = next(self.tower.parameters())
        tokens = _tokens(self.tower, inputs.to(weight.device, weight.dtype))[0]
        return Features(tokens.flatten(0, 1), (tokens.shape[1],) * len(tokens))

    def view(self, width: int, height: int) -> View:
        """The preprocessing crops the middle, pads around it, or squashes, as the tower was trained."""
        index = torch.arange(self.grid[0] * self.grid[1]).view(self.grid) + self.n_extra
        high, wide = self.image_size
        if self.preprocessing.resize_mode == "squash":
            return View(index, (0.0, 0.0, float(width), float(height)))
        choose = min if self.preprocessing.resize_mode == "longest" else max
        scale = choose(wide / width, high / height)
        across, down = wide / scale, high / scale  # of what the tower sees, in pixels of the picture
        left, top = (width - across) / 2, (height - down) / 2
        return View(index, (left, top, left + across, top + down))


def _tower(name: str, pretrained: str | None) -> Any:
    import open_clip

    if ":" not in name and name not in open_clip.list_models():
        raise UserError(f"open_clip has no model '{name}'; see open_clip.list_models()")
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # it logs what goes wrong beside raising it
    try:
        return open_clip.create_model(
            name, pretrained=pretrained or None, load_weights=bool(pretrained)
        ).visual
    except Exception as error:  # the hub's client raises many kinds
        if not pretrained and ":" not in name:
            raise
        raise UserError(
            f"open_clip model {name}: weights '{pretrained or name}' cannot be loaded "
            f"({type(error).__name__}: {' '.join(str(error).split())[:120]}); check tag and network"
        ) from error
    finally:
        logging.disable(level)


def _tokens(tower: Any, pixels: Tensor) -> tuple[Tensor, int, tuple[int, int]]:
    """Tokens [P, S, E], how many of them stand for no place, and the grid (R, K) of the others."""
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if isinstance(tower, VisionTransformer):
        found = tower.forward_intermediates(
            pixels,
            indices=1,
            intermediates_only=True,
            normalize_intermediates=tower.attn_pool is None and not tower.final_ln_after_pool,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        extra, patches = found["image_intermediates_prefix"][-1], found["image_intermediates"][-1]
        grid = (tower.grid_size[0], tower.grid_size[1])
        return torch.cat([extra, patches], dim=1), extra.shape[1], grid
    if isinstance(tower, ModifiedResNet):
        found = tower.forward_intermediates(pixels, indices=1, intermediates_only=True)
        return _flat(found["image_intermediates"][-1])
    if not isinstance(tower, TimmModel):
        raise UserError(f"open_clip's {type(tower).__name__} gives no tokens; choose another model")
    features = tower.trunk.forward_features(pixels)
    if features.dim() == 4:
        return _flat(features if features.shape[1] == tower.trunk.num_features else features.movedim(3, 1))
    n_extra = int(getattr(tower.trunk, "num_prefix_tokens", 0))
    rows, columns = tower.trunk.patch_embed.grid_size
    return features, n_extra, (rows, columns)


def _flat(channels: Tensor) -> tuple[Tensor, int, tuple[int, int]]:
    """[P, E, R, K] → [P, R·K, E], all of them with a place."""
    return channels.flatten(2).transpose(1, 2), 0, (channels.shape[2], channels.shape[3])
