"""What a feature encoder is: images to tokens, frozen.

N images, C channels, T tokens on a grid of rows and columns, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pathline.core.errors import InputError, InputTypeError
from pathline.core.registry import Registry

__all__ = ["Encoder", "registry", "unit_images"]


class Encoder(nn.Module, ABC):
    """A frozen network whose patch tokens a model is aligned to, or compared in.

    Attributes:
        dim: width D of its tokens.
        grid: rows and columns of its tokens, T = rows·columns.
        manifest: which encoder it is, with a hash of its weights; fit for JSON.
    """

    dim: int
    grid: tuple[int, int]
    manifest: Mapping[str, Any]

    def check(self, images: Tensor) -> None:
        """Check shape and type of images before any is encoded; a subclass adds what it needs.

        Raises:
            InputError: not (N, C, H, W) with one channel or three.
            InputTypeError: neither uint8 nor floating point.
        """
        if not isinstance(images, Tensor) or (images.dtype != torch.uint8 and not images.is_floating_point()):
            came = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise InputTypeError(f"got images of type {came}, expected uint8 from 0 to 255 or floats in [−1, 1]")
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise InputError(f"got images of shape {tuple(images.shape)}, expected (N, 1, H, W) or (N, 3, H, W)")

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Return the patch tokens of images (N, C, H, W), uint8 or floats in [−1, 1], as (N, T, D), row by row."""


def unit_images(images: Tensor) -> Tensor:
    """Return checked images as floats in [0, 1] with three channels: uint8/255, or (x + 1)/2."""
    unit = images.float() / 255 if images.dtype == torch.uint8 else (images.float() + 1) / 2
    return unit.expand(-1, 3, -1, -1)


registry: Registry[Encoder] = Registry("encoder", "encoders", Encoder)
