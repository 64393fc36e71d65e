"""Stochastic samplers made of a path's own transitions: noise added by the exact forward kernel, or by Langevin's.

From t to a later time τ the forward process multiplies by α_τ/α_t and adds noise of variance σ_τ² − (α_τ/α_t)²·σ_t².
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pathline.core.errors import InputError
from pathline.interpolants.base import Coefficients, Interpolant
from pathline.solvers.base import FixedStep, Run, registry
from pathline.solvers.grids import GridSpec

__all__ = ["Churn", "Exponential", "PredictorCorrector"]


@registry.register("exponential", aliases=("ddim",))
class Exponential(FixedStep):
    """The exact Gaussian transition between two times for given data, with a knob of stochasticity.

    Let D and ε be the data and noise expected at (x, s). The forward kernel from t to s > t makes q(x_t | x_s, data) a
    Gaussian of variance σ_t²·(1 − e^(−2h)), e^(−h) = α_s·σ_t/(α_t·σ_s). Every
    x_t = α_t·D + √(σ_t² − c²)·ε + c·z with c² = η²·σ_t²·(1 − e^(−2h)) keeps the path's marginals if D is the data
    itself, whatever the step (arXiv:2010.02502, Eq. 7 and 16, for any α and σ). η = 0 is the ODE, with a step that is
    exact for constant D (DDIM; on the linear path Euler's), η = 1 that of the forward kernel, the reverse SDE of the
    path's own diffusion; in between g² is η² times it. There is no singularity at pure noise, and no last step to
    choose: at data x_t = D.

    Order 1, one network call a step, the end is not evaluated.

    Args:
        steps: see ``FixedStep``.
        eta: η, 0 to 1.
        grid: see ``FixedStep``.
        start: see ``Solver``.
        end: see ``Solver``; before ``start`` unless η = 0.
    """

    order = 1
    calls_per_step = 1
    evaluates_end = False
    needs = ("data", "noise")

    def __init__(
        self, steps: int, *, eta: float = 1.0, grid: GridSpec = "uniform", start: float = 1.0, end: float = 0.0
    ) -> None:
        if not 0 <= eta <= 1:
            raise InputError(f"got eta {eta}, expected 0 (the ODE) to 1 (the reverse SDE)")
        self.eta = float(eta)
        super().__init__(steps, grid=grid, start=start, end=end)

    def _check_direction(self) -> None:
        if self.eta and self.end > self.start:
            raise InputError(
                f"got start {self.start:g} and end {self.end:g} with eta {self.eta:g}, which runs from noise to data; "
                "give eta=0 for inversion"
            )

    def increments_shape(self, x: Tensor) -> tuple[int, ...] | None:
        """Return (steps, N, *S), less one step that ends at data; None for the ODE."""
        return (self.steps - (self.end == 0), *x.shape) if self.eta else None

    def step(self, run: Run, x: Tensor, number: int, t: float, t_next: float) -> Tensor:
        """Take one step."""
        prediction, there = run.predict(x, t), run.at(t_next)
        spread = self._spread(run.at(t), there)
        kept = math.sqrt(max(0.0, float(there.sigma) ** 2 - spread**2))
        x = run.combine(x, prediction, t, keep=0, data=float(there.alpha), noise=kept)
        return run.add(x, run.normal(x, number), spread) if spread else x

    def _spread(self, now: Coefficients, there: Coefficients) -> float:
        """Return c."""
        if not self.eta or there.sigma == 0:
            return 0.0
        decay = float(now.alpha * there.sigma / (there.alpha * now.sigma))
        return self.eta * float(there.sigma) * math.sqrt(max(0.0, 1 - decay**2))


@registry.register("predictor-corrector")
class PredictorCorrector(FixedStep):
    """A step of the ODE, then Langevin steps at its end (arXiv:2011.13456, Algorithm 1, for any path).

    Predictor: x_t = α_t·D + σ_t·ε with D and ε the expected data and noise. Corrector: x ← x + δ·score + √(2δ)·z with
    δ = 2·(ratio·σ_t)²: the paper's step with ‖z‖/‖score‖ put at σ_t, its value on noisy data, so that a sample does not
    depend on the others of its batch. Langevin steps of this length leave a variance V too large by δ/2, that is by
    (ratio·σ_t)², where they are many; at data, where σ = 0, none is taken.

    Order 1, that of the predictor; 1 + ``corrections`` network calls a step, but one for a step that ends at t = 0.

    Args:
        steps: see ``FixedStep``.
        corrections: Langevin steps a step, 1 or more.
        ratio: signal-to-noise ratio of a Langevin step, above 0; the paper's 0.16.
        grid: see ``FixedStep``.
        start: see ``Solver``.
        end: see ``Solver``; before ``start``.
    """

    order = 1
    needs = ("data", "noise", "score")
    one_way = True

    def __init__(
        self,
        steps: int,
        *,
        corrections: int = 1,
        ratio: float = 0.16,
        grid: GridSpec = "uniform",
        start: float = 1.0,
        end: float = 0.0,
    ) -> None:
        super().__init__(steps, grid=grid, start=start, end=end)
        if corrections < 1 or not 0 < ratio < math.inf:
            raise InputError(
                f"got corrections {corrections} and ratio {ratio}, expected 1 or more and a number above 0"
            )
        self.corrections, self.ratio = corrections, float(ratio)
        self.calls_per_step = 1 + corrections
        self.evaluates_end = end != 0
        self.corrected_steps = steps - (end == 0)

    @property
    def calls(self) -> int:
        """See ``FixedStep``; no correction at t = 0."""
        return self.steps + self.corrections * self.corrected_steps

    def increments_shape(self, x: Tensor) -> tuple[int, ...]:
        """Return (corrections, N, *S) of all steps but one that ends at t = 0."""
        return (self.corrections * self.corrected_steps, *x.shape)

    def step(self, run: Run, x: Tensor, number: int, t: float, t_next: float) -> Tensor:
        """Predict, then correct."""
        there = run.at(t_next)
        alpha, sigma = float(there.alpha), float(there.sigma)
        x = run.combine(x, run.predict(x, t), t, keep=0, data=alpha, noise=sigma)
        if number < self.corrected_steps:
            length = 2 * (self.ratio * sigma) ** 2
            for i in range(self.corrections):
                x = run.combine(x, run.predict(x, t_next), t_next, score=length)
                x = run.add(x, run.normal(x, number * self.corrections + i), math.sqrt(2 * length))
        return x


@registry.register("churn")
class Churn(FixedStep):
    """EDM's stochastic sampler on any path: noise is added by the forward kernel, then Heun's step goes back further.

    At t the ratio of noise to data σ/α is raised by 1 + γ, γ = min(churn/N, √2 − 1), to that of a later time t̂:
    x̂ = (α̂/α)·x + √(σ̂² − (α̂/α)²·σ²)·z is distributed as the path there (arXiv:2206.00364, Algorithm 2, where α = 1; its
    noise without the rescaling leaves other paths). Then a step of Heun's from t̂; the last step is x = α·D + σ·ε at the
    end, with D and ε the expected data and noise.

    Order 2 in distribution, since the noise is exact; two network calls a step and one for the last, the end is not
    evaluated. At pure noise nothing can be added.

    Args:
        steps: see ``FixedStep``.
        churn: S_churn, 0 or more; EDM's 40 for ImageNet. 0 adds no noise.
        interval: (low, high) in t, both ends included, in which noise is added.
        noise_scale: S_noise, standard deviation of z, above 0; EDM's 1.003 to 1.007 are off the path on purpose.
        grid: see ``FixedStep``.
        start: see ``Solver``.
        end: see ``Solver``; before ``start``.
    """

    order = 2
    calls_per_step = 2
    evaluates_end = False
    needs = ("velocity", "data", "noise")
    one_way = True

    def __init__(
        self,
        steps: int,
        *,
        churn: float = 40.0,
        interval: tuple[float, float] = (0.0, 1.0),
        noise_scale: float = 1.0,
        grid: GridSpec = "uniform",
        start: float = 1.0,
        end: float = 0.0,
    ) -> None:
        super().__init__(steps, grid=grid, start=start, end=end)
        if not 0 <= churn < math.inf or not 0 < noise_scale < math.inf:
            raise InputError(f"got churn {churn} and noise_scale {noise_scale}, expected finite numbers ≥ 0 and > 0")
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            raise InputError(f"got interval {tuple(interval)}, expected (low, high) with 0 ≤ low ≤ high ≤ 1")
        self.churn, self.interval, self.noise_scale = float(churn), tuple(interval), float(noise_scale)

    @property
    def calls(self) -> int:
        """See ``FixedStep``; one for the last step."""
        return 2 * self.steps - 1

    def increments_shape(self, x: Tensor) -> tuple[int, ...]:
        """Return (steps, N, *S), used or not."""
        return (self.steps, *x.shape)

    def integrate(self, run: Run, x: Tensor) -> Tensor:
        """Walk over the grid; where noise takes each step is known beforehand."""
        run.plan = self._raised(run.flow.interpolant)
        run.prepare(run.plan)
        return super().integrate(run, x)

    def step(self, run: Run, x: Tensor, number: int, t: float, t_next: float) -> Tensor:
        """Add noise, and go back."""
        later = run.plan[number]
        if later != t:
            now, there = run.at(t), run.at(later)
            ratio = float(there.alpha / now.alpha)
            variance = float(there.sigma) ** 2 - (ratio * float(now.sigma)) ** 2
            x = run.add(run.scale(x, ratio), run.normal(x, number), self.noise_scale * math.sqrt(variance))
        first, dt = run.predict(x, later), t_next - later
        if number == self.steps - 1:
            end = run.at(t_next)
            return run.combine(x, first, later, keep=0, data=float(end.alpha), noise=float(end.sigma))
        ahead = run.ahead(x, first, later, velocity=dt)
        x = run.combine(x, first, later, velocity=0.5 * dt)
        return run.combine(x, run.predict(ahead, t_next), t_next, velocity=0.5 * dt)

    def _raised(self, path: Interpolant) -> list[float]:
        """Return for each step the time of a ratio of noise to data 1 + γ times as large, or its own time."""
        low, high = self.interval
        gamma = min(self.churn / self.steps, math.sqrt(2) - 1)
        t = torch.tensor(self.times[:-1], dtype=torch.float64)
        at = path.evaluate(t)
        later = torch.maximum(t, path.time_at(torch.atan2((1 + gamma) * at.sigma, at.alpha)))
        noisy = (t >= low) & (t <= high) & (at.alpha > 1e-12) & (gamma > 0)
        return [float(time) for time in torch.where(noisy, later, t)]
