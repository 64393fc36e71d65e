"""Vision transformers of timm as encoders, with the preprocessing that each was trained with.

N images, R side of an image, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pathline.core.errors import InputError, InputTypeError, WeightsError
from pathline.encoders import networks
from pathline.encoders.base import Encoder, registry, unit_images
from pathline.encoders.presets import PRESETS, Preset

__all__ = ["PatchEncoder"]

Side = int | tuple[int, int]


class PatchEncoder(Encoder):
    """A ViT of timm, in evaluation mode and without gradients for good.

    Images of side R are shown at side patch·R/16 (14·R/16 where REPA has 224·(R // 256)), resized bicubically without
    antialiasing as REPA does it; the model is made for that size, so that its position table is resampled when its
    weights are loaded.

    Args:
        name: of the encoder, for its manifest.
        preset: its row of the table.
        resolution: side R of the images, or (height, width); multiples of 16.
        weights: a file of weights, .safetensors or .pth; None takes those of timm's hub.
        final_norm: whether tokens are taken after the model's last norm.
        resize: whether images of another size are first brought to ``resolution`` (bicubic, antialiased); else they
            are refused.

    Raises:
        InputError: a resolution that 16 does not divide, or a model without patch tokens or without the norm.
        InputTypeError: a resolution that is neither a whole number nor two.
        MissingPackageError: timm cannot be imported.
        WeightsError: weights that cannot be had, or do not fit.
    """

    def __init__(
        self, name: str, preset: Preset, *, resolution: Side, weights: str | None, final_norm: bool, resize: bool
    ) -> None:
        super().__init__()
        self.name, self.preset, self.resize = name, preset, resize
        self.resolution = _sides(resolution)
        rows, columns = self.grid = (self.resolution[0] // 16, self.resolution[1] // 16)
        height, width = networks.patch_size(preset.model, preset.changes)
        self.size = (height * rows, width * columns)
        self.network, origin = _loaded(name, preset, self.size, weights)
        self.dim = int(self.network.num_features)
        if final_norm and isinstance(self.network.norm, nn.Identity):
            raise InputError(f"got final_norm for {preset.model}, which has no norm of its tokens; set it to false")
        if not final_norm:
            self.network.norm = nn.Identity()
        told: Any = self.network.pretrained_cfg
        mean, std = (torch.tensor(c)[:, None, None] for c in preset.colours or (told["mean"], told["std"]))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.requires_grad_(False).train()
        self.manifest = {
            "name": name,
            "model": preset.model,
            "resolution": list(self.resolution),
            "resize": resize,
            "final_norm": final_norm,
            "dim": self.dim,
            "grid": list(self.grid),
            **origin,
        }

    network: Any  # a ViT of timm, whose attributes have no types
    mean: Tensor
    std: Tensor

    def train(self, mode: bool = True) -> PatchEncoder:
        """Stay in evaluation mode, whatever is asked for."""
        super().train(False)
        return self

    def check(self, images: Tensor) -> None:
        """See ``Encoder``; images of another size than ``resolution`` are refused unless they are to be resized."""
        super().check(images)
        if not self.resize and tuple(images.shape[-2:]) != self.resolution:
            height, width = images.shape[-2:]
            raise InputError(
                f"got images of {height} × {width} for {self.name} at {self.resolution[0]} × {self.resolution[1]}; "
                "set its resolution to the images', or resize: true"
            )

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the patch tokens of images (N, C, H, W), uint8 or floats in [−1, 1], as (N, T, D), row by row.

        Raises:
            InputError: images of another shape, or a model that gives another number of tokens than its grid has.
            InputTypeError: neither uint8 nor floating point.
        """
        self.check(images)
        tokens: Tensor = self.network.forward_features(self.prepare(images))
        first, count = int(self.network.num_prefix_tokens), self.grid[0] * self.grid[1]
        if tokens.ndim != 3 or tokens.shape[1] != first + count:
            raise InputError(
                f"got tokens {tuple(tokens.shape)} from {self.preset.model}, expected {first} and {count} of a grid of "
                f"{self.grid[0]} × {self.grid[1]}; name a ViT without pooling of its tokens"
            )
        return tokens[:, first:]

    def prepare(self, images: Tensor) -> Tensor:
        """Return checked images as the network is shown them, (N, 3, *size).

        Colours are normalised first, as REPA has it for all but CLIP; the other order gives the same but for rounding,
        for the weights of an interpolation sum to 1.
        """
        x = unit_images(images)
        if tuple(x.shape[-2:]) != self.resolution:
            x = functional.interpolate(x, self.resolution, mode="bicubic", antialias=True).clamp(0, 1)
        x = (x - self.mean) / self.std
        return x if tuple(x.shape[-2:]) == self.size else functional.interpolate(x, self.size, mode="bicubic")


def _sides(resolution: Side) -> tuple[int, int]:
    sides = (resolution, resolution) if isinstance(resolution, int) else resolution
    if not isinstance(sides, tuple | list) or len(sides) != 2 or any(type(side) is not int for side in sides):
        raise InputTypeError(f"got resolution {resolution!r}, expected a whole number or two, as 256 or (256, 512)")
    height, width = sides
    if min(height, width) < 16 or height % 16 or width % 16:
        raise InputError(f"got resolution {resolution}, expected multiples of 16: one token stands for 16 pixels")
    return height, width


def _loaded(name: str, preset: Preset, size: tuple[int, int], weights: str | None) -> tuple[nn.Module, dict[str, str]]:
    """Return the network with its weights, and where these come from, with their hash."""
    if weights is None:
        if preset.local:
            raise WeightsError(
                f"got no weights for {name}, which timm's hub does not have; give weights: PATH of the authors' "
                "checkpoint (facebookresearch/moco-v3)"
            )
        network = networks.from_hub(preset.model, size, preset.changes)
        return network, {"weights": "hub", "sha256": networks.hash_of_tensors(network.state_dict())}
    path = Path(weights)
    state, sha256 = networks.read_state(path)
    network = networks.create(preset.model, size, preset.changes)
    networks.fill(network, networks.mocov3_state(state) if preset.local else state, path)
    return network, {"weights": "file", "sha256": sha256}


def _named(name: str, preset: Preset) -> Callable[..., Encoder]:
    """Return what builds a row of the table."""

    def build(
        *,
        resolution: int | tuple[int, int] = 256,
        weights: str | None = None,
        final_norm: bool = preset.final_norm,
        resize: bool = False,
    ) -> Encoder:
        return PatchEncoder(name, preset, resolution=resolution, weights=weights, final_norm=final_norm, resize=resize)

    build.__doc__ = f"Build {preset.model} of timm; see ``PatchEncoder``."
    return build


for _name, _preset in PRESETS.items():
    registry.register(_name)(_named(_name, _preset))


@registry.register("timm")
def any_vit(
    model: str,
    *,
    resolution: int | tuple[int, int] = 256,
    weights: str | None = None,
    final_norm: bool = True,
    resize: bool = False,
) -> Encoder:
    """Build any ViT of timm by its name there, with the colours that timm tells for its weights.

    Args:
        model: as ``vit_base_patch16_224.augreg_in21k``.
        resolution: see ``PatchEncoder``, as the rest.
        weights: a file of them; None takes those of timm's hub.
        final_norm: whether tokens are taken after the model's last norm.
        resize: whether images of another size are first resized.
    """
    preset = Preset(model, colours=None)
    return PatchEncoder("timm", preset, resolution=resolution, weights=weights, final_norm=final_norm, resize=resize)
