"""Flows made of others: a flow on another path than its network was trained on, and two networks on one path.

N samples; S the shape of one sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pathline.core.errors import InputTypeError
from pathline.core.flow import BaseFlow, Conditions, Flow, Mix, Prediction, check_path
from pathline.interpolants.base import Interpolant, Kind, broadcast
from pathline.interpolants.bridge import Stochastic

__all__ = ["Rescheduled", "SplitFlow"]


class PairPrediction(Prediction):
    """A prediction made of data and noise: neither W nor 1/α is needed for a velocity."""

    single = False

    def __init__(self, data: Tensor, noise: Tensor, x: Tensor, t: Tensor, interpolant: Interpolant) -> None:
        super().__init__(data, x, t, interpolant, "data")
        self.pair = (data, noise)

    def _as(self, target: Kind) -> Tensor:
        (data, noise), at = self.pair, self.coefficients
        if target == "velocity":
            return at.alpha_rate * data + at.sigma_rate * noise
        return {"data": data, "noise": noise}[target] if target != "score" else -noise / at.sigma

    def mixed(self, mix: Mix, x: Tensor, t: Tensor) -> Prediction:
        """See ``Prediction``."""
        data, noise = self.pair
        return PairPrediction(mix(data), mix(noise), x, t, self.interpolant)


class SplitPrediction(Prediction):
    """A prediction on a path with latent noise: its drift, and z. Velocity = drift + γ'·z, score = −z/γ."""

    single = False

    def __init__(self, drift: Tensor, noise: Tensor, x: Tensor, t: Tensor, interpolant: Stochastic) -> None:
        super().__init__(noise, x, t, interpolant, "noise")
        self.drift, self.path = drift, interpolant

    def _as(self, target: Kind) -> Tensor:
        gamma, rate = (broadcast(c, self.x).to(self.x) for c in self.path.latent(self.t))
        if target == "velocity":
            return self.drift + rate * self.value
        if target == "score":
            return -self.value / gamma
        self.interpolant.check_conversion("noise", target)
        return self.value

    def mixed(self, mix: Mix, x: Tensor, t: Tensor) -> Prediction:
        """See ``Prediction``."""
        return SplitPrediction(mix(self.drift), mix(self.value), x, t, self.path)


class Rescheduled(BaseFlow):
    """A flow on another path than its network was trained on, for sampling without training.

    x on the new path at t is x·r on the old one at the time s of equal signal-to-noise ratio, r the ratio of √(α² + σ²)
    there and here; data and noise predicted there give the velocity here (arXiv:2206.00364, C.4, for any affine path).
    Both ends are limits in closed form. Where the paths end at different ratios, as ``vp`` does short of pure noise,
    times beyond the old path's end use its end.

    Args:
        flow: on the path of its training, guided or not.
        interpolant: the path to sample along.

    Raises:
        InputTypeError: no path.
        InputError: a path with latent noise or between two data sets.
    """

    predicts = "data"

    def __init__(self, flow: BaseFlow, interpolant: Interpolant) -> None:
        for path in (flow.interpolant, check_path(interpolant)):
            path.check_conversion("velocity", "score")  # refused by paths whose ends are not data and noise
        self.flow, self.interpolant, self.backbone = flow, interpolant, flow.backbone

    @property
    def nfe(self) -> int:
        """See ``BaseFlow``."""
        return self.flow.nfe

    @property
    def block_evaluations(self) -> int | None:
        """See ``BaseFlow``."""
        return self.flow.block_evaluations

    def given(self, **conditions: Any) -> Rescheduled:
        """See ``BaseFlow``."""
        return Rescheduled(self.flow.given(**conditions), self.interpolant)

    @property
    def bound(self) -> Conditions:
        """See ``BaseFlow``."""
        return self.flow.bound

    def begin(self) -> Rescheduled:
        """See ``BaseFlow``."""
        return Rescheduled(self.flow.begin(), self.interpolant)

    @property
    def remembers(self) -> bool:
        """See ``BaseFlow``."""
        return self.flow.remembers

    def check(self, x: Tensor, conditions: Conditions) -> None:
        """See ``BaseFlow``."""
        self.flow.check(x, conditions)

    def open_ends(self, target: str) -> tuple[float, ...]:
        """The old path's ends without data or noise, and the new one's without a velocity or score."""
        ends = {*self.flow.open_ends("data"), *self.flow.open_ends("noise")}
        if target in ("velocity", "diffusion"):
            ends |= set(self.interpolant.open_ends("velocity", target))
            ends |= set(self.interpolant.rate_ends())
        return tuple(sorted(ends | ({0.0} if target == "score" else set())))

    def evaluate(self, x: Tensor, t: Tensor, conditions: Conditions) -> Prediction:
        """Call the network once, at the old path's time."""
        there, path = self.flow.interpolant, self.interpolant
        s = there.time_at(path.angle(t.double()))
        radius, wanted = (torch.hypot(*p.evaluate(time)[:2]) for p, time in ((path, t.double()), (there, s)))
        ratio = broadcast(wanted / radius, x).to(x)
        prediction = self.flow.evaluate(x * ratio, s.to(t.dtype), conditions)
        return PairPrediction(prediction.data, prediction.noise, x, t, path)


class SplitFlow(BaseFlow):
    """Two networks on a path with latent noise: its regular drift, and its latent noise. Two calls an evaluation.

    Args:
        drift: predicts α'·data + σ'·source, trained by the objective ``drift``.
        noise: predicts z, trained by the objective ``noise``.
        interpolant: ``stochastic`` or ``bridge``.

    Raises:
        InputTypeError: a path without latent noise.
    """

    predicts = "noise"

    def __init__(self, drift: nn.Module, noise: nn.Module, interpolant: Interpolant) -> None:
        if not isinstance(interpolant, Stochastic):
            raise InputTypeError(
                f"got {interpolant!r}, expected a path with latent noise; use interpolants.build('bridge'), or Flow"
            )
        self.interpolant: Stochastic = interpolant
        self.backbone = noise
        self._networks = (Flow(drift, interpolant), Flow(noise, interpolant, "noise"))

    @property
    def nfe(self) -> int:
        """Calls of both networks."""
        return sum(flow.nfe for flow in self._networks)

    @property
    def block_evaluations(self) -> int | None:
        """Blocks of both networks; None if one does not tell."""
        drift, noise = (flow.block_evaluations for flow in self._networks)
        return None if drift is None or noise is None else drift + noise

    @property
    def bound(self) -> Conditions:
        """See ``BaseFlow``; both networks have the same."""
        return self._networks[0].bound

    def given(self, **conditions: Any) -> SplitFlow:
        """See ``BaseFlow``."""
        drift, noise = self._networks
        bound = SplitFlow(drift.backbone, noise.backbone, self.interpolant)
        bound._networks = (drift.given(**conditions), noise.given(**conditions))
        return bound

    def check(self, x: Tensor, conditions: Conditions) -> None:
        """See ``BaseFlow``."""
        for flow in self._networks:
            flow.check(x, conditions)

    def open_ends(self, target: str) -> tuple[float, ...]:
        """See ``BaseFlow``: where γ' is infinite for a velocity, where γ is 0 for a score."""
        return self.interpolant.open_ends("velocity" if target == "velocity" else "noise", target)

    def evaluate(self, x: Tensor, t: Tensor, conditions: Conditions) -> Prediction:
        """Call both networks."""
        drift, noise = (flow.evaluate(x, t, conditions).value for flow in self._networks)
        return SplitPrediction(drift, noise, x, t, self.interpolant)
