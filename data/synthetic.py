"""Made-up samples of any size: for benchmarks, and for models whose data are not at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pathline.core.draws import Draws
from pathline.core.errors import InputError
from pathline.data.base import Batch, Dataset, Indices, as_indices, registry

__all__ = ["Synthetic"]


@registry.register("synthetic")
class Synthetic(Dataset):
    """Standard normal values and random labels; sample i is a function of (seed, i).

    Args:
        shape: (C, H, W) of one sample; the default is a latent of 256 × 256 pixels.
        num_classes: labels 0 … num_classes − 1, each as likely; 0 for no labels, which are then all 0.
        count: number of samples.
        seed: of the samples.

    Raises:
        InputError: another number of sizes than three, or one below 1.
    """

    data_are_images = False

    def __init__(
        self, shape: Sequence[int] = (4, 32, 32), *, num_classes: int = 1000, count: int = 1024, seed: int = 0
    ) -> None:
        if len(shape) != 3 or min(*shape, count) < 1 or num_classes < 0:
            raise InputError(
                f"got shape {tuple(shape)}, num_classes {num_classes} and count {count}; expected three sizes "
                "(C, H, W) and a count of 1 or more"
            )
        self.shape = (shape[0], shape[1], shape[2])
        self.num_classes, self.count, self.draws = num_classes, count, Draws(seed)

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: Indices) -> Batch:
        """Return drawn values, labels and indices."""
        index = as_indices(indices, len(self))
        labels = (self.draws.uniform("synthetic label", index) * self.num_classes).long()
        return {"data": self.draws.normal("synthetic data", index, self.shape), "label": labels, "index": index}

    @property
    def statistics(self) -> dict[str, Any]:
        """Mean and standard deviation of each channel's law, and the range of what can be drawn."""
        channels = self.shape[0]
        return {"mean": [0.0] * channels, "std": [1.0] * channels, "range": [-6.7, 6.7]}

    @property
    def manifest(self) -> dict[str, Any]:
        """Name, count, shape, classes and seed, which are all there is to know."""
        return {
            "name": "synthetic",
            "count": len(self),
            "shape": list(self.shape),
            "num_classes": self.num_classes,
            "values": "standard normal",
            "seed": self.draws.seed,
        }
