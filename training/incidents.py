"""Which samples, at which times, the skipped steps were about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pathline.objectives import Loss

__all__ = ["Incidents"]

COLUMNS = 4  # position, whether it could be used, its loss, its time


class _Batch(NamedTuple):
    step: int
    positions: range
    usable: Tensor
    values: Tensor
    times: Tensor | None


class Incidents:
    """Keeps the losses and times of the samples since the last row, on the device, until a row asks for some."""

    def __init__(self) -> None:
        self._batches: list[_Batch] = []

    def add(self, step: int, positions: range, usable: Tensor, loss: Loss) -> None:
        """Note a micro-batch: the positions of its samples in the stream, and whether their data were finite, (N,)."""
        values = torch.stack([term.detach().float() for term in loss.terms.values()]).sum(0)
        self._batches.append(_Batch(step, positions, usable, values, loss.times))

    def clear(self) -> None:
        """Forget all."""
        self._batches.clear()

    def report(
        self,
        reasons: Sequence[str],
        last: int,
        gather: Callable[[Tensor], Tensor],
        indices: Callable[[Tensor], Sequence[int]],
    ) -> list[dict[str, Any]]:
        """Return an entry for each skipped step; every process must call this.

        An entry names the samples whose data or loss were not finite or, if all were, all of the batch.

        Args:
            reasons: of the last steps, "" for one taken.
            last: number of the last of them.
            gather: brings the rows of all processes together.
            indices: of the samples at positions of the training stream.
        """
        entries = []
        for step, reason in enumerate(reasons, last - len(reasons) + 1):
            if reason:
                mine = [_table(batch) for batch in self._batches if batch.step == step]
                if mine:  # none after a resume in the middle of a window: they were reported by nobody
                    entries.append(_entry(step, reason, gather(torch.cat(mine)), indices))
        return entries


def _table(batch: _Batch) -> Tensor:
    count = len(batch.positions)
    times = torch.full((count,), torch.nan) if batch.times is None else batch.times.cpu()
    columns = (torch.tensor(batch.positions), batch.usable.cpu(), batch.values.cpu(), times)
    return torch.stack([column.double() for column in columns], dim=1)


def _entry(step: int, reason: str, table: Tensor, indices: Callable[[Tensor], Sequence[int]]) -> dict[str, Any]:
    table = table[table[:, 0].argsort()]
    wrong = (table[:, 1] == 0) | ~table[:, 2].isfinite()
    chosen = table[wrong] if bool(wrong.any()) else table
    return {
        "step": step,
        "reason": reason,
        "positions": chosen[:, 0].long().tolist(),
        "samples": [int(index) for index in indices(chosen[:, 0].long())],
        "losses": [_number(value) for value in chosen[:, 2].tolist()],
        "times": [_number(value) for value in chosen[:, 3].tolist()],
    }


def _number(value: float) -> float | str | None:
    """Return a number fit for JSON: NaN as None, infinities by name."""
    if value != value:
        return None
    return value if abs(value) != float("inf") else str(value)
