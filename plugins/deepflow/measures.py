"""Metrics of a branched backbone: what each branch's velocity and acceleration are worth, by time.

All look at the backbone alone, at one time for all branches; guidance around it changes nothing.

N samples; S the shape of one; k branches; v_i the velocity of branch i, a_i its acceleration.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from pathline.core.errors import InputError
from pathline.core.flow import BaseFlow
from pathline.interpolants.base import broadcast
from pathline.metrics.loss_by_time import ByTime, Point, mean_square
from pathline.metrics.models import register
from pathline.plugins.deepflow.branches import Branches, Spoken
from pathline.plugins.deepflow.material import material_acceleration

__all__ = ["AccelerationError", "BranchCosine", "BranchLosses", "ExtrapolationError"]


class _OfBranches(ByTime):
    """A metric over bins of t of a backbone with two branches or more."""

    def check(self, flow: BaseFlow) -> None:
        """Refuse backbones without branches, and flows whose branches give no velocity."""
        super().check(flow)
        if getattr(flow.backbone, "branch_count", 1) < 2:
            raise InputError(
                f"got a {type(flow.backbone).__name__} of one branch, expected a DeepFlow backbone of two or more; "
                "'feature-distance' and 'loss-by-time' measure any"
            )
        if flow.predicts != "velocity":
            raise InputError(f"got a flow that predicts {flow.predicts}, expected velocities, which branches give")


class _OfAccelerations(_OfBranches):
    """The same of a backbone whose branches have accelerations."""

    def check(self, flow: BaseFlow) -> None:
        """Refuse backbones without accelerations as well."""
        super().check(flow)
        if not getattr(flow.backbone, "has_acceleration", False):
            raise InputError(
                "got a backbone whose refiner has no acceleration, expected the refiner 'vera', 'addition' or "
                "'acceleration'"
            )


@register("branch-losses")
class BranchLosses(_OfBranches):
    """‖v_i − V‖² of every branch i by t, V the path's velocity; the last branch is the model.

    Args:
        bins: see ``ByTime``.
    """

    title = "velocity error of every branch"

    def __init__(self, *, bins: int = 20) -> None:
        super().__init__(bins=bins)
        self.metric = f"branch-losses, {bins} bins"
        self.about = "squared error of every branch's velocity, mean over a sample's values"
        self.unit = "mean squared error"

    def errors(self, flow: BaseFlow, point: Point) -> dict[str, Tensor]:
        """Let all branches speak, in one network call."""
        target = flow.interpolant.velocity(point.data, point.noise, point.t)
        said = _speak(flow, point, range(1, _count(flow) + 1)).velocities
        return {f"branch {i}": mean_square(velocity.to(target) - target) for i, velocity in enumerate(said, start=1)}


@register("branch-cosine")
class BranchCosine(_OfBranches):
    """cos(v_i, v_k) of every earlier branch's velocity with the last one's by t, over all of a sample's values.

    Args:
        bins: see ``ByTime``.
    """

    title = "cosine of every branch's velocity with the last one's"

    def __init__(self, *, bins: int = 20) -> None:
        super().__init__(bins=bins)
        self.metric = f"branch-cosine, {bins} bins"
        self.about = "cosine of every earlier branch's velocity with the last one's"
        self.unit = "cosine, in [-1, 1]"

    def errors(self, flow: BaseFlow, point: Point) -> dict[str, Tensor]:
        """Let all branches speak, in one network call."""
        *earlier, last = (v.to(point.x).flatten(1) for v in _speak(flow, point, range(1, _count(flow) + 1)).velocities)
        return {f"branch {i}": functional.cosine_similarity(v, last) for i, v in enumerate(earlier, start=1)}


@register("extrapolation-error")
class ExtrapolationError(_OfAccelerations):
    """Error of data reached from x_t in one step of d = −t: x_t + v_i·d and x_t + v_i·d + ½·a_i·d², i < k.

    What the paper's acceleration loss makes small (arXiv:2503.14494, 3.2). An acceleration is worth something where the
    second order lies below the first.

    Args:
        bins: see ``ByTime``.
    """

    title = "error of the extrapolation to data"

    def __init__(self, *, bins: int = 20) -> None:
        super().__init__(bins=bins)
        self.metric = f"extrapolation-error, {bins} bins"
        self.about = "squared error of data extrapolated from every branch, without and with its acceleration"
        self.unit = "mean squared error of data"

    def check(self, flow: BaseFlow) -> None:
        """Refuse curved paths too: on them no step along the true velocity ends at data."""
        super().check(flow)
        if not flow.interpolant.straight:
            raise InputError(
                f"got the {type(flow.interpolant).__name__} path, expected a straight one as 'linear': on others a "
                "step along the velocity does not end at data"
            )

    def errors(self, flow: BaseFlow, point: Point) -> dict[str, Tensor]:
        """Take both steps from every branch but the last."""
        numbers = range(1, _count(flow))
        said = _speak(flow, point, numbers, numbers)
        d, rows = -broadcast(point.t, point.x), {}
        for i, v, a in zip(numbers, said.velocities, said.accelerations, strict=True):
            first = point.x + v.to(point.x) * d
            rows[f"branch {i}, first order"] = mean_square(first - point.data)
            rows[f"branch {i}, second order"] = mean_square(first + 0.5 * a.to(point.x) * d.square() - point.data)
        return rows


@register("acceleration-error")
class AccelerationError(_OfAccelerations):
    """‖a_i − D v_k/Dt‖² by t: the learned accelerations against the material one, along the model's own flow.

    Row ``zero`` is ‖D v_k/Dt‖², the error of no acceleration at all. D v/Dt = ∂v/∂t + (v·∇)v by central differences.

    Args:
        bins: see ``ByTime``.
    """

    title = "learned acceleration against the material one"

    def __init__(self, *, bins: int = 20) -> None:
        super().__init__(bins=bins)
        self.metric = f"acceleration-error, {bins} bins"
        self.about = "squared error of every branch's acceleration as the rate of the last velocity along the flow"
        self.unit = "mean squared acceleration"

    def errors(self, flow: BaseFlow, point: Point) -> dict[str, Tensor]:
        """Let the accelerations speak, and take three more network calls for the material one."""
        numbers = range(1, _count(flow))
        said = _speak(flow, point, (), numbers).accelerations

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            moved = Point(x, t, point.data, point.noise, point.conditions)
            return _speak(flow, moved, (_count(flow),)).velocities[0].to(x)

        material = material_acceleration(
            velocity, point.x, point.t, method="central-difference", interval=self.interval(flow)
        )
        rows = {f"branch {i}": mean_square(a.to(material) - material) for i, a in zip(numbers, said, strict=True)}
        return {"zero": mean_square(material), **rows}


def _count(flow: BaseFlow) -> int:
    count: int = flow.backbone.branch_count  # type: ignore[assignment]  # checked before
    return count


def _speak(flow: BaseFlow, point: Point, velocities: Sequence[int], accelerations: Sequence[int] = ()) -> Branches:
    """Ask branches, in the network's own precision."""
    precision = next((p.dtype for p in flow.backbone.parameters() if p.is_floating_point()), point.x.dtype)
    asked = Spoken(tuple(velocities), tuple(accelerations))
    said: Branches = flow.backbone(point.x.to(precision), point.t, spoken=asked, **{**flow.bound, **point.conditions})
    return said
