"""Diffusion coefficients g(t) of the reverse SDE dx = [v − ½·g²·score]dt + g dW. Always g, never SiT's D = g²/2."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from pathline.core.errors import InputError
from pathline.core.registry import Registry
from pathline.interpolants.base import Interpolant

__all__ = ["Constant", "Diffusion", "DiffusionSpec", "Linear", "Own", "build", "names", "register", "registry"]


class Diffusion(ABC):
    """A diffusion coefficient; it changes the paths of samples, not their distribution at any time."""

    @abstractmethod
    def squared(self, t: Tensor, interpolant: Interpolant) -> Tensor:
        """Return g(t)², of t's shape and precision."""

    def open_ends(self, interpolant: Interpolant) -> tuple[float, ...]:
        """List the ends (0.0, 1.0) at which g is infinite on a path."""
        ends = (torch.tensor(t, dtype=torch.float64) for t in (0.0, 1.0))
        return tuple(float(t) for t in ends if not bool(self.squared(t, interpolant).isfinite()))


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
        self.norm = _checked(norm)

    def squared(self, t: Tensor, interpolant: Interpolant) -> Tensor:
        """Return 2·norm·t."""
        return 2 * self.norm * t


@registry.register("constant")
class Constant(Diffusion):
    """g² = 2·norm at all times; norm ½·scale² is the Brownian motion of a ``bridge``.

    Args:
        norm: above 0.
    """

    def __init__(self, norm: float = 1.0) -> None:
        self.norm = _checked(norm)

    def squared(self, t: Tensor, interpolant: Interpolant) -> Tensor:
        """Return 2·norm."""
        return torch.full_like(t, 2 * self.norm)


@registry.register("sbdm")
class Own(Diffusion):
    """g² = norm·2σW/α, the path's own diffusion, with which the SDE reverses the forward one (arXiv:2011.13456).

    Infinite at the noise end of the linear and the trigonometric path: start below t = 1 there.

    Args:
        norm: above 0.
    """

    def __init__(self, norm: float = 1.0) -> None:
        self.norm = _checked(norm)

    def squared(self, t: Tensor, interpolant: Interpolant) -> Tensor:
        """Return norm times the path's own g²."""
        return self.norm * interpolant.own_diffusion(t)

    def open_ends(self, interpolant: Interpolant) -> tuple[float, ...]:
        """List the path's open ends for its diffusion."""
        return interpolant.open_ends("velocity", "diffusion")


def _checked(norm: float) -> float:
    if not 0 < norm < math.inf:
        raise InputError(f"got norm {norm}, expected a finite number above 0")
    return norm
