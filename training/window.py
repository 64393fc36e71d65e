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

    Attributes:
        steps: steps since the last row.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.steps = 0
        self._sums: dict[str, Tensor] = {}
        self._began, self._paused = time.perf_counter(), 0.0

    def add_loss(self, loss: Loss, share: float) -> None:
        """Add the loss, terms and details of a micro-batch that is ``share`` of this device's part of the step."""
        self._add("loss", loss.total.detach(), share)
        for name, values in {**loss.terms, **loss.details}.items():
            self._add(name, values.detach().mean(), share)

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
        """Average the sums over all devices and read them; every process must call this."""
        names, values = list(self._sums), list(self._sums.values())
        if not names:
            return {}
        reduced = fabric.all_reduce(torch.stack(values), reduce_op="mean")
        self._sums = dict(zip(names, reduced.unbind(), strict=True))  # type: ignore[union-attr]
        return dict(zip(names, reduced.tolist(), strict=True))  # type: ignore[union-attr]

    def row(self, fabric: Fabric, images_per_step: int) -> tuple[dict[str, float], int]:
        """Return the means of the window with its length and speed, and the steps skipped; all processes call it."""
        sums = self.reduce(fabric)
        seconds = time.perf_counter() - self._began - self._paused
        skipped = round(sums.pop("skipped"))
        means = {name: value / self.steps for name, value in sums.items()}
        means["gradient_norm"] = sums["gradient_norm"] / max(1, self.steps - skipped)
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
        return {"steps": self.steps, "sums": self.reduce(fabric)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.clear()
        self.steps = int(state["steps"])
        self._sums = {name: torch.tensor(value, device=self._device) for name, value in state["sums"].items()}
