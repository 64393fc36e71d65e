"""MeanFlow (arXiv:2505.13447): average velocities, learned without a teacher, sample in one step. One file, whole.

u(x_t, r, t) is the mean velocity of the flow from t back to r: (t − r)·u = ∫ᵣᵗ v(x_τ, τ)dτ. Differentiating gives the
target u = v − (t − r)·du/dt (Eq. 6). The paper's clock is ours. The network takes the condition ``gap`` = t − r; with
none it is an ordinary velocity, for any solver.

N samples; S the shape of one sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import jvp

from pathline import objectives, solvers
from pathline.backbones.layers import math_attention
from pathline.core.draws import BoundDraws, send
from pathline.core.errors import InputError
from pathline.core.flow import BaseFlow
from pathline.interpolants.base import Interpolant, broadcast
from pathline.interpolants.couplings import CouplingSpec
from pathline.objectives import Loss, Objective
from pathline.objectives.base import squared_error
from pathline.objectives.times import TimeLawSpec
from pathline.solvers.base import FixedStep, Run
from pathline.solvers.grids import GridSpec

__all__ = ["MeanFlow", "MeanFlowObjective"]

_SECOND = 2**32  # counter of the second time's draws, far from those of training steps
PAPER_TIMES = {"name": "logit-normal", "mean": -0.4, "std": 1.0}


@objectives.register("mean-flow")
class MeanFlowObjective(Objective):
    """‖u(x_t, r, t) − sg(v − (t − r)·du/dt)‖² / sg(‖·‖² + epsilon)^power (arXiv:2505.13447, Eqs. 9 to 11, 22).

    t and r are the larger and the smaller of two draws of ``times``; in a share of the batch they differ, in the rest
    r = t and the objective is flow matching. du/dt is along the sample's own velocity v.

    Args:
        interpolant: a path without latent noise.
        times: law of both times; the paper's logit-normal(−0.4, 1).
        label_dropout: see ``Objective``.
        coupling: see ``Objective``.
        share: of samples with r ≠ t, in [0, 1]; the paper's 0.25.
        power: of the adaptive weight, 0 or more; the paper's 1, which takes for granted that ‖·‖² hardly varies between
            samples, as in many dimensions. In few it shifts the minimum: use 0, the plain sum of squares.
        epsilon: of the adaptive weight, above 0; the paper's 1e-3.
        derivative: ``jvp``, forward-mode differentiation through the plain attention kernel, exact; or
            ``finite-difference``, central along (v, 1), two more network calls without gradients and any kernel;
            one-sided within ``step`` of r and of 1, so that the network is called at times in [r, 1] alone. Only
            float32 resolves such differences.
        step: of the finite difference in t, in (0, 0.1]; None means 5e-3. Only with it.

    Raises:
        InputError: options out of range or without effect, or a path with latent noise.
    """

    differentiates_all = False

    def __init__(
        self,
        interpolant: Interpolant,
        *,
        times: TimeLawSpec = PAPER_TIMES,
        label_dropout: float = 0.1,
        coupling: CouplingSpec | None = None,
        share: float = 0.25,
        power: float = 1.0,
        epsilon: float = 1e-3,
        derivative: Literal["jvp", "finite-difference"] = "jvp",
        step: float | None = None,
    ) -> None:
        super().__init__(interpolant, times=times, label_dropout=label_dropout, coupling=coupling)
        if not 0 <= share <= 1 or not 0 <= power < math.inf or not 0 < epsilon < math.inf:
            raise InputError(
                f"got share {share}, power {power}, epsilon {epsilon}; expected a share in [0, 1], a finite power of 0 "
                "or more and a finite epsilon above 0"
            )
        if derivative not in ("jvp", "finite-difference"):
            raise InputError(f"got derivative {derivative!r}, expected 'jvp' or 'finite-difference'")
        if step is not None and (derivative == "jvp" or not 0 < step <= 0.1):
            raise InputError(
                f"got step {step} with derivative {derivative!r}; it belongs to 'finite-difference', (0, 0.1]"
            )
        if interpolant.latent_noise:
            raise InputError("got a path with latent noise, on which average velocities are not defined here")
        self.share, self.power, self.epsilon = share, power, epsilon
        self.derivative, self.step = derivative, 5e-3 if step is None else step
        self.takes_differences = derivative == "finite-difference"
        self.interval = interpolant.training_interval("velocity")
        self.weights = {"mean-flow": 1.0}

    def loss(
        self,
        backbone: nn.Module,
        data: Tensor,
        noise: Tensor,
        draws: BoundDraws,
        features: tuple[Tensor, ...],
        conditions: Mapping[str, Any],
    ) -> Loss:
        """Evaluate the loss: one network call with its derivative along the path."""
        if features:
            raise InputError("got encoder features, which the mean-flow objective does not use; leave them out")
        r, t = (send(time, data.device) for time in self.draw_times(draws))
        x, v = (f(data, noise, t) for f in (self.interpolant.interpolate, self.interpolant.velocity))
        u, rate = self.derive(backbone, x, v.to(x), t, r, conditions)
        mean = squared_error(u + broadcast(t - r, x) * rate.detach(), v)  # Δ = u − target
        total = mean * v[0].numel()
        weighted = total / (total.detach() + self.epsilon) ** self.power
        return self.combine({"mean-flow": weighted}, {"velocity": mean}, t)

    def draw_times(self, draws: BoundDraws) -> tuple[Tensor, Tensor]:
        """Draw (r, t), each (N,) on the host, r ≤ t."""
        again = draws.draws.at(draws.ids, draws.counter + _SECOND, step=draws.step)
        low, high = self.interval
        first, second = (low + (high - low) * self.times.sample(d) for d in (draws, again))
        t = torch.maximum(first, second)
        apart = draws.uniform("mean-flow share") < self.share
        return torch.where(apart, torch.minimum(first, second), t), t

    def derive(
        self, backbone: nn.Module, x: Tensor, v: Tensor, t: Tensor, r: Tensor, conditions: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Return u(x, r, t) and its total derivative v·∂u/∂x + ∂u/∂t at fixed r, (N, *S) each.

        Args:
            x: x_t, (N, *S).
            v: velocity along which to differentiate, (N, *S).
            t: later times, nearer to noise, (N,).
            r: earlier times, (N,).
        """

        def average(x: Tensor, t: Tensor) -> Tensor:
            value: Tensor = backbone(x, t, gap=t - r, **conditions)
            return value

        if self.derivative == "jvp":
            with math_attention():
                u, rate, *_ = jvp(average, (x, t), (v, torch.ones_like(t)))
            return u, rate
        ahead, behind = (1 - t).clamp(max=self.step), (t - r).clamp(max=self.step)
        with torch.no_grad():
            later, earlier = (average(x + broadcast(step, x).to(x) * v, t + step) for step in (ahead, -behind))
        length = broadcast(ahead + behind, x).clamp(min=1e-12)  # 0 at r = t = 1, where the rate has no weight
        return average(x, t), (later - earlier) / length


@solvers.register("mean-flow")
class MeanFlow(FixedStep):
    """x_r = x_t − (t − r)·u(x_t, r, t): exact for exact averages, whatever the step (arXiv:2505.13447, Eq. 12).

    Needs a network that takes the condition ``gap``; on one of plain velocities it would be Euler's method.

    Args:
        steps: number of steps N ≥ 1; one is what the method is for.
        grid: see ``FixedStep``.
        start: see ``Solver``.
        end: see ``Solver``; before ``start``, since averages run from noise to data.

    Raises:
        InputError: an end after the start; in a solve, a flow that predicts anything but a velocity, as ``Rescheduled``
            and ``SplitFlow`` do: a gap is a length of time on the clock of the path trained on.
    """

    order = 1
    calls_per_step = 1
    evaluates_end = False
    one_way = True

    def __init__(self, steps: int = 1, *, grid: GridSpec = "uniform", start: float = 1.0, end: float = 0.0) -> None:
        super().__init__(steps, grid=grid, start=start, end=end)

    def check(self, flow: BaseFlow, x: Tensor, increments: Tensor | None) -> None:
        """Check that the flow predicts velocities, on the path that it was trained on."""
        if flow.predicts != "velocity":
            raise InputError(
                f"got a {type(flow).__name__} that predicts {flow.predicts}, expected average velocities on the path "
                "they were trained on; use Flow(backbone, interpolant), or another solver"
            )
        super().check(flow, x, increments)

    def step(self, run: Run, x: Tensor, number: int, t: float, t_next: float) -> Tensor:
        """Take one step."""
        run.times.append(t)
        gap = torch.full((len(x),), t - t_next, dtype=x.dtype, device=x.device)
        time = torch.tensor(t, dtype=torch.float64)
        return x.add_(run.flow.evaluate(x, time, {**run.conditions, "gap": gap}).velocity, alpha=t_next - t)
