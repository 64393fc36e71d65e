"""The training order of data that are read in blocks: shards are permuted, and samples within windows of shards.

Reading is then sequential, window after window, while the order stays a pure function of (seed, position).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pathline.core.draws import Draws

__all__ = ["BlockOrder", "Visits"]

_SHARDS, _SAMPLES = "shard order", "data order"  # streams
Integers = NDArray[np.int64]


class Visits(NamedTuple):
    """What is seen at training positions, (N,) each.

    Attributes:
        sample: its number, counted through the shards as they are listed.
        epoch: of the visit.
        lane: that gives it; ``lanes`` itself for the end of an epoch, which is divided among none.
        window: that holds it, in the epoch's order of shards.
    """

    sample: Integers
    epoch: Integers
    lane: Integers
    window: Integers


class BlockOrder:
    """Epoch after epoch, each a permutation of all samples.

    An epoch's shards are permuted and cut into windows; a window's samples are permuted, and all windows in a row are
    the epoch's sequence. Lane i takes the i-th of ``lanes`` equal runs of that sequence, and gives ``run`` samples in
    turn: positions 0 … run − 1 come from lane 0, the next ``run`` from lane 1, and so on, round after round. Where
    lanes · run is the global batch, a process that takes a part of each batch reads from its own lanes alone. What is
    left of the sequence beyond the last whole round comes at the end.

    Args:
        counts: samples of each shard, all above 0.
        window: shards of a window; the last one of an epoch may have fewer.
        lanes: 1 for the plain sequence.
        run: positions in a row that one lane gives.
    """

    def __init__(self, counts: Sequence[int], window: int, lanes: int, run: int) -> None:
        self.counts = np.asarray(counts, np.int64)
        self.count = int(self.counts.sum())
        self.window, self.lanes, self.run = window, lanes, run
        self.windows = -(-len(self.counts) // window)
        self.length = self.count if lanes == 1 else self.count // (lanes * run) * run  # of a lane
        self._first = np.concatenate(([0], np.cumsum(self.counts)))
        self._kept: dict[tuple[str, int, int, int], Integers] = {}

    def visits(self, positions: range, seed: int) -> Visits:
        """Return what is seen at training positions, which are consecutive."""
        epoch, place = np.divmod(np.arange(positions.start, positions.stop, dtype=np.int64), self.count)
        turn, offset = np.divmod(place, self.run)
        lane = np.where(place < self.lanes * self.length, turn % self.lanes, self.lanes)
        striped = lane * self.length + turn // self.lanes * self.run + offset
        slot = np.where(lane < self.lanes, striped, place)
        window, sample = np.empty_like(slot), np.empty_like(slot)
        for number in np.unique(epoch):
            here = epoch == number
            ends = self._ends(seed, int(number))
            window[here] = np.searchsorted(ends, slot[here], side="right")
            for block in np.unique(window[here]):
                inside = here & (window == block)
                first = ends[block - 1] if block else 0
                sample[inside] = self._samples(seed, int(number), int(block))[slot[inside] - first]
        return Visits(sample, epoch, lane, window)

    def shards(self, seed: int, epoch: int, window: int) -> Integers:
        """Return the shards of a window, in the order in which they are read."""
        return self._shards(seed, epoch)[window * self.window : (window + 1) * self.window]

    def following(self, seed: int, epoch: int, lane: int, window: int) -> tuple[int, int] | None:
        """Return epoch and window of what a lane reads after a window; None after the undivided end of an epoch."""
        end = (lane + 1) * self.length if lane < self.lanes else self.count
        if self._ends(seed, epoch)[window] < end:
            return epoch, window + 1
        if lane == self.lanes:
            return None
        return epoch + 1, int(np.searchsorted(self._ends(seed, epoch + 1), lane * self.length, side="right"))

    def _shards(self, seed: int, epoch: int) -> Integers:
        return self._keep(
            ("shards", seed, epoch, 0), lambda: Draws(seed).permutation(_SHARDS, len(self.counts), counter=epoch)
        )

    def _ends(self, seed: int, epoch: int) -> Integers:
        """Return where each window of an epoch ends in its sequence."""

        def ends() -> Integers:
            each = np.cumsum(self.counts[self._shards(seed, epoch)])
            return np.append(each[self.window - 1 : -1 : self.window], each[-1])

        return self._keep(("ends", seed, epoch, 0), ends)

    def _samples(self, seed: int, epoch: int, window: int) -> Integers:
        """Return the permuted samples of a window."""

        def samples() -> Integers:
            shards = self.shards(seed, epoch, window)
            inside = np.concatenate([np.arange(self._first[shard], self._first[shard + 1]) for shard in shards])
            counter = epoch * self.windows + window
            return inside[Draws(seed).permutation(_SAMPLES, len(inside), counter=counter)]

        return self._keep(("samples", seed, epoch, window), samples)

    def _keep(self, key: tuple[str, int, int, int], make: Callable[[], Integers]) -> Integers:
        """Return what was made for a key; the last ones are kept, as batch after batch asks for the same."""
        found = self._kept.get(key)
        if found is None:
            while len(self._kept) > 8 + 3 * self.lanes:
                self._kept.pop(next(iter(self._kept)), None)
            found = self._kept[key] = make()
        return found
