"""What a data set is: indexed batches, and a training order that is a function of (seed, position).

N samples; C, H, W the shape of one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathline.core.draws import BoundDraws, Draws
from pathline.core.errors import InputError, InputTypeError
from pathline.core.registry import Registry

__all__ = ["Batch", "Dataset", "Indices", "as_indices", "registry"]

Batch = dict[str, Tensor]
Indices = Sequence[int] | NDArray[np.int64] | Tensor | range


class Dataset(ABC):
    """Samples by index.

    Attributes:
        shape: (C, H, W) of one sample.
        num_classes: number of class labels, 0 without labels.
        data_are_images: whether ``data`` are images with values in [−1, 1], which encoders take; latents are none.
        in_memory: whether the values lie in memory, so that training picks them where it stands; what has to be read or
            decoded is loaded ahead, by a thread.
        latents_of: manifest of the autoencoder whose latents ``data`` are, with its scaling; None if they are none, or
            if that is not known.
    """

    shape: tuple[int, int, int]
    num_classes: int
    data_are_images: bool = True
    in_memory: bool = False
    latents_of: Mapping[str, Any] | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def batch(self, indices: Indices) -> Batch:
        """Return ``data`` (N, C, H, W) float32, ``label`` (N,) int64 and ``index`` (N,) int64.

        Data that are no images may bring those that they were made from, ``image`` (N, 3, H, W) uint8, for encoders.

        Raises:
            InputError: an index that does not exist.
            InputTypeError: indices that are not whole numbers.
        """

    def load(self, indices: Indices, draws: BoundDraws) -> Batch:
        """Return what a visit of training needs from the host, as it is stored; by default ``batch``.

        A thread calls it ahead of training, where that is worth it: what is drawn on the host is best drawn here.

        Args:
            indices: (N,) of the samples.
            draws: bound to the positions of the visit, for what is chosen on the host, as a flipped copy, or drawn.

        Returns:
            Tensors by name, ``index`` and ``label`` among them; ``finish`` makes a batch of them.
        """
        del draws
        return self.batch(indices)

    def finish(self, loaded: Batch, draws: BoundDraws) -> Batch:
        """Make a batch of what ``load`` gave, on the device where that now is; by default it is one.

        Conversions, scalings and what is drawn anew at each visit, as an autoencoder's posterior, have their place
        here. ``draws`` is bound as for ``load``.
        """
        del draws
        return loaded

    @property
    @abstractmethod
    def statistics(self) -> dict[str, Any]:
        """Mean and standard deviation of each channel, and the range of values; fit for JSON."""

    @property
    @abstractmethod
    def manifest(self) -> dict[str, Any]:
        """What the data are and where they come from, with a hash of them; fit for JSON."""

    def indices_at(self, positions: range, seed: int) -> NDArray[np.int64]:
        """Return the sample indices at training positions: epoch after epoch, each a permutation of its own.

        The index at a position depends on (seed, position) alone.
        """
        if positions.start < 0 or positions.step != 1:
            raise InputError(f"got positions {positions}, expected a run of non-negative ones")
        count = len(self)
        parts = []
        for epoch in range(positions.start // count, -(-positions.stop // count)):
            first, last = max(positions.start - epoch * count, 0), min(positions.stop - epoch * count, count)
            parts.append(self._order(seed, epoch)[first:last])
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def batches(self, size: int, steps: int, seed: int, *, start: int = 0) -> Iterator[Batch]:
        """Yield ``steps`` batches of ``size`` samples in training order, from step ``start`` on.

        Raises:
            InputError: a size below 1 or a negative number of steps.
        """
        if size < 1 or steps < 0 or start < 0:
            raise InputError(f"got size {size}, steps {steps}, start {start}; expected size ≥ 1 and no negative step")
        return (self._visit(range(step * size, (step + 1) * size), step, seed) for step in range(start, start + steps))

    def _visit(self, positions: range, step: int, seed: int) -> Batch:
        draws = Draws(seed).at(positions, step=step)
        return self.finish(self.load(self.indices_at(positions, seed), draws), draws)

    def _order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Permutation of an epoch; the last two are kept, as a batch may span both. Threads may ask at once."""
        orders: dict[tuple[int, int], NDArray[np.int64]] = self.__dict__.get("_orders", {})
        order = orders.get((seed, epoch))
        if order is None:
            order = Draws(seed).permutation("data order", len(self), counter=epoch)
            self.__dict__["_orders"] = {**dict(list(orders.items())[-1:]), (seed, epoch): order}
        return order


def as_indices(indices: Indices, count: int) -> Tensor:
    """Return indices as an int64 tensor (N,) on the host, checked to lie in 0 … count − 1.

    Raises:
        InputError: another shape, or an index that does not exist.
        InputTypeError: not whole numbers; a mask of booleans is none either.
    """
    given = np.asarray(indices.cpu() if isinstance(indices, Tensor) else indices)
    if given.size and not np.issubdtype(given.dtype, np.integer):  # an empty list is of type float64
        raise InputTypeError(
            f"got indices of type {given.dtype}, expected whole numbers; for a mask call np.flatnonzero"
        )
    if given.ndim != 1 or (given.size and not 0 <= given.min() <= given.max() < count):
        raise InputError(f"got indices {given.ravel()[:8].tolist()}, expected (N,) numbers from 0 to {count - 1}")
    return torch.from_numpy(given.astype(np.int64))


registry: Registry[Dataset] = Registry("data set", "data", Dataset)
