"""Laws of time over another law: shifted towards one end, or with less variance.

N samples; t has shape (N,).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pathline.core.draws import BoundDraws
from pathline.core.errors import InputError
from pathline.interpolants.base import Interpolant
from pathline.objectives.times import TimeLaw, TimeLawSpec, registry

__all__ = ["Shifted", "Stratified"]


@registry.register("shifted")
class Shifted(TimeLaw):
    """t = a·s/(1 + (a − 1)·s), s of another law: logit t = logit s + ln a (arXiv:2403.03206, Eq. 23).

    Above 1 towards noise. Programs whose clock runs from noise to data state 1/a; see ``interpolants.clocks.shift``.

    Args:
        law: of s.
        shift: a, above 0.
        dimension: in its place, the number of values of a sample, C·H·W: a = √(dimension/base).
        base: dimension at which there is no shift; 4096, that of a 4×32×32 latent.

    Raises:
        InputError: neither or both of shift and dimension, a base beside a shift, or one that is not above 0.
    """

    def __init__(
        self,
        law: TimeLawSpec = "uniform",
        shift: float | None = None,
        dimension: int | None = None,
        base: int | None = None,
    ) -> None:
        if (shift is None) == (dimension is None):
            raise InputError(f"got shift {shift} and dimension {dimension}, expected one of the two")
        if base is not None and dimension is None:
            raise InputError(f"got base {base} beside a shift, which does not use it; leave it out, or give dimension")
        self.law: TimeLaw = registry.build(law)
        self.shift = _ratio(dimension, 4096 if base is None else base) if shift is None else float(shift)
        if not 0 < self.shift < math.inf:
            raise InputError(f"got a shift of {shift}, expected a finite number above 0; 1 is none")

    def quantile(self, u: Tensor) -> Tensor:
        """Return the law's quantile, shifted."""
        return self._shifted(self.law.quantile(u))

    def density(self, t: Tensor) -> Tensor:
        """Return the law's density at s = t/(a − (a − 1)·t) times ds/dt."""
        below = self.shift - (self.shift - 1) * t
        return self.law.density(t / below) * self.shift / below.square()

    def sample(self, draws: BoundDraws) -> Tensor:
        """Return the law's times, shifted."""
        return self._shifted(self.law.sample(draws))

    def _shifted(self, s: Tensor) -> Tensor:
        return (self.shift * s / (1 + (self.shift - 1) * s)).clamp(max=1)  # 1 is rounded beyond itself

    def bind(self, interpolant: Interpolant) -> TimeLaw:
        """Bind the law below."""
        return Shifted(self.law.bind(interpolant), self.shift)


@registry.register("stratified")
class Stratified(TimeLaw):
    """The same law with less variance: of every ``strata`` samples in a row, one falls into each stratum of the law.

    A sample's stratum is a function of (seed, sample id) alone, so that batch size and devices change nothing.

    Args:
        law: any without strata of its own.
        strata: number of strata, 2 or more; best a divisor of the batch size.

    Raises:
        InputError: strata below 2 or no whole number, or a law with strata of its own.
    """

    def __init__(self, law: TimeLawSpec = "uniform", strata: int = 64) -> None:
        if not isinstance(strata, int) or strata < 2:
            raise InputError(f"got strata {strata}, expected a whole number of 2 or more")
        self.law: TimeLaw = registry.build(law)
        if _is_stratified(self.law):
            raise InputError("got a stratified law for stratified, which would have no effect; set strata once")
        self.strata = strata

    def quantile(self, u: Tensor) -> Tensor:
        """Return the law's."""
        return self.law.quantile(u)

    def density(self, t: Tensor) -> Tensor:
        """Return the law's."""
        return self.law.density(t)

    def sample(self, draws: BoundDraws) -> Tensor:
        """Return (N,) times; strata are dealt anew for every ``strata`` ids and every counter."""
        ids = torch.as_tensor(draws.ids, device="cpu").numpy()
        blocks, places = ids // self.strata, ids % self.strata
        dealt = np.empty(len(ids))
        for block in np.unique(blocks):
            order = draws.draws.permutation(f"time strata {draws.counter}", self.strata, counter=int(block))
            mine = blocks == block
            dealt[mine] = order[places[mine]]
        u = (torch.from_numpy(dealt) + draws.uniform("time").double()) / self.strata
        return self.law.quantile(u).float().clamp(0, 1)

    def bind(self, interpolant: Interpolant) -> TimeLaw:
        """Bind the law below."""
        return Stratified(self.law.bind(interpolant), self.strata)


def _ratio(dimension: int | None, base: int) -> float:
    """Return √(dimension/base)."""
    if dimension is None or not dimension > 0 or not base > 0:
        raise InputError(f"got dimension {dimension} and base {base}, expected numbers of values above 0")
    return math.sqrt(dimension / base)


def _is_stratified(law: TimeLaw) -> bool:
    return isinstance(law, Stratified) or (isinstance(law, Shifted) and _is_stratified(law.law))
