"""Diffusion coefficients g(t) of the reverse SDE dx = [v − ½·g²·score]dt + g dW. Always g, never SiT's D = g²/2.

The named ones are SiT's six forms in our clock and convention (arXiv:2401.08740, Table 2): g² = 2·norm·form.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from pathline.core.errors import InputError, InputTypeError
from pathline.core.registry import Registry
from pathline.interpolants.base import Interpolant

__all__ = [
    "Constant",
    "Custom",
    "Decreasing",
    "Diffusion",
    "DiffusionSpec",
    "IncreasingDecreasing",
    "Linear",
    "Own",
    "Sigma",
    "build",
    "names",
    "register",
    "registry",
]


class Diffusion(ABC):
    """A diffusion coefficient; it changes the paths of samples, not their distribution at any time.

    Args:
        norm: scale of g², above 0.
    """

    def __init__(self, norm: float = 1.0) -> None:
        if not 0 < norm < math.inf:
            raise InputError(f"got norm {norm}, expected a finite number above 0")
        self.norm = norm

    @abstractmethod
    def squared(self, t: Tensor, interpolant: Interpolant) -> Tensor:
        """Return g(t)², of t's shape and precision."""

    def open_ends(self, interpolant: Interpolant) -> tuple[float, ...]:
        """List the ends (0.0, 1.0) at which g is infinite on a path."""
        ends = (torch.tensor(t, dtype=torch.float64) for t in (0.0, 1.0))
        return tuple(float(t) for t in ends if not bool(self.squared(t, interpolant).isfinite()))


registry: Registry[Diffusion] = Registry("diffusion", "solvers.diffusions", Diffusion)
register, names = registry.register, registry.names

DiffusionSpec = Annotated[Diffusion | str | Mapping[str, Any] | Callable[[Tensor], Tensor], registry]


def build(diffusion: DiffusionSpec, **options: Any) -> Diffusion:
    """Build a diffusion by name, as ``Registry.build`` does, or of a function g(t).

    Raises:
        UnknownNameError, UnknownOptionError: as ``Registry.build``.
        InputError, InputTypeError: a function that does not return one finite number ≥ 0 a time.
    """
    if isinstance(diffusion, Diffusion | str | Mapping) or not callable(diffusion):
        return registry.build(diffusion, **options)
    return Custom(diffusion)


@registry.register("linear")
class Linear(Diffusion):
    """g² = 2·norm·t: vanishes at data. With norm 1 the sampler of DeepFlow's published numbers."""

    def squared(self, t: Tensor, interpolant: Interpolant) -> Tensor:
        """Return 2·norm·t."""
        return 2 * self.norm * t


@registry.register("sigma")
class Sigma(Diffusion):
    """g² = 2·norm·σ(t): the score's part of the drift is −norm·(expected noise), finite on every path."""

    def squared(self, t: Tensor, interpolant: Interpolant) -> Tensor:
        """Return 2·norm·σ."""
        return 2 * self.norm * interpolant.evaluate(t).sigma


@registry.register("constant")
class Constant(Diffusion):
    """g² = 2·norm at all times; norm ½·scale² is the Brownian motion of a ``bridge``."""

    def squared(self, t: Tensor, interpolant: Interpolant) -> Tensor:
        """Return 2·norm."""
        return torch.full_like(t, 2 * self.norm)


@registry.register("decreasing")
class Decreasing(Diffusion):
    """g² = ½·(1 − norm·cos πt)²: for norm 1 from 0 at data to 2 at noise.

    SiT's form; its norm weighs the cosine, not g² as elsewhere.
    """

    def squared(self, t: Tensor, interpolant: Interpolant) -> Tensor:
        """Return ½·(1 − norm·cos πt)²."""
        return 0.5 * (1 - self.norm * torch.cos(math.pi * t)).square()


@registry.register("increasing-decreasing")
class IncreasingDecreasing(Diffusion):
    """g² = 2·norm·sin²(πt): vanishes at both ends."""

    def squared(self, t: Tensor, interpolant: Interpolant) -> Tensor:
        """Return 2·norm·sin²(πt)."""
        return 2 * self.norm * torch.sin(math.pi * t).square()


@registry.register("sbdm")
class Own(Diffusion):
    """g² = norm·2σW/α, the path's own diffusion, with which the SDE reverses the forward one (arXiv:2011.13456).

    Infinite at the noise end of the linear and the trigonometric path: start below t = 1 there.
    """

    def squared(self, t: Tensor, interpolant: Interpolant) -> Tensor:
        """Return norm times the path's own g²; infinite at its open ends."""
        at = interpolant.evaluate(t)
        return self.norm * 2 * at.sigma * at.wronskian / at.alpha

    def open_ends(self, interpolant: Interpolant) -> tuple[float, ...]:
        """List the path's open ends for its diffusion."""
        return interpolant.open_ends("velocity", "diffusion")


class Custom(Diffusion):
    """Any function of time.

    Args:
        function: g(t) of times (n,) or (), float64; returns g, not its square, in t's shape.

    Raises:
        InputError: values of another shape, below 0, or NaN inside (0, 1).
        InputTypeError: no tensor.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        t = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        for times in (t, t[0]):
            values = function(times)
            if not isinstance(values, Tensor):
                raise InputTypeError(f"got a {type(values).__name__} from g(t), expected a tensor; see torch.full_like")
            if values.shape != times.shape:
                raise InputError(
                    f"got g(t) of shape {tuple(values.shape)} for t of shape {tuple(times.shape)}, expected the same"
                )
            if not bool(((values >= 0) & values.isfinite()).all()):
                raise InputError(f"got g(t) = {values.tolist()} at t = {times.tolist()}, expected finite numbers ≥ 0")

    def squared(self, t: Tensor, interpolant: Interpolant) -> Tensor:
        """Return the function's square."""
        return self.function(t).square()
