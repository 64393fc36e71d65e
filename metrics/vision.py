"""What a vision transformer of timm makes of a whole image: FD-DINOv2 is the Fréchet distance of it.

N images, D features; a model has g × g patches.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from pathline.core.errors import InputError
from pathline.encoders import networks
from pathline.encoders.base import unit_images
from pathline.metrics.features import Features, as_levels, full_precision, registry

__all__ = ["VisionTransformer", "hub_table"]

_DINOV2 = re.compile(r"vit_\w+_patch14_dinov2(\.|$)")  # those with registers were released with timm's rule


@registry.register("timm")
class VisionTransformer(Features):
    """Features of a ViT of timm for a whole image, as its head would get them: of DINOv2 the class token, normalised.

    Images are taken as levels 0 … 255, resized bicubically with antialiasing and not clamped, and given the mean and
    standard deviation of colours that the model was trained with, as EDM2 does for FD-DINOv2 (arXiv:2312.02696), which
    is ``vit_large_patch14_dinov2.lvd142m`` at 224 × 224. Encoders that models are aligned to are shown images
    otherwise. The position table of DINOv2 without registers is resampled as its authors' code does
    (``hub_table``), that of other models as timm does.

    Args:
        model: its name in timm, with the tag of its weights.
        weights: a file of them, .safetensors or .pth; None takes those of timm's hub.
        size: side that images are resized to.

    Raises:
        MissingPackageError: timm cannot be imported.
        UnknownNameError: timm has no such model.
        InputError: it is no ViT, or does not take the size.
        WeightsError: weights that cannot be had, or do not fit.
    """

    def __init__(self, model: str, weights: str | None = None, size: int = 224) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(f"got size {size!r}, expected a whole number of pixels")
        self.name, self.size = model, (size, size)
        self.network, sha256, table = _loaded(model, self.size, weights)
        told = self.network.pretrained_cfg
        self.mean, self.std = (torch.tensor(told[key])[:, None, None] for key in ("mean", "std"))
        self.sizes = {"features": int(self.network.num_features)}
        self.manifest = {
            "name": "timm",
            "model": model,
            "sha256": sha256,
            "size": size,
            "resize": "bicubic, antialiased",
            "position_table": table,
            "sizes": self.sizes,
        }

    network: Any  # a model of timm, whose attributes have no types

    def to(self, device: torch.device) -> None:
        """Move the network to a device."""
        self.network.to(device)
        self.mean, self.std, self.device = self.mean.to(device), self.std.to(device), device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the features, (N, D), in float32."""
        x = unit_images(as_levels(images.to(self.device)))
        x = functional.interpolate(x, self.size, mode="bicubic", antialias=True)
        with full_precision():
            features: Tensor = self.network((x - self.mean) / self.std)
        return features.float()


def _loaded(model: str, size: tuple[int, int], weights: str | None) -> tuple[nn.Module, str, str]:
    """Return the network, the hash of its weights, and whose rule its position table was resampled by."""
    hub = _DINOV2.match(model) is not None
    with torch.device("meta"):
        patches: Any = networks.create(model, None, {}).patch_embed
    if weights is None:
        native = networks.from_hub(model, patches.img_size, {})
        sha256 = networks.hash_of_tensors(native.state_dict())
    else:
        path = Path(weights).expanduser()
        state, sha256 = networks.read_state(path)
        native = networks.create(model, None, {})
        networks.fill(native, state, path)
    network: Any = networks.create(model, size, {})
    tensors = native.state_dict()
    if hub:
        rows, columns = network.patch_embed.grid_size
        tensors["pos_embed"] = hub_table(tensors["pos_embed"], (rows, columns))
        network.load_state_dict(tensors)
    else:
        networks.fill(network, tensors, Path(weights or model))
    network.requires_grad_(False).eval()
    return network, sha256, "DINOv2's" if hub else "timm's"


def hub_table(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return DINOv2's position table (1, 1 + g², D) for another grid, as the authors' released code resamples it.

    Bicubic without antialiasing, by the factor (rows + 0.1)/g: the 0.1 was put there against rounding and is part of
    what the published features are. A table of that grid is returned as it is.
    """
    first, patches = table[:, :1], table[:, 1:]
    side = round(patches.shape[1] ** 0.5)
    if (side, side) == grid:
        return table
    factors = [(count + 0.1) / side for count in grid]
    x = rearrange(patches, "n (h w) d -> n d h w", h=side)
    x = functional.interpolate(x, scale_factor=factors, mode="bicubic")
    return torch.cat((first, rearrange(x, "n d h w -> n (h w) d")), dim=1)
