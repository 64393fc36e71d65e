"""Regressions of what a network may predict: velocity, score, noise, data, and the drift of a path with latent noise.

N samples; S the shape of one sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pathline.core.draws import BoundDraws, send
from pathline.core.errors import InputError
from pathline.interpolants.base import Interpolant, broadcast
from pathline.interpolants.bridge import Stochastic
from pathline.interpolants.couplings import CouplingSpec
from pathline.objectives import times as time_laws
from pathline.objectives import weightings
from pathline.objectives.base import Loss, Objective, registry, squared_error
from pathline.objectives.times import TimeLaw, TimeLawSpec
from pathline.objectives.weightings import WeightingSpec

__all__ = ["Data", "Drift", "Noise", "Regression", "Score", "Velocity"]


class Regression(Objective):
    """A regression at one time a sample: mean over a sample's values of (prediction − target)², weighted.

    Args:
        interpolant: the path.
        times: law of the training times.
        label_dropout: see ``Objective``.
        coupling: see ``Objective``.
        loss: ``mse``, or ``huber``: ½e² up to ``delta``, delta·(|e| − ½·delta) beyond.
        delta: of the Huber loss, above 0; None means 1. Only with it.
        cosine: weight, 0 or more, of 1 − cos(prediction, target) over each sample. LightningDiT, whose idea it is
            (arXiv:2501.01423, 4.2), takes the cosine over the channels of each position.
        weighting: weight of the loss along the path; see ``objectives.weightings``.
        wanted_times: a second law: the loss is weighted by its density over that of ``times``, so that its expectation
            is the one under ``wanted_times`` while times are drawn by ``times``, which must reach half of its mass or
            more.
        interval: (low, high) in t; a law's times are mapped into it. None takes the path's ``training_interval``, all
            of [0, 1] but for margins at open ends.

    Raises:
        InputError: options out of range or without effect, an interval that reaches an open end, a weight that is
            infinite in it, or ``times`` that hardly ever come where ``wanted_times`` are.
    """

    def __init__(
        self,
        interpolant: Interpolant,
        *,
        times: TimeLawSpec = "uniform",
        label_dropout: float = 0.1,
        coupling: CouplingSpec | None = None,
        loss: Literal["mse", "huber"] = "mse",
        delta: float | None = None,
        cosine: float = 0.0,
        weighting: WeightingSpec = "none",
        wanted_times: TimeLawSpec | None = None,
        interval: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(interpolant, times=times, label_dropout=label_dropout, coupling=coupling)
        self.check_path()
        if loss not in ("mse", "huber"):
            raise InputError(f"got loss {loss!r}, expected 'mse' or 'huber'")
        if delta is not None and (loss == "mse" or not 0 < delta < math.inf):
            raise InputError(f"got delta {delta} with loss {loss!r}; it belongs to 'huber', a finite number above 0")
        if not 0 <= cosine < math.inf:
            raise InputError(f"got cosine {cosine}, expected a finite weight of 0 or more")
        self.delta = (delta or 1.0) if loss == "huber" else None
        self.interval = _checked_interval(interpolant, self.predicts, interval)
        self.weighting = weightings.build(weighting)
        if not isinstance(self.weighting, weightings.Uniform):
            if interpolant.latent_noise:
                raise InputError("got a weighting on a path with latent noise, where none is defined; use 'none'")
            self.weighting.check(interpolant, self.predicts, self.interval)
        self.wanted_times: TimeLaw | None = None
        if wanted_times is not None:
            self.wanted_times = time_laws.build(wanted_times).bind(interpolant)
            _check_trade(self.times, self.wanted_times)
        self.weights = {self.predicts: 1.0} | ({"cosine": cosine} if cosine else {})

    def check_path(self) -> None:
        """Raise InputError on a path where the objective means nothing."""

    def loss(
        self,
        backbone: nn.Module,
        data: Tensor,
        noise: Tensor,
        draws: BoundDraws,
        features: tuple[Tensor, ...],
        conditions: Mapping[str, Any],
    ) -> Loss:
        """Evaluate the loss at one time a sample."""
        self.check_features(features, backbone, len(data))
        t, importance = (send(value, data.device) for value in self.draw_times(draws))
        latent = None
        if self.interpolant.latent_noise:
            latent = send(draws.normal("latent", data.shape[1:]), data.device).to(data)
        x = self.interpolant.interpolate(data, noise, t, latent)
        prediction, extra = self.predict(backbone, x, t, features, conditions)
        terms, plain = self._terms(prediction, data, noise, t, latent)
        terms = {name: importance * term for name, term in (terms | extra).items()}
        return self.combine(terms, {self.predicts: plain, **extra}, t)

    def check_features(self, features: tuple[Tensor, ...], backbone: nn.Module, count: int) -> None:
        """Raise InputError for encoder features that do not fit; here, for any."""
        if features:
            raise InputError(
                f"got encoder features, which the {self.predicts} objective does not use; leave them out, or use "
                "'alignment'"
            )

    def predict(
        self,
        backbone: nn.Module,
        x: Tensor,
        t: Tensor,
        features: tuple[Tensor, ...],
        conditions: Mapping[str, Any],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Call the network once; return its prediction, (N, *S), and further terms, name -> (N,)."""
        return backbone(x, t, **conditions), {}

    def draw_times(self, draws: BoundDraws) -> tuple[Tensor, Tensor]:
        """Draw times in the interval, and weights that trade their law for ``wanted_times``; (N,) each, on the host."""
        t = self.times.sample(draws)
        importance = torch.ones_like(t)
        if self.wanted_times is not None:
            importance = _importance(self.times, self.wanted_times, t).float()
        low, high = self.interval
        return low + (high - low) * t, importance

    def terms(
        self, prediction: Tensor, data: Tensor, noise: Tensor, t: Tensor, latent: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Evaluate the weighted error, (N,), and the cosine's term if it has a weight.

        Args:
            prediction: of what ``predicts`` says, at x_t, (N, *S).
            data: (N, *S).
            noise: (N, *S), or the source.
            t: (N,).
            latent: z of a path with latent noise.
        """
        return self._terms(prediction, data, noise, t, latent)[0]

    def target(
        self, prediction: Tensor, data: Tensor, noise: Tensor, t: Tensor, latent: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return prediction and target in the units of the loss, (N, *S) each."""
        return prediction, self.interpolant.target(self.predicts, data, noise, t, latent)

    def _terms(
        self, prediction: Tensor, data: Tensor, noise: Tensor, t: Tensor, latent: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        prediction, target = self.target(prediction, data, noise, t, latent)
        plain = squared_error(prediction, target)
        error = plain if self.delta is None else _huber(prediction, target, self.delta)
        if not isinstance(self.weighting, weightings.Uniform):  # some devices have no float64
            error = self.weighting.weight(t.double(), self.interpolant, self.predicts).to(error) * error
        terms = {self.predicts: error}
        if "cosine" in self.weights:
            flat = prediction.flatten(1).to(plain)
            terms["cosine"] = 1 - functional.cosine_similarity(flat, target.flatten(1).to(plain), dim=1)
        return terms, plain


@registry.register("velocity", aliases=("flow-matching",))
class Velocity(Regression):
    """Mean squared error of the velocity, ‖v(x_t, t) − dx_t/dt‖² (arXiv:2210.02747, Eq. 9); see ``Regression``."""

    predicts = "velocity"


@registry.register("noise")
class Noise(Regression):
    """Mean squared error of the noise (arXiv:2006.11239), or of z on a path with latent noise; see ``Regression``."""

    predicts = "noise"


@registry.register("data")
class Data(Regression):
    """Mean squared error of the data; see ``Regression``."""

    predicts = "data"


@registry.register("score")
class Score(Regression):
    """Denoising score matching in units of the noise, ‖σ·s(x_t, t) + noise‖² (arXiv:2011.13456); see ``Regression``.

    On a path with latent noise ‖γ·s + z‖².
    """

    predicts = "score"

    def target(
        self, prediction: Tensor, data: Tensor, noise: Tensor, t: Tensor, latent: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return σ·s and −noise."""
        self.interpolant.check_conversion("noise", "score")
        path = self.interpolant
        if isinstance(path, Stochastic) and latent is not None:
            return broadcast(path.latent(t).gamma, prediction) * prediction, -latent
        return broadcast(path.evaluate(t).sigma, prediction) * prediction, -noise


@registry.register("drift")
class Drift(Regression):
    """Mean squared error of α'·data + σ'·source, the velocity of a path with latent noise without γ'·z.

    γ' may be infinite; the drift is not. With a network of the noise z it makes a ``SplitFlow`` (arXiv:2303.08797).

    Raises:
        InputError: a path without latent noise; train its velocity.
    """

    predicts = "drift"

    def check_path(self) -> None:
        """Refuse paths without latent noise."""
        if not self.interpolant.latent_noise:
            name = type(self.interpolant).__name__
            raise InputError(f"got the {name} path, without latent noise; use the objective 'velocity'")


def _importance(drawn: TimeLaw, wanted: TimeLaw, t: Tensor) -> Tensor:
    """Return the ratio of densities at times (N,), in float64."""
    inside = t.double().clamp(1e-7, 1 - 1e-7)  # where densities are defined
    return wanted.density(inside) / drawn.density(inside)


def _check_trade(drawn: TimeLaw, wanted: TimeLaw) -> None:
    """Raise InputError if one law cannot stand for the other: if the mean of the weights is far from 1, or infinite.

    The mean is taken at 4,096 quantiles in place of as many draws.
    """
    u = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    mean = float(_importance(drawn, wanted, drawn.quantile(u)).mean())
    if not 0.5 < mean < 2:
        raise InputError(
            f"got times {type(drawn).__name__} for wanted_times {type(wanted).__name__}, with weights of mean "
            f"{mean:.3g} in 4,096 draws, expected about 1; draw by a wider law, or by wanted_times itself"
        )


def _huber(prediction: Tensor, target: Tensor, delta: float) -> Tensor:
    precision = torch.promote_types(prediction.dtype, torch.float32)
    error = functional.huber_loss(prediction.to(precision), target.to(precision), reduction="none", delta=delta)
    return error.flatten(1).mean(1)


def _checked_interval(interpolant: Interpolant, kind: str, interval: tuple[float, float] | None) -> tuple[float, float]:
    """Return the interval of training; raise where it reaches an end at which the kind does not exist."""
    low, high = interpolant.training_interval(kind)
    if interval is None:
        return low, high
    try:
        first, last = (float(end) for end in interval)
    except (TypeError, ValueError):
        raise InputError(f"got interval {interval!r}, expected (low, high) with 0 <= low < high <= 1") from None
    if not 0 <= first < last <= 1:
        raise InputError(f"got interval {first, last}, expected (low, high) with 0 <= low < high <= 1")
    if (low > 0 and first == 0) or (high < 1 and last == 1):
        raise InputError(
            f"got interval {first, last}, and the {type(interpolant).__name__} path has no {kind} at one of its "
            f"ends; keep away from it, as ({low:g}, {high:g}) does"
        )
    return first, last
