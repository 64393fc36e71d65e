"""Diffusion coefficients g(t) of the reverse SDE dx = [v − ½·g²·score]dt + g dW. Always g, never SiT's D = g²/2."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any

from torch import Tensor

from pathline.core.errors import InputError
from pathline.core.registry import Registry
from pathline.interpolants.base import Interpolant

__all__ = ["Diffusion", "DiffusionSpec", "Linear", "build", "names", "register", "registry"]


class Diffusion(ABC):
    """A diffusion coefficient; it changes the paths of samples, not their distribution at any time."""

    @abstractmethod
    def squared(self, t: Tensor, interpolant: Interpolant) -> Tensor:
        """Return g(t)², of t's shape and precision."""


registry: Registry[Diffusion] = Registry("diffusion", "solvers.diffusions", Diffusion)
register, build, names = registry.register, registry.build, registry.names

DiffusionSpec = Annotated[Diffusion | str | Mapping[str, Any], registry]


@registry.register("linear")
class Linear(Diffusion):
    """g² = 2·norm·t: vanishes at data.

    Args:
        norm: above 0; 1 in DeepFlow's published samples.
    """

    def __init__(self, norm: float = 1.0) -> None:
        if not 0 < norm < math.inf:
            raise InputError(f"got norm {norm}, expected a finite number above 0")
        self.norm = norm

    def squared(self, t: Tensor, interpolant: Interpolant) -> Tensor:
        """Return 2·norm·t."""
        return 2 * self.norm * t
