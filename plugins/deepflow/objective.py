"""DeepFlow's objective: deep supervision, the acceleration loss, alignment (arXiv:2503.14494, 3.2 to 3.4).

N samples, S the shape of one sample, k branches, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pathline.core.draws import BoundDraws, send
from pathline.core.errors import InputError
from pathline.interpolants.base import Interpolant, broadcast
from pathline.interpolants.couplings import CouplingSpec
from pathline.objectives.alignment import negative_cosine
from pathline.objectives.base import Loss, Objective, registry, squared_error
from pathline.objectives.times import TimeLawSpec
from pathline.plugins.deepflow.backbone import Branches

__all__ = ["DeepFlowObjective", "later_times"]


def later_times(t: Tensor, gaps: Sequence[Tensor], *, up: bool) -> tuple[Tensor, ...]:
    """Return the times of all branches: t_{i+1} = clip(t_i ± gap_i, 0, 1), each (N,).

    Args:
        t: time of the first branch, (N,).
        gaps: k − 1 non-negative gaps, (N,) each.
        up: whether later branches lie towards noise.
    """
    times = [t]
    for gap in gaps:
        times.append((times[-1] + gap if up else times[-1] - gap).clamp(0, 1))
    return tuple(times)


@registry.register("deepflow")
class DeepFlowObjective(Objective):
    """Σ_i β_i·‖v_i − V‖² + λ·Σ_i A_i + μ·align on every branch.

    The trunk sees x at t_1 alone; later branches get later times, t_{i+1} = clip(t_i ± α·U_i, 0, 1), with one sign
    a batch and U_i uniform. With one branch and no alignment this is the ``velocity`` objective.

    Args:
        interpolant: the path; only a straight one has an acceleration loss.
        times: law of t_1.
        label_dropout: see ``Objective``.
        coupling: see ``Objective``.
        branch_weights: β, one a branch; None means 0.2 for each but the last, 1 for the last (the paper's).
        acceleration: λ ≥ 0 (the paper's 1.0).
        align: μ ≥ 0, weight of the alignment to encoder features (the paper's 0.5 with them, 0 without).
        max_gap: α in [0, 1] (the paper's 0.01).

    Raises:
        InputError: a weight or gap out of range, or an acceleration loss on a path that is not straight.
    """

    def __init__(
        self,
        interpolant: Interpolant,
        *,
        times: TimeLawSpec = "uniform",
        label_dropout: float = 0.1,
        coupling: CouplingSpec | None = None,
        branch_weights: Sequence[float] | None = None,
        acceleration: float = 1.0,
        align: float = 0.0,
        max_gap: float = 0.01,
    ) -> None:
        super().__init__(interpolant, times=times, label_dropout=label_dropout, coupling=coupling)
        weights = (acceleration, align, *(branch_weights or ()))
        if not all(0 <= weight < math.inf for weight in weights) or not 0 <= max_gap <= 1:
            raise InputError(
                f"got branch_weights {branch_weights}, acceleration {acceleration}, align {align}, max_gap {max_gap}; "
                "expected weights of 0 or more and a gap in [0, 1]"
            )
        if acceleration and not interpolant.straight:
            raise InputError(
                f"got acceleration {acceleration} on the {type(interpolant).__name__} path: its extrapolation to data "
                "is exact on straight paths only; set acceleration=0 or use the linear path"
            )
        self.branch_weights = None if branch_weights is None else tuple(branch_weights)
        self.max_gap = max_gap
        self.weights = {"deep": 1.0, "acceleration": acceleration, "align": align}

    def loss(
        self,
        backbone: nn.Module,
        data: Tensor,
        noise: Tensor,
        draws: BoundDraws,
        features: tuple[Tensor, ...],
        conditions: Mapping[str, Any],
    ) -> Loss:
        """Evaluate the loss: one network call, every branch speaking."""
        if bool(features) != bool(self.weights["align"]):
            raise InputError(
                f"got {len(features)} encoder features with align {self.weights['align']}; give both or neither"
            )
        times = tuple(send(t, data.device) for t in self.draw_times(draws, _branch_count(backbone)))
        x = self.interpolant.interpolate(data, noise, times[0])
        out: Branches = backbone(x, times[0], branch_times=times[1:], **conditions)
        if any(out.features) and not features:  # data parallelism cannot wait for gradients that never come
            raise InputError("got a backbone with projectors but no encoder features; build it without align_dims")
        terms, errors = self._terms(out, data, noise, times, features)
        details = {f"velocity_{i}": error for i, error in enumerate(errors[:-1], start=1)}
        return self.combine(terms, {"velocity": errors[-1], **details}, times[0])

    def draw_times(self, draws: BoundDraws, branches: int) -> tuple[Tensor, ...]:
        """Draw the times of all branches, each (N,): t_1 by the law, the rest by gaps of one sign a batch."""
        t = self.times.sample(draws)
        if branches == 1:
            return (t,)
        gaps = [self.max_gap * draws.uniform(f"time gap {i}") for i in range(1, branches)]
        return later_times(t, gaps, up=draws.shared_uniform("time gap sign") < 0.5)

    def terms(
        self,
        out: Branches,
        data: Tensor,
        noise: Tensor,
        times: Sequence[Tensor],
        features: Sequence[Tensor] = (),
    ) -> dict[str, Tensor]:
        """Evaluate the terms on what a backbone said.

        Args:
            out: the branches' outputs for x at ``times[0]``.
            data: clean samples, (N, *S).
            noise: (N, *S).
            times: k times, (N,) each.
            features: encoder tokens, one (N, T, dim) tensor an entry of the backbone's ``align_dims``.

        Returns:
            ``deep`` (β applied), ``acceleration`` (two branches or more, straight path) and ``align`` (with features),
            each (N,) and before λ and μ.

        Raises:
            InputError: numbers of branches, times, weights or features that do not fit one another.
        """
        return self._terms(out, data, noise, times, features)[0]

    def _terms(
        self, out: Branches, data: Tensor, noise: Tensor, times: Sequence[Tensor], features: Sequence[Tensor]
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        weights = self._branch_weights(len(out.velocities), len(times))
        target = self.interpolant.velocity(data, noise, times[0])
        errors = [squared_error(velocity, target) for velocity in out.velocities]
        terms = {"deep": torch.stack([weight * error for weight, error in zip(weights, errors, strict=True)]).sum(0)}
        if out.accelerations and self.interpolant.straight:
            terms["acceleration"] = self._acceleration(out, data, noise, times)
        if features:
            terms["align"] = self._align(out, features)
        return terms, errors

    def _branch_weights(self, branches: int, times: int) -> tuple[float, ...]:
        weights = self.branch_weights or (*(0.2,) * (branches - 1), 1.0)
        if not len(weights) == branches == times:
            raise InputError(
                f"got {branches} branches, {times} times and {len(weights)} branch weights, expected equal numbers"
            )
        return weights

    def _acceleration(self, out: Branches, data: Tensor, noise: Tensor, times: Sequence[Tensor]) -> Tensor:
        """Σ_i ‖x_{t_i} + sg(v_i)·d + ½·a_i·d² − data‖² with d = −t_i: the step to data, (N,)."""
        losses = []
        for t, velocity, acceleration in zip(times, out.velocities, out.accelerations, strict=False):
            x = self.interpolant.interpolate(data, noise, t)
            d = -broadcast(t.to(x), x)
            reached = x + velocity.detach() * d + 0.5 * acceleration * d.square()
            losses.append(squared_error(reached, data))
        return torch.stack(losses).sum(0)

    def _align(self, out: Branches, features: Sequence[Tensor]) -> Tensor:
        """Minus the cosine between projected and encoder tokens, mean over tokens, encoders and VeRA blocks, (N,)."""
        if not out.features:
            raise InputError("got encoder features for a backbone of one branch, which aligns nothing; set align=0")
        return torch.stack([negative_cosine(projected, features) for projected in out.features]).mean(0)


def _branch_count(backbone: nn.Module) -> int:
    cuts = getattr(backbone, "cuts", getattr(getattr(backbone, "module", None), "cuts", None))
    if cuts is None:
        raise InputError(
            f"got a {type(backbone).__name__} without branches, expected a DeepFlow backbone; use objective 'velocity'"
        )
    return len(cuts) + 1
