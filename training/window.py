"""What happened between two rows of the log, kept on the device until somebody asks.

K quantities a sample, N samples of this device's part of a step, S steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from pathline.core.errors import InputError
from pathline.objectives import Loss
from pathline.training.devices import Agreement
from pathline.training.guard import reason

__all__ = ["Record", "Skipped", "Window"]

Spent = Literal["data", "checkpoint", "other"]
VERDICT = 4  # loss, gradient norm, unusable values, whether the step was taken


class Record(NamedTuple):
    """A step as the host knows it.

    Attributes:
        reason: why it was skipped, "" if it was taken.
        numbers: loss, gradient norm, unusable values, 1 if it was taken.
        means: over the global batch, one a quantity.
        sums: over bins of t, of the objective's first detail.
        counts: samples in these bins.
    """

    reason: str
    numbers: list[float]
    means: list[float]
    sums: list[float]
    counts: list[float]


class Skipped(NamedTuple):
    """A step that was skipped.

    Attributes:
        step: its number, counted from 1.
        reason: why, as the guard's ``reason``.
        samples: of this device, (N, 5): position in the training stream, 1 if its data were finite, 1 if its losses
            were, plain loss, time (NaN if there is no one time).
    """

    step: int
    reason: str
    samples: Tensor


class _Pending(NamedTuple):
    step: int
    first: int
    values: Tensor
    summary: Tensor


class Window:
    """Numbers of the steps since the last row, and the time spent.

    Args:
        fabric: launched; means are taken over its devices.
        agreement: of the processes.
        time_bins: number of equal bins of t in [0, 1] over which the objective's first detail is averaged; 0 for none.

    Attributes:
        records: of the steps read so far.
    """

    def __init__(self, fabric: Fabric, agreement: Agreement, time_bins: int = 0) -> None:
        self._fabric, self._agreement, self._bins = fabric, agreement, time_bins
        self._names: list[str] = []
        self._plain = 0  # place among them of the objective's first detail
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.records: list[Record] = []
        self._pending: list[_Pending] = []
        self._batches: list[Tensor] = []
        self._timed = 0  # steps since: records that were restored are of another process's time
        self._began = time.perf_counter()
        self._spent: dict[Spent, float] = {"data": 0.0, "checkpoint": 0.0, "other": 0.0}

    def add_batch(self, loss: Loss, usable: Tensor) -> None:
        """Add terms and details of a micro-batch, with 1 for each sample whose data were finite, (N,)."""
        named = {**loss.terms, **loss.details}
        if not self._names:
            self._names, self._plain = list(named), list(named).index(next(iter(loss.details)))
        elif self._names != list(named):
            raise InputError(f"got terms and details {list(named)} after {self._names}; give the same at each step")
        times = torch.full_like(usable, torch.nan) if loss.times is None else loss.times.to(usable)
        self._batches.append(torch.stack((usable, times, *(value.detach().to(usable) for value in named.values()))))

    def add_step(self, step: int, first: int, numbers: Tensor, kept: Tensor) -> None:
        """Close a step.

        Args:
            step: its number, counted from 1.
            first: position in the training stream of this device's first sample.
            numbers: of the guard's verdict, (3,).
            kept: 1 if the step was taken, ().
        """
        values = self._batches[0] if len(self._batches) == 1 else torch.cat(self._batches, dim=1)
        self._batches = []
        self._timed += 1
        summary = torch.cat((numbers, kept.reshape(1), values.mean(1)))
        self._pending.append(_Pending(step, first, values, summary))

    def read(self) -> list[Skipped]:
        """Bring what is pending to the host, averaged over all devices; return the skipped steps among it.

        Every process must call this. The device is read, once.
        """
        if not self._pending:
            return []
        summaries: Any = self._fabric.all_reduce(torch.stack([p.summary for p in self._pending]), reduce_op="mean")
        values = torch.stack([p.values for p in self._pending])
        read = torch.cat((summaries.flatten(), values.flatten())).cpu().double()
        table, values = read[: summaries.numel()].reshape(summaries.shape), read[summaries.numel() :].view(values.shape)
        bins = self._agreement.gather(self._binned(values)[None]).sum(0)
        scale = self._scale()
        skipped = []
        for pending, row, samples, (sums, counts) in zip(self._pending, table.tolist(), values, bins, strict=True):
            numbers, means = row[:VERDICT], row[VERDICT + 2 :]
            why = reason(numbers[:3], numbers[3], scale)
            self.records.append(Record(why, numbers, means, sums.tolist(), counts.tolist()))
            if why:
                skipped.append(Skipped(pending.step, why, self._samples(pending, samples)))
        self._pending = []
        return skipped

    def _scale(self) -> float | None:
        scaler = getattr(self._fabric.strategy.precision, "scaler", None)
        return None if scaler is None else float(scaler.get_scale())

    def _binned(self, values: Tensor) -> Tensor:
        """Return sums and counts over bins of t, (S, 2, bins), of values (S, 2 + K, N), sample after sample."""
        result = np.zeros((len(values), 2, self._bins))
        if self._bins and not bool(values[0, 1, 0].isnan()):
            places = (values[:, 1] * self._bins).long().clamp(0, self._bins - 1).numpy()
            for step, (place, value) in enumerate(zip(places, values[:, 2 + self._plain].numpy(), strict=True)):
                result[step, 0] = np.bincount(place, value, self._bins)
                result[step, 1] = np.bincount(place, minlength=self._bins)
        return torch.from_numpy(result)

    def _samples(self, pending: _Pending, values: Tensor) -> Tensor:
        """Return the table of ``Skipped`` for a step's values (2 + K, N)."""
        positions = pending.first + torch.arange(values.shape[1])
        finite = values[2:].isfinite().all(0)
        return torch.stack((positions.double(), values[0], finite.double(), values[2 + self._plain], values[1]), dim=1)

    def row(self, images_per_step: int) -> dict[str, Any]:
        """Return means over the steps taken of what was read, with the window's length, and its speed since it was
        begun or restored.

        Where an objective tells its times, ``loss_by_time`` is a list of means over bins of t, NaN for empty ones.
        """
        records, seconds = self.records, max(time.perf_counter() - self._began - self._spent["other"], 1e-9)
        taken = [record for record in records if not record.reason]
        row: dict[str, Any] = {"loss": _mean([record.numbers[0] for record in taken])}
        row |= {name: _mean([record.means[i] for record in taken]) for i, name in enumerate(self._names)}
        row["gradient_norm"] = _mean([record.numbers[1] for record in taken])
        counts = _totals([record.counts for record in taken])
        if any(counts):
            sums = _totals([record.sums for record in taken])
            row["loss_by_time"] = [s / n if n else math.nan for s, n in zip(sums, counts, strict=True)]
        return row | {
            "window": len(records),
            "images_per_second": self._timed * images_per_step / seconds,
            "data_wait_share": self._spent["data"] / seconds,
            "checkpoint_share": self._spent["checkpoint"] / seconds,
        }

    @contextmanager
    def spending(self, kind: Spent) -> Iterator[None]:
        """Count the time inside as waiting for data, or for a checkpoint; other time stays out of the speed."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._spent[kind] += time.perf_counter() - began

    def state(self) -> dict[str, Any]:
        """Return what a resume needs, of what was read."""
        plain = self._names[self._plain] if self._names else None
        return {"names": self._names, "plain": plain, "records": [list(record) for record in self.records]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; bins only where their number is the same, for it is free to change."""
        self.clear()
        self._names = list(state["names"])
        self._plain = self._names.index(state["plain"]) if self._names else 0
        for record in (Record(*entries) for entries in state["records"]):
            same = len(record.counts) == self._bins
            empty = [0.0] * self._bins
            self.records.append(record if same else record._replace(sums=empty, counts=empty))


def _mean(values: Sequence[float]) -> float:
    """Return a mean that does not depend on the order; NaN of nothing, or if one is not finite."""
    return math.fsum(values) / len(values) if values and all(map(math.isfinite, values)) else math.nan


def _totals(rows: Sequence[Sequence[float]]) -> list[float]:
    return [math.fsum(column) if all(map(math.isfinite, column)) else math.nan for column in zip(*rows, strict=True)]
