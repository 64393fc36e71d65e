"""Flow matching: regress the path's velocity."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from pathline.core.draws import BoundDraws
from pathline.core.errors import InputError
from pathline.objectives.base import Loss, Objective, registry, squared_error

__all__ = ["Velocity"]


@registry.register("velocity", aliases=("flow-matching",))
class Velocity(Objective):
    """Mean squared error of the velocity, ‖v(x_t, t) − dx_t/dt‖² (arXiv:2210.02747, Eq. 9)."""

    weights = MappingProxyType({"velocity": 1.0})

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
        if features:
            raise InputError("got encoder features, which the velocity objective does not use; leave them out")
        t = self.times.sample(draws).to(data.device)
        prediction = backbone(self.interpolant.interpolate(data, noise, t), t, **conditions)
        error = squared_error(prediction, self.interpolant.velocity(data, noise, t))
        return self.combine({"velocity": error}, {"velocity": error})
