"""Paths between two data sets: two-ended ones, and those that add latent noise γ(t)·z on the way.

x_t = α·data + σ·source + γ·z (arXiv:2303.08797, Eq. 2.1): t = 0 is the data, t = 1 a source of any distribution, z is
standard normal. With latent noise a velocity alone does not tell the score: −E[z|x]/γ needs a prediction of z, the
kind ``noise`` of these paths. Where γ' is infinite the velocity's target has no finite variance; train its regular part
α'·data + σ'·source, the kind ``drift``, and z, and put both together in a ``SplitFlow``.

N samples; S the shape of one sample; t has shape (N,) or ().
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.func import jvp

from pathline.core.checks import check_times
from pathline.core.errors import InputError
from pathline.interpolants.base import (
    Coefficients,
    Interpolant,
    InterpolantSpec,
    broadcast,
    check_kinds,
    registry,
)

__all__ = ["Bridge", "Latent", "Stochastic", "TwoEnded"]

Shape = Literal["brownian", "sine-squared"]


@registry.register("two-ended")
class TwoEnded(Interpolant):
    """x_t = α·data + σ·source: from any source, images to images, say. It has no score: the source is not Gaussian.

    The kind ``noise`` is the source. Any coupling of the two sets will do; see ``interpolants.couplings``.

    Args:
        path: gives α and σ.
    """

    def __init__(self, path: InterpolantSpec = "linear") -> None:
        self.path: Interpolant = registry.build(path)
        if isinstance(self.path, TwoEnded):
            raise InputError(f"got the path {type(self.path).__name__} inside a two-ended one; give a path of noise")
        self.straight = self.path.straight

    def evaluate(self, t: Tensor) -> Coefficients:
        """Return the coefficients of ``path``."""
        return self.path.evaluate(t)

    def check_conversion(self, source: str, target: str) -> None:
        """Refuse scores."""
        super().check_conversion(source, target)
        if "score" in (source, target):
            raise InputError(
                f"got {target} from {source} on a two-ended path, whose source has no known score; add latent noise "
                "(interpolant 'stochastic' or 'bridge') to have one"
            )

    def open_ends(self, source: str, target: str) -> tuple[float, ...]:
        """See ``Interpolant``; refuses ``diffusion`` with the scores."""
        if target == "diffusion":
            self.check_conversion(source, "score")
        return super().open_ends(source, target)

    def _time_at(self, angle: Tensor) -> Tensor:
        return self.path._time_at(angle)


class Latent(NamedTuple):
    """γ and dγ/dt, of one shape."""

    gamma: Tensor
    gamma_rate: Tensor


@registry.register("stochastic", aliases=("stochastic-interpolant",))
class Stochastic(TwoEnded):
    """x_t = α·data + σ·source + γ(t)·z, γ = 0 at both ends (arXiv:2303.08797).

    Kinds: ``velocity`` (α'·data + σ'·source + γ'·z), ``drift`` (without γ'·z), ``noise`` (z) and ``score`` (−z/γ).

    Args:
        path: gives α and σ.
        gamma: ``brownian``, γ = scale·√(t(1 − t)), with infinite rates at both ends, or ``sine-squared``,
            γ = scale·sin²(πt), with none.
        scale: above 0; √2 is the paper's choice with ``brownian``.

    Raises:
        InputError: a scale that is not above 0, an unknown gamma, or a two-ended path inside.
    """

    latent_noise = True

    def __init__(self, path: InterpolantSpec = "linear", gamma: Shape = "brownian", scale: float = 1.0) -> None:
        super().__init__(path)
        if gamma not in get_args(Shape):
            raise InputError(f"got gamma {gamma!r}, expected one of {', '.join(get_args(Shape))}")
        if not 0 < scale < math.inf:
            raise InputError(f"got scale {scale}, expected a finite number above 0")
        self.gamma, self.scale = gamma, float(scale)
        self.straight = False

    def latent(self, t: Tensor | float) -> Latent:
        """Return γ and dγ/dt at checked times; the rate is infinite at the ends of ``brownian``."""
        t = check_times(t)
        if self.gamma == "brownian":
            root = torch.sqrt(t * (1 - t))
            return Latent(self.scale * root, 0.5 * self.scale * (1 - 2 * t) / root)
        sine, cosine = torch.sin(math.pi * t), torch.cos(math.pi * t)
        return Latent(self.scale * sine.square(), 2 * math.pi * self.scale * sine * cosine)

    def interpolate(self, data: Tensor, noise: Tensor, t: Tensor | float, latent: Tensor | None = None) -> Tensor:
        """Return x_t; ``noise`` is the source, ``latent`` z, all (N, *S)."""
        x = super().interpolate(data, noise, t, latent)
        return x if latent is None else x + self._spread(x, t).gamma * latent

    def velocity(self, data: Tensor, noise: Tensor, t: Tensor | float, latent: Tensor | None = None) -> Tensor:
        """Return dx_t/dt with γ'·z."""
        self._refuse_open_ends(check_times(t), self.open_ends("velocity", "velocity"), "velocity")
        drift = super().velocity(data, noise, t, latent)
        return drift if latent is None else drift + self._spread(drift, t).gamma_rate * latent

    def acceleration(self, data: Tensor, noise: Tensor, t: Tensor | float, latent: Tensor | None = None) -> Tensor:
        """Return d²x_t/dt² with γ''·z."""
        regular = super().acceleration(data, noise, t, latent)
        return regular if latent is None else regular + self._spread_rate(regular, t) * latent

    def acceleration_ends(self) -> tuple[float, ...]:
        """See ``Interpolant``: a brownian γ'' is infinite at both ends."""
        return (0.0, 1.0) if self.gamma == "brownian" else super().acceleration_ends()

    def target(self, kind: str, data: Tensor, noise: Tensor, t: Tensor | float, latent: Tensor | None = None) -> Tensor:
        """Return the velocity, its part ``drift``, z for ``noise``, or −z/γ for ``score``."""
        if kind == "drift":
            self._check_latent(data, latent)
            return super().velocity(data, noise, t, latent)
        check_kinds(kind)
        self._check_latent(data, latent)
        if kind == "velocity" or latent is None:
            return self.velocity(data, noise, t, latent)
        self.check_conversion("noise", kind)
        self._refuse_open_ends(check_times(t), self.open_ends("noise", kind), kind)
        return latent if kind == "noise" else -latent / self._spread(latent, t).gamma

    def derive(self, value: Tensor, x: Tensor, coefficients: Coefficients, source: str, target: str) -> Tensor:
        """Refuse: γ is not among the coefficients; ``convert`` knows it."""
        self.check_conversion(source, target)
        if source == target:
            return value
        raise InputError(f"got {target} from {source} on a path with latent noise; call convert, or use a SplitFlow")

    def convert(
        self, value: Tensor, x: Tensor, t: Tensor | float, *, source: str = "noise", target: str = "score"
    ) -> Tensor:
        """Turn z into the score, −z/γ, or back; see ``Interpolant.convert``."""
        ends = self.open_ends(source, target)
        self._refuse_open_ends(check_times(t, len(x)), ends, f"{target} from {source}")
        if source == target:
            return value
        gamma = self._spread(value, t).gamma
        return -value / gamma if target == "score" else -gamma * value

    def check_conversion(self, source: str, target: str) -> None:
        """Refuse all but noise and score from one another."""
        check_kinds(source, target)
        if source != target and {source, target} != {"noise", "score"}:
            raise InputError(
                f"got {target} from a predicted {source} on a path with latent noise, where one does not tell the "
                "other; train 'drift' and 'noise' networks and use SplitFlow"
            )
        if "data" in (source, target):
            raise InputError("got the kind data on a path with latent noise, which predicts velocity, noise or score")

    def open_ends(self, source: str, target: str) -> tuple[float, ...]:
        """See ``Interpolant``: a brownian γ has an infinite rate at both ends, and every score is infinite there."""
        if target == "diffusion":
            raise InputError("got a path with latent noise, which has no diffusion of its own; name another")
        self.check_conversion(source, target)
        if target == "velocity":
            return _infinite_rates(self)
        return (0.0, 1.0) if source == "noise" and target == "score" else ()

    def training_interval(self, kind: str) -> tuple[float, float]:
        """As ``Interpolant``; 1e-3 from both ends where γ' or 1/γ is infinite."""
        if kind == "drift":
            return super().training_interval("velocity")
        low, high = super().training_interval(kind)
        ends = self.open_ends("velocity", "velocity") if kind == "velocity" else self.open_ends("noise", kind)
        return (max(low, 1e-3), min(high, 1 - 1e-3)) if ends else (low, high)

    def _spread_rate(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Return γ'', shaped to multiply x."""
        times = check_times(t, len(x)).to(x.device)
        return broadcast(jvp(lambda t: self.latent(t).gamma_rate, (times,), (torch.ones_like(times),))[1], x)

    def _spread(self, x: Tensor, t: Tensor | float) -> Latent:
        times = check_times(t, len(x)).to(x.device)
        return Latent(*(broadcast(c, x) for c in self.latent(times)))


@registry.register("bridge", aliases=("schrodinger-bridge",))
class Bridge(Stochastic):
    """The Brownian bridge of Schrödinger-bridge matching: x_t = (1 − t)·data + t·source + scale·√(t(1 − t))·z.

    With the entropic coupling of regularisation 2·scale², its default, drift and score learned on it make the
    Schrödinger bridge between the two sets (arXiv:2307.03672, Eq. 10, Prop. 3.4).

    Args:
        scale: standard deviation of the Brownian motion over unit time, above 0.
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__("linear", "brownian", scale)
        self.coupling = {"name": "sinkhorn", "regularisation": 2 * scale**2, "relative": False}


@lru_cache(maxsize=256)
def _infinite_rates(path: Stochastic) -> tuple[float, ...]:
    ends = (torch.tensor(t, dtype=torch.float64) for t in (0.0, 1.0))
    rates = ((*path.evaluate(t), path.latent(t).gamma_rate) for t in ends)
    return tuple(t for t, found in zip((0.0, 1.0), rates, strict=True) if not all(r.isfinite() for r in found))
