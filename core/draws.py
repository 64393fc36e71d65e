"""Randomness as a function: every draw is fixed by (seed, stream, counter, sample id) and nothing else.

Batch size, order, device count and accumulation cannot change a draw, and nothing has to be saved to resume.
Words come from Philox-4x64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), keyed by seed and
stream, with the counter and the sample id in its counter words; normals by the Box-Muller transform in float32.

N samples; S the shape of one sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathline.core.errors import InputError

__all__ = ["BoundDraws", "Draws", "send"]

_WORDS = 4  # 64-bit words in one Philox block
_LIMIT = 2**64
Ids = Tensor | Sequence[int] | range


def send(values: Tensor, device: torch.device) -> Tensor:
    """Return values of the host on a device. The host does not wait for a CUDA device to take them."""
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


class Draws:
    """Draws keyed by a seed of 64 bits.

    Args:
        seed: 0 <= seed < 2**64.

    Raises:
        InputError: the seed is out of range.
    """

    def __init__(self, seed: int) -> None:
        if not 0 <= seed < _LIMIT:
            raise InputError(f"got seed {seed}, expected 0 <= seed < 2**64")
        self.seed = int(seed)

    @classmethod
    def from_torch(cls) -> Draws:
        """Take one seed from torch's generator, so that ``torch.manual_seed`` governs what follows."""
        return cls(int(torch.randint(2**62, ()).item()))

    def at(self, ids: Ids, counter: int = 0, *, step: int | None = None) -> BoundDraws:
        """Bind to sample ids and a counter.

        Args:
            ids: N non-negative sample ids.
            counter: distinguishes repeated draws for one sample, as solver steps do.
            step: key of what a whole batch shares, as the sign of a time gap; None means ``counter``.
        """
        return BoundDraws(self, ids, counter, counter if step is None else step)

    def normal(self, stream: str, ids: Ids, shape: Sequence[int] = (), *, counter: int = 0) -> Tensor:
        """Standard normal draws, float32 on the host, shape (N, *S); magnitudes up to 6.7."""
        count = math.prod(shape)
        half = (count + 1) // 2
        words = self._words(stream, ids, half, counter).view(np.int32)
        # u in (0, 1] from 31 bits, so that small u keep full float32 precision; the angle is in [-pi, pi)
        radius = np.abs(words[:, 0::2].astype(np.float32))
        radius *= np.float32(2.0**-31)
        radius += np.float32(2.0**-32)
        np.log(radius, out=radius)
        radius *= np.float32(-2)
        np.sqrt(radius, out=radius)
        angle = words[:, 1::2].astype(np.float32)
        angle *= np.float32(math.pi * 2.0**-31)
        cosines, sines = np.cos(angle), np.sin(angle[:, : count - half])
        cosines *= radius
        sines *= radius[:, : count - half]
        normals = cosines if count == 1 else np.concatenate((cosines, sines), axis=1)
        return torch.from_numpy(normals).reshape(-1, *shape)

    def uniform(self, stream: str, ids: Ids, shape: Sequence[int] = (), *, counter: int = 0) -> Tensor:
        """Uniform draws in [0, 1), float32 on the host, shape (N, *S), multiples of 2**-24."""
        count = math.prod(shape)
        words = self._words(stream, ids, (count + 1) // 2, counter)
        bits = (words.view(np.uint32) >> np.uint32(8)).astype(np.float32)
        bits *= np.float32(2.0**-24)
        return torch.from_numpy(bits)[:, :count].reshape(-1, *shape)

    def permutation(self, stream: str, count: int, *, counter: int = 0) -> NDArray[np.int64]:
        """A permutation of 0 … count - 1: the order of one word an index."""
        words = self._generator(stream, 0, counter).random_raw(count)
        return np.argsort(words, kind="stable")

    def torch_seed(self, stream: str) -> int:
        """A seed for a torch generator of the CPU, which reads 32 bits and ignores the rest."""
        return int(self._generator(stream, 0, 0).random_raw(1)[0] >> np.uint64(32))

    def _generator(self, stream: str, block: int, counter: int) -> np.random.Philox:
        if not 0 <= counter < _LIMIT:
            raise InputError(f"got counter {counter}, expected 0 <= counter < 2**64")
        name = int.from_bytes(blake2b(stream.encode(), digest_size=8).digest(), "little")
        key = np.array((self.seed, name), np.uint64)
        position = np.array((block % _LIMIT, block // _LIMIT, counter, 0), np.uint64)
        return np.random.Philox(key=key, counter=position)

    def _words(self, stream: str, ids: Ids, per_id: int, counter: int) -> NDArray[np.uint64]:
        """Return (N, per_id) words; each id owns a fixed block of them, so that a run of ids is one call."""
        parts = []
        for first, length in _runs(ids):
            block, offset = divmod(first * per_id, _WORDS)
            words = self._generator(stream, block, counter).random_raw(offset + length * per_id)
            parts.append(words[offset:])
        if not parts:
            return np.empty((0, per_id), np.uint64)
        return (parts[0] if len(parts) == 1 else np.concatenate(parts)).reshape(-1, per_id)


class BoundDraws:
    """Draws for one batch: sample ids and a counter are fixed, streams are asked for by name."""

    def __init__(self, draws: Draws, ids: Ids, counter: int, step: int) -> None:
        self.draws, self.ids, self.counter, self.step = draws, ids, counter, step

    def __len__(self) -> int:
        return len(self.ids)

    def normal(self, stream: str, shape: Sequence[int] = ()) -> Tensor:
        """Standard normal draws, float32 on the host, shape (N, *S)."""
        return self.draws.normal(stream, self.ids, shape, counter=self.counter)

    def uniform(self, stream: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform draws in [0, 1), float32 on the host, shape (N, *S)."""
        return self.draws.uniform(stream, self.ids, shape, counter=self.counter)

    def shared_uniform(self, stream: str) -> float:
        """One uniform draw in [0, 1) for the whole batch, keyed by (seed, stream, step) alone."""
        return float(self.draws.uniform(stream, (0,), counter=self.step)[0])


def _runs(ids: Ids) -> Iterator[tuple[int, int]]:
    """Cut ids into runs of consecutive numbers: (first, length)."""
    if isinstance(ids, range) and ids.step == 1:
        if ids.start < 0:
            raise InputError(f"got sample id {ids.start}, expected ids >= 0")
        if len(ids):
            yield ids.start, len(ids)
        return
    numbers = np.asarray(ids.cpu() if isinstance(ids, Tensor) else list(ids)).astype(np.int64)
    if numbers.ndim != 1:
        raise InputError(f"got sample ids of shape {numbers.shape}, expected (N,)")
    if not len(numbers):
        return
    if numbers.min() < 0:
        raise InputError(f"got sample id {numbers.min()}, expected ids >= 0")
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    for first, last in zip((0, *breaks), (*breaks, len(numbers)), strict=True):
        yield int(numbers[first]), int(last - first)
