"""DeepFlow's objective: deep supervision, acceleration losses, alignment (arXiv:2503.14494, 3.2 to 3.4).

N samples, S the shape of one sample, k branches, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pathline.core.draws import BoundDraws, send
from pathline.core.errors import InputError
from pathline.interpolants.base import Interpolant
from pathline.interpolants.couplings import CouplingSpec
from pathline.objectives.alignment import negative_cosine
from pathline.objectives.base import Loss, Objective, backbone_attribute, registry, squared_error
from pathline.objectives.times import TimeLawSpec
from pathline.plugins.deepflow.accelerations import AccelerationLoss, AccelerationTarget
from pathline.plugins.deepflow.backbone import Branches
from pathline.plugins.deepflow.material import MaterialMethod, check_material, material_acceleration

__all__ = ["DeepFlowObjective", "later_times"]

GapSign = Literal["batch", "sample", "down", "up"]
_MAX_GAP = 0.01


def later_times(
    t: Tensor, gaps: Sequence[Tensor], *, up: bool | Tensor, interval: tuple[float, float] = (0.0, 1.0)
) -> tuple[Tensor, ...]:
    """Return the times of all branches: t_{i+1} = clip(t_i ± gap_i), each (N,).

    Args:
        t: time of the first branch, (N,).
        gaps: k − 1 non-negative gaps, (N,) each.
        up: whether later branches lie towards noise; one answer, or one a sample, (N,).
        interval: (low, high), what times are clipped to.
    """
    times, upwards = [t], torch.as_tensor(up, device=t.device)
    for gap in gaps:
        times.append((times[-1] + torch.where(upwards, gap, -gap)).clamp(*interval))
    return tuple(times)


@registry.register("deepflow")
class DeepFlowObjective(Objective):
    """Σ_i β_i·‖v_i − V‖² + λ·Σ_i A_i + material·Σ_i M_i + μ·align on every branch; A_i and M_i for all but the last.

    The trunk sees x at t_1 alone; later branches get later times, t_{i+1} = clip(t_i ± α·U_i), U_i uniform. V is the
    path's velocity. A_i is the paper's ‖x_{t_i} − t_i·v_i + ½·t_i²·a_i − data‖² unless said otherwise, M_i is
    ‖a_i − D v_k/Dt‖², the material acceleration of the last branch at (x, t_1), all branches there, without gradients.
    With one branch and no alignment this is the ``velocity`` objective.

    On a straight path the expectation of A_i is least at a_i = 0 (for v_i = E[V | x]); that of M_i is at what a step of
    second order needs.

    Args:
        interpolant: the path; without latent noise.
        times: law of t_1, mapped into the path's ``training_interval``, in which all times are kept.
        label_dropout: see ``Objective``.
        coupling: see ``Objective``.
        branch_weights: β, one a branch; None means 0.2 for each but the last, 1 for the last (the paper's).
        acceleration: λ ≥ 0 (the paper's 1.0).
        align: μ ≥ 0, weight of the alignment to encoder features (the paper's 0.5 with them, 0 without).
        max_gap: α in [0, 1] (the paper's 0.01).
        gap_sign: one coin for the whole batch (the authors' program), one a ``sample``, or always ``down``, towards
            data, or ``up``; without effect where max_gap is 0.
        acceleration_target: ``data``, A_i as above, on straight paths alone; or ``path``, A_i = ‖a_i − d²x_t/dt²‖² at
            t_i, on paths that are not straight and whose second derivative is finite.
        stop_velocity: whether A_i leaves v_i alone; False lets its gradient flow into v_i as well.
        acceleration_by_branch: weigh A_i by β_i.
        acceleration_by_clock: weigh A_i by 1/t_i²: ‖V − v_i + ½·t_i·a_i‖².
        material: weight ≥ 0 of the material acceleration; λ may be 0 beside it. It takes further network calls.
        material_method: ``jvp``, or in float32 ``central-difference`` or ``branch-times`` (over t_2 − t_1): see
            ``material``.

    Raises:
        InputError: a weight or gap out of range, options without effect, or an acceleration loss that the path does not
            have.
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
        max_gap: float = _MAX_GAP,
        gap_sign: GapSign = "batch",
        acceleration_target: AccelerationTarget = "data",
        stop_velocity: bool = True,
        acceleration_by_branch: bool = False,
        acceleration_by_clock: bool = False,
        material: float = 0.0,
        material_method: MaterialMethod = "jvp",
    ) -> None:
        super().__init__(interpolant, times=times, label_dropout=label_dropout, coupling=coupling)
        _check_numbers(branch_weights, max_gap, {"acceleration": acceleration, "align": align, "material": material})
        if gap_sign not in get_args(GapSign):
            raise InputError(f"got gap_sign {gap_sign!r}, expected one of {', '.join(get_args(GapSign))}")
        if gap_sign != "batch" and not max_gap:
            raise InputError(f"got gap_sign {gap_sign!r} with max_gap 0, which leaves no gap; leave one out")
        if interpolant.latent_noise:
            name = type(interpolant).__name__
            raise InputError(f"got the {name} path, with latent noise, which branches do not know; use one without")
        self.acceleration_loss = AccelerationLoss(
            interpolant,
            acceleration,
            target=acceleration_target,
            stop_velocity=stop_velocity,
            by_branch=acceleration_by_branch,
            by_clock=acceleration_by_clock,
        )
        check_material(material, material_method, max_gap)
        self.branch_weights = None if branch_weights is None else tuple(branch_weights)
        self.max_gap, self.gap_sign = max_gap, gap_sign
        self.material_method = material_method
        self.interval = interpolant.training_interval("velocity")
        self.weights = {"deep": 1.0, "acceleration": acceleration, "material": material, "align": align}
        self.differentiates_all = not material
        self.takes_differences = bool(material) and material_method != "jvp"

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
        branches = _branch_count(backbone)
        self._check_backbone(backbone, branches)
        times = tuple(send(t, data.device) for t in self.draw_times(draws, branches))
        x = self.interpolant.interpolate(data, noise, times[0])
        material = self._material(backbone, x, times, conditions) if self.weights["material"] else None
        out: Branches = backbone(x, times[0], branch_times=times[1:], **conditions)
        if any(out.features) and not features:  # data parallelism cannot wait for gradients that never come
            raise InputError("got a backbone with projectors but no encoder features; build it without align_dims")
        terms, errors = self._terms(out, data, noise, times, features, material)
        details = {f"velocity_{i}": error for i, error in enumerate(errors[:-1], start=1)}
        return self.combine(terms, {"velocity": errors[-1], **details}, times[0])

    def draw_times(self, draws: BoundDraws, branches: int) -> tuple[Tensor, ...]:
        """Draw the times of all branches, each (N,): t_1 by the law, the rest by gaps of the signs asked for."""
        low, high = self.interval
        t = low + (high - low) * self.times.sample(draws)
        if branches == 1:
            return (t,)
        gaps = [self.max_gap * draws.uniform(f"time gap {i}") for i in range(1, branches)]
        return later_times(t, gaps, up=self._upwards(draws), interval=self.interval)

    def _upwards(self, draws: BoundDraws) -> bool | Tensor:
        """Whether gaps lead towards noise: one answer, or one a sample, (N,)."""
        if self.gap_sign == "batch":
            return draws.shared_uniform("time gap sign") < 0.5
        if self.gap_sign == "sample":
            return draws.uniform("time gap sign, each sample") < 0.5
        return self.gap_sign == "up"

    def terms(
        self,
        out: Branches,
        data: Tensor,
        noise: Tensor,
        times: Sequence[Tensor],
        features: Sequence[Tensor] = (),
        material: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Evaluate the terms on what a backbone said.

        Args:
            out: the branches' outputs for x at ``times[0]``.
            data: clean samples, (N, *S).
            noise: (N, *S).
            times: k times, (N,) each.
            features: encoder tokens, one (N, T, dim) tensor an entry of the backbone's ``align_dims``.
            material: D v_k/Dt at (x, t_1), (N, *S).

        Returns:
            ``deep`` (β applied), ``acceleration`` (where branches have one; zeros where no term trains it),
            ``material`` and ``align`` (where given), each (N,) and before λ, the weight of the material acceleration
            and μ.

        Raises:
            InputError: numbers of branches, times, weights or features that do not fit one another.
        """
        return self._terms(out, data, noise, times, features, material)[0]

    def _terms(
        self,
        out: Branches,
        data: Tensor,
        noise: Tensor,
        times: Sequence[Tensor],
        features: Sequence[Tensor],
        material: Tensor | None,
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        weights = self._branch_weights(len(out.velocities), len(times))
        target = self.interpolant.velocity(data, noise, times[0])
        errors = [squared_error(velocity, target) for velocity in out.velocities]
        terms = {"deep": torch.stack([weight * error for weight, error in zip(weights, errors, strict=True)]).sum(0)}
        if out.accelerations and self.acceleration_loss.exists:
            terms["acceleration"] = self._acceleration(out, data, noise, times, weights)
        elif out.accelerations and material is None:  # several devices wait for every gradient, also one of zeros
            terms["acceleration"] = 0.0 * torch.stack([a.float().flatten(1).mean(1) for a in out.accelerations]).sum(0)
        if material is not None:
            terms["material"] = torch.stack([squared_error(a, material) for a in out.accelerations]).sum(0)
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

    def _acceleration(
        self, out: Branches, data: Tensor, noise: Tensor, times: Sequence[Tensor], weights: Sequence[float]
    ) -> Tensor:
        """Σ_i A_i, or Σ_i β_i·A_i, over all branches but the last, (N,)."""
        loss = self.acceleration_loss
        said = zip(weights, times, out.velocities, out.accelerations, strict=False)
        losses = [(weight if loss.by_branch else 1) * loss(v, a, data, noise, t) for weight, t, v, a in said]
        return torch.stack(losses).sum(0)

    def _material(
        self, backbone: nn.Module, x: Tensor, times: Sequence[Tensor], conditions: Mapping[str, Any]
    ) -> Tensor:
        """Return D v_k/Dt at (x, t_1), every branch at one time, as samplers call the network."""

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            value: Tensor = backbone(x, t, **conditions)
            return value

        gap = times[1] - times[0] if self.material_method == "branch-times" else None
        return material_acceleration(
            velocity, x, times[0], method=self.material_method, gap=gap, interval=self.interval
        )

    def _check_backbone(self, backbone: nn.Module, branches: int) -> None:
        """Raise InputError where options have no effect, as accelerations to be trained that the backbone lacks."""
        weight, material = self.weights["acceleration"], self.weights["material"]
        if branches > 1:
            if (weight or material) and backbone_attribute(backbone, "has_acceleration") is False:
                refiner = backbone_attribute(backbone, "refiner")
                raise InputError(
                    f"got acceleration {weight} and material {material} for a backbone of refiner {refiner!r}, whose "
                    "branches say no acceleration; set both to 0, or build it with refiner 'vera'"
                )
            return
        if material:
            raise InputError(f"got material {material} for a backbone of one branch, which has no acceleration; set 0")
        unused = ["gap_sign"] * (self.gap_sign != "batch") + ["max_gap"] * (self.max_gap != _MAX_GAP)
        unused += self.acceleration_loss.given
        if unused:
            raise InputError(f"got {' and '.join(unused)} for a backbone of one branch, without gap and acceleration")

    def _align(self, out: Branches, features: Sequence[Tensor]) -> Tensor:
        """Minus the cosine between projected and encoder tokens, mean over tokens, encoders and VeRA blocks, (N,)."""
        if not out.features:
            raise InputError("got encoder features for a backbone of one branch, which aligns nothing; set align=0")
        return torch.stack([negative_cosine(projected, features) for projected in out.features]).mean(0)


def _check_numbers(branch_weights: Sequence[float] | None, max_gap: float, weights: Mapping[str, float]) -> None:
    listed = (1.0,) if branch_weights is None else branch_weights
    numbers = (*listed, *weights.values(), max_gap) if isinstance(listed, Sequence) and listed else ("none",)
    if not all(isinstance(number, int | float) and 0 <= number < math.inf for number in numbers) or max_gap > 1:
        others = ", ".join(f"{name} {weight!r}" for name, weight in weights.items())
        raise InputError(
            f"got branch_weights {branch_weights!r}, max_gap {max_gap!r}, {others}; expected weights of 0 or more and "
            "a gap in [0, 1]; branch_weights are one a branch, or None"
        )


def _branch_count(backbone: nn.Module) -> int:
    cuts = backbone_attribute(backbone, "cuts")
    if cuts is None:
        raise InputError(
            f"got a {type(backbone).__name__} without branches, expected a DeepFlow backbone; use objective 'velocity'"
        )
    return len(cuts) + 1
