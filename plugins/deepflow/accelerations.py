"""The acceleration loss A_i of a branch: the paper's (arXiv:2503.14494, 3.3), and its variants.

N samples, S the shape of one sample.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from pathline.core.errors import InputError
from pathline.interpolants.base import Interpolant, broadcast
from pathline.objectives.base import squared_error

__all__ = ["AccelerationLoss", "AccelerationTarget"]

AccelerationTarget = Literal["data", "path"]


class AccelerationLoss:
    """‖x_t + v·d + ½·a·d² − data‖² with d = −t, the step to data; or the error of the path's second derivative.

    Args:
        interpolant: the path.
        weight: of the loss, λ; with 0 the options below have no effect, and none may be given.
        target: ``data``, as above, on straight paths alone; or ``path``, ‖a − d²x_t/dt²‖², on others.
        stop_velocity: whether no gradient flows into v.
        by_branch: weigh A_i by β_i.
        by_clock: weigh by 1/t².

    Attributes:
        given: names of the options that are not at their defaults.
        exists: whether the path has such a loss.

    Raises:
        InputError: options without effect, or a path without such a loss.
    """

    def __init__(
        self,
        interpolant: Interpolant,
        weight: float,
        *,
        target: AccelerationTarget,
        stop_velocity: bool,
        by_branch: bool,
        by_clock: bool,
    ) -> None:
        if target not in get_args(AccelerationTarget):
            raise InputError(f"got acceleration_target {target!r}, expected 'data' or 'path'")
        unused = ["stop_velocity"] * (not stop_velocity) + ["acceleration_by_clock"] * by_clock
        if target == "path" and weight and unused:
            raise InputError(
                f"got {' and '.join(unused)} with acceleration_target 'path', whose loss has neither velocity nor step"
            )
        self.given = unused + ["acceleration_by_branch"] * by_branch + ["acceleration_target"] * (target == "path")
        if not weight and self.given:
            raise InputError(f"got {' and '.join(self.given)} with acceleration 0, which trains none; leave it out")
        if weight:
            _check_path(interpolant, weight, target)
        self.interpolant, self.target = interpolant, target
        self.stop_velocity, self.by_branch, self.by_clock = stop_velocity, by_branch, by_clock
        self.exists = target == "path" or interpolant.straight

    def __call__(self, velocity: Tensor, acceleration: Tensor, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the loss of a branch, (N,).

        Args:
            velocity: v, (N, *S).
            acceleration: a, (N, *S).
            data: (N, *S).
            noise: (N, *S).
            t: time of the branch, (N,).
        """
        if self.target == "path":
            return squared_error(acceleration, self.interpolant.acceleration(data, noise, t))
        v = velocity.detach() if self.stop_velocity else velocity
        x = self.interpolant.interpolate(data, noise, t)
        d = -broadcast(t.to(x), x)
        if self.by_clock:  # the path is straight, data = x + d·V, so that the error below is divided by d
            return squared_error(v + 0.5 * acceleration * d, self.interpolant.velocity(data, noise, t))
        return squared_error(x + v * d + 0.5 * acceleration * d.square(), data)


def _check_path(path: Interpolant, weight: float, target: AccelerationTarget) -> None:
    name = type(path).__name__
    if target == "data" and not path.straight:
        raise InputError(
            f"got acceleration {weight} on the {name} path: its extrapolation to data is exact on straight paths only; "
            "set acceleration=0, use the linear path, or acceleration_target='path'"
        )
    if target == "path" and path.straight:
        raise InputError(
            f"got acceleration_target 'path' on the {name} path, which is straight: its second derivative is 0 for "
            "all data; leave it out, or use another path"
        )
    if target == "path" and path.acceleration_ends():
        raise InputError(
            f"got acceleration_target 'path' on the {name} path, whose second derivative is infinite at "
            f"t = {path.acceleration_ends()[0]:g}, so that the loss has no finite mean; set acceleration=0, or use "
            "another path"
        )
