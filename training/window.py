"""Running means between two rows of the log, kept on the device until a row is due."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from pathline.objectives import Loss

__all__ = ["Window"]


class Window:
    """Sums over the steps since the last row; each step adds its means over the batch.

    Args:
        device: where the sums are kept.
        time_bins: number of equal bins of t in [0, 1] over which the objective's first detail is averaged; 0 for none.

    Attributes:
        steps: steps since the last row.
    """

    def __init__(self, device: torch.device, time_bins: int = 0) -> None:
        self._device, self._bins = device, time_bins
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.steps = 0
        self._sums: dict[str, Tensor] = {}
        self._by_time = torch.zeros(2, self._bins, device=self._device)  # sums and counts
        self._began, self._paused = time.perf_counter(), 0.0

    def add_loss(self, loss: Loss, share: float) -> None:
        """Add the loss, terms and details of a micro-batch that is ``share`` of this device's part of the step."""
        self._add("loss", loss.total.detach(), share)
        for name, values in {**loss.terms, **loss.details}.items():
            self._add(name, values.detach().mean(), share)
        if self._bins and loss.times is not None:
            self._add_by_time(loss.times, next(iter(loss.details.values())))

    def _add_by_time(self, times: Tensor, values: Tensor) -> None:
        """Add (N,) values to the bins of their times; no sum depends on the order of threads."""
        places = (times * self._bins).long().clamp(0, self._bins - 1)
        inside = places[:, None] == torch.arange(self._bins, device=places.device)
        sums = torch.where(inside, values[:, None], 0.0).sum(0)
        self._by_time += torch.stack((sums, inside.sum(0))).to(self._by_time)

    def add_step(self, norm: Tensor, kept: Tensor) -> None:
        """Count a step, its gradient norm if it was taken, and whether it was skipped."""
        self.steps += 1
        self._add("gradient_norm", torch.where(kept > 0, norm, 0.0))
        self._add("skipped", 1 - kept)

    def _add(self, name: str, value: Tensor, share: float = 1.0) -> None:
        if name in self._sums:
            self._sums[name].add_(value, alpha=share)
        else:
            self._sums[name] = value.to(self._device, torch.float32) * share

    def reduce(self, fabric: Fabric) -> dict[str, float]:
        """Average the sums over all devices and read them, bins aside; every process must call this."""
        names, values = list(self._sums), list(self._sums.values())
        if not names:
            return {}
        count = len(names)
        reduced: Any = fabric.all_reduce(torch.cat((torch.stack(values), self._by_time.flatten())), reduce_op="mean")
        self._sums = dict(zip(names, reduced[:count].unbind(), strict=True))
        self._by_time = reduced[count:].reshape(2, self._bins)
        return dict(zip(names, reduced[:count].tolist(), strict=True))

    def row(self, fabric: Fabric, images_per_step: int) -> tuple[dict[str, Any], int]:
        """Return the means of the window with its length and speed, and the steps skipped; all processes call it.

        Where an objective tells its times, ``loss_by_time`` is a list of means over bins of t, NaN for empty ones.
        """
        sums = self.reduce(fabric)
        seconds = time.perf_counter() - self._began - self._paused
        skipped = round(sums.pop("skipped"))
        means: dict[str, Any] = {name: value / self.steps for name, value in sums.items()}
        means["gradient_norm"] = sums["gradient_norm"] / max(1, self.steps - skipped)
        if bool(self._by_time[1].any()):
            means["loss_by_time"] = (self._by_time[0] / self._by_time[1]).tolist()
        speed = self.steps * images_per_step / max(seconds, 1e-9)
        return {**means, "window": self.steps, "images_per_second": speed}, skipped

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep what happens inside out of the speed."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def state(self, fabric: Fabric) -> dict[str, Any]:
        """Return what a resume needs; every process must call this."""
        sums = self.reduce(fabric)
        return {"steps": self.steps, "sums": sums, "by_time": self._by_time.tolist()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; bins only where their number is the same, for it is free to change."""
        self.clear()
        self.steps = int(state["steps"])
        by_time = torch.tensor(state.get("by_time", []), device=self._device)
        if by_time.shape == self._by_time.shape:
            self._by_time = by_time
        self._sums = {name: torch.tensor(value, device=self._device) for name, value in state["sums"].items()}
