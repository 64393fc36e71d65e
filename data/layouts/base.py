"""Latents as other programs stored them: read as they are, brought to model space by one affine map a channel.

N samples; C, H, W the shape of one latent.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathline.core.draws import BoundDraws, Draws, send
from pathline.core.errors import DataError, InputError, InputTypeError
from pathline.data.base import Batch, Dataset, Indices, as_indices
from pathline.data.visits import NOISE, posterior_noise

__all__ = [
    "SURVEYED",
    "LatentScaling",
    "StoredLatents",
    "check_deviations",
    "check_label",
    "check_options",
    "moments",
]

SURVEYED = 10_000  # samples that the statistics are taken over
_CHUNK = 256


class LatentScaling(NamedTuple):
    """Model space from stored latents, channel by channel: (z − mean)/std.

    Attributes:
        mean: (C,).
        std: (C,).
        source: who says so.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str

    @classmethod
    def by(cls, factor: float, channels: int, source: str) -> LatentScaling:
        """Return the scaling that multiplies by one factor: mean 0, std 1/factor."""
        return cls((0.0,) * channels, (1 / factor,) * channels, source)

    def apply(self, values: Tensor) -> Tensor:
        """Scale stored latents (N, C, H, W), in float32, on the device where they are."""
        mean, inverse = (
            send(torch.tensor(numbers, dtype=torch.float32), values.device).reshape(1, -1, 1, 1)
            for numbers in (self.mean, [1 / std for std in self.std])
        )
        return (values.float() - mean) * inverse


class StoredLatents(Dataset):
    """Latents, or an autoencoder's moments (its posterior's mean and standard deviation), in model space.

    A subclass sets ``name``, ``shape``, ``num_classes``, ``kind`` (``latents`` or ``moments``) and its scaling, and
    reads. Of moments a sample is drawn at each visit of training, by the stream ``posterior noise``; ``batch`` gives
    the mean.
    """

    data_are_images = False
    kind: str
    scaling: LatentScaling
    name: str

    @abstractmethod
    def _stored(self, index: NDArray[np.int64]) -> Batch:
        """Return ``data`` (N, C or 2C, H, W) as stored and ``label`` (N,), and ``image`` uint8 where asked for."""

    def batch(self, indices: Indices) -> Batch:
        """Return scaled latents, of moments the scaled mean, labels and indices, and images if they were asked for."""
        index = as_indices(indices, len(self))
        loaded = self._stored(index.numpy())
        values = moments(loaded["data"])[0] if self.kind == "moments" else loaded["data"]
        return {**loaded, "data": self._to_model(values), "index": index}

    def load(self, indices: Indices, draws: BoundDraws) -> Batch:
        """Return latents as they are stored, or moments and noise for them, with labels and indices.

        The noise is drawn here, and not in ``finish``: a thread then does it ahead of training.
        """
        index = as_indices(indices, len(self))
        loaded = {**self._stored(index.numpy()), "index": index}
        return {**loaded, NOISE: posterior_noise(draws, self.shape)} if self.kind == "moments" else loaded

    def finish(self, loaded: Batch, draws: BoundDraws) -> Batch:
        """Take from the posterior of moments a sample, mean + std·noise, and scale."""
        del draws
        rest = {key: value for key, value in loaded.items() if key != NOISE}
        values = loaded["data"]
        if self.kind == "moments":
            mean, deviation = moments(values)
            values = mean + deviation * loaded[NOISE]
        return {**rest, "data": self._to_model(values)}

    def _to_model(self, values: Tensor) -> Tensor:
        return self.scaling.apply(values)

    def _set_scaling(self, scaling: LatentScaling, **autoencoder: Any) -> None:
        """Take a scaling, and tell of it in ``latents_of`` beside what else is known of the autoencoder."""
        self.scaling = scaling
        told = {"mean": list(scaling.mean), "std": list(scaling.std), "source": scaling.source}
        self.latents_of = {**autoencoder, "scaling": told}

    @cached_property
    def statistics(self) -> dict[str, Any]:
        """Mean and standard deviation of each channel, and the range, of 10,000 samples drawn with seed 0, or of all.

        ``over`` tells of how many; of moments they are those of the means. Samples that are not finite are left out.

        Raises:
            DataError: no sample is left.
        """
        rows = np.sort(self._statistics_rows())
        count, mean, squares, ends = 0, torch.zeros(()), torch.zeros(()), [math.inf, -math.inf]
        for start in range(0, len(rows), _CHUNK):
            data = self.batch(rows[start : start + _CHUNK])["data"].double()
            values = data[data.flatten(1).isfinite().all(1)].transpose(0, 1).flatten(1)
            if not values.shape[1]:
                continue
            ends = [min(ends[0], float(values.min())), max(ends[1], float(values.max()))]
            # chunks are merged by their means, since sums of squares would lose digits (Chan et al., 1979)
            more, middle = values.shape[1], values.mean(1)
            step = middle - mean
            squares = squares + (values - middle[:, None]).square().sum(1) + step**2 * (count * more / (count + more))
            mean, count = mean + step * (more / (count + more)), count + more
        if not count:
            raise DataError(f"got {self.name} without a sample of finite values among {len(rows)}; store them again")
        pixels = self.shape[1] * self.shape[2]
        over = {"samples": count // pixels, "looked at": len(rows), "of": len(self), "seed": 0}
        deviation = (squares / max(count - 1, 1)).sqrt()
        return {"mean": mean.tolist(), "std": deviation.tolist(), "range": ends, "over": over}

    def _statistics_rows(self) -> NDArray[np.int64]:
        return Draws(0).permutation("statistics", len(self))[:SURVEYED]

    @property
    def manifest(self) -> dict[str, Any]:
        """Name, kind, count, shape, classes, scaling, and what of the files is hashed."""
        return {
            "name": self.name,
            "kind": self.kind,
            "count": len(self),
            "shape": list(self.shape),
            "num_classes": self.num_classes,
            "scaling": {"mean": list(self.scaling.mean), "std": list(self.scaling.std), "source": self.scaling.source},
            **self._contents,
        }

    @property
    @abstractmethod
    def _contents(self) -> Mapping[str, Any]:
        """Hash of the files, and in ``sha256_of`` what it covers."""


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (N, C, H, W) in float32 of moments (N, 2C, H, W)."""
    mean, deviation = values.float().chunk(2, dim=1)
    return mean, deviation


def check_deviations(values: NDArray[Any], name: str) -> None:
    """Check the second half of one sample's moments (2C, H, W).

    Raises:
        DataError: a negative standard deviation; names the file.
    """
    if (values[len(values) // 2 :] < 0).any():
        raise DataError(
            f"got {name} with negative values in its second half, expected standard deviations; is it the logarithm of "
            "the variance (logvar)? store exp(logvar/2)"
        )


def check_label(label: Any, num_classes: int, name: str) -> int:
    """Return a class label.

    Raises:
        DataError: no whole number from 0 to num_classes − 1; names the file.
    """
    if type(label) is not int:
        raise DataError(
            f"got a label of type {type(label).__name__} of {name}, expected a whole number from 0 to "
            f"{num_classes - 1}; write a class as its number"
        )
    if not 0 <= label < num_classes:
        raise DataError(f"got the label {label} of {name}, expected 0 to {num_classes - 1}; set num_classes")
    return label


def check_options(num_classes: Any, **factors: Any) -> None:
    """Check options that several layouts have.

    Raises:
        InputError: a negative number of classes, or a factor that is not finite and above 0.
        InputTypeError: an option of another type.
    """
    if type(num_classes) is not int or any(type(factor) not in (int, float) for factor in factors.values()):
        raise InputTypeError(f"got num_classes {num_classes!r} and {factors}, expected a whole number, and numbers")
    if num_classes < 0 or any(not 0 < factor < math.inf for factor in factors.values()):
        raise InputError(f"got num_classes {num_classes} and {factors}, expected 0 or more, and factors above 0")
