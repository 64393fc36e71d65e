"""Time grids: where a fixed-step solver puts its steps. N steps have N + 1 grid points, in float64."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from pathline.core.errors import InputError
from pathline.core.registry import Registry

__all__ = ["Grid", "GridSpec", "Paper", "Uniform", "build", "names", "register", "registry"]


class Grid(ABC):
    """A rule that puts N steps between two times."""

    @abstractmethod
    def times(self, steps: int, start: float, end: float) -> Tensor:
        """Return steps + 1 strictly monotone times from ``start`` to ``end``, float64 on the host."""


registry: Registry[Grid] = Registry("grid", "solvers.grids", Grid)
register, build, names = registry.register, registry.build, registry.names

GridSpec = Annotated[Grid | str | Mapping[str, Any], registry]


@registry.register("uniform")
class Uniform(Grid):
    """Equal steps."""

    def times(self, steps: int, start: float, end: float) -> Tensor:
        """Return ``linspace(start, end, steps + 1)``."""
        return torch.linspace(start, end, steps + 1, dtype=torch.float64)


@registry.register("paper")
class Paper(Grid):
    """Equal steps to a distance from the end, then one step: the grid of SiT's and DeepFlow's published samples.

    Args:
        last: length of the last step, in (0, 1); 0.04 in both papers.
    """

    def __init__(self, last: float = 0.04) -> None:
        if not 0 < last < 1:
            raise InputError(f"got last {last}, expected a step length in (0, 1)")
        self.last = last

    def times(self, steps: int, start: float, end: float) -> Tensor:
        """Return ``linspace(start, end ± last, steps)``, then ``end``."""
        if abs(start - end) <= self.last:
            raise InputError(
                f"got a solve from {start:g} to {end:g} with a last step of {self.last:g}; use the grid 'uniform'"
            )
        before = end + self.last if start > end else end - self.last
        times = torch.linspace(start, before, steps, dtype=torch.float64)
        return torch.cat((times, torch.tensor([end], dtype=torch.float64)))
