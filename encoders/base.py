"""What a feature encoder is: images in [−1, 1] to tokens, frozen.

N images, T tokens on a grid of rows and columns, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from pathline.core.registry import Registry

__all__ = ["Encoder", "registry"]


class Encoder(nn.Module, ABC):
    """A frozen network whose patch tokens a model is aligned to, or compared in.

    Attributes:
        dim: width D of its tokens.
        grid: rows and columns of its tokens, T = rows·columns.
    """

    dim: int
    grid: tuple[int, int]

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Return the patch tokens of images (N, C, H, W) in [−1, 1], (N, T, D), row by row."""


registry: Registry[Encoder] = Registry("encoder", "encoders", Encoder)
