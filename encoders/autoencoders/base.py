"""What an autoencoder is: images to latents and back, with the one scaling between its latents and a model's.

N images of R × R pixels; C, h, w the shape of a latent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from pathline.core.registry import Registry

__all__ = ["Autoencoder", "Moments", "registry"]


class Moments(NamedTuple):
    """The posterior of latents, unscaled.

    Attributes:
        mean: (N, C, h, w).
        std: the same; None of an autoencoder that is deterministic.
    """

    mean: Tensor
    std: Tensor | None


class Autoencoder(nn.Module, ABC):
    """A frozen autoencoder.

    Attributes:
        manifest: class, name, hash of its weights, range of its inputs, and its scaling with who computed it; fit for
            JSON. Latents of another one are told by it.
    """

    manifest: Mapping[str, Any]

    @abstractmethod
    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Return (C, h, w) of the latent of an image of ``resolution`` × ``resolution`` pixels.

        Raises:
            InputError: a resolution that it does not take.
        """

    @abstractmethod
    def moments(self, images: Tensor) -> Moments:
        """Return the unscaled posterior of images (N, 3, R, R), uint8 or floats in [−1, 1], in float32."""

    @abstractmethod
    def to_model(self, z: Tensor) -> Tensor:
        """Scale the autoencoder's latents (N, C, h, w) to those that a model is trained on."""

    @abstractmethod
    def to_autoencoder(self, z: Tensor) -> Tensor:
        """Undo ``to_model``."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Return the images (N, 3, R, R) in [−1, 1], not clamped, of a model's latents, in float32."""


registry: Registry[Autoencoder] = Registry("autoencoder", "encoders.autoencoders", Autoencoder)
