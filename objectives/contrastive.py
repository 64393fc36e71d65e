"""Contrastive flow matching: velocities of different samples are pushed apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pathline.core.draws import BoundDraws, send
from pathline.core.errors import InputError
from pathline.interpolants.base import Interpolant
from pathline.interpolants.couplings import CouplingSpec
from pathline.objectives.base import Loss, Objective, backbone_attribute, registry, squared_error
from pathline.objectives.times import TimeLawSpec

__all__ = ["Contrastive"]


@registry.register("contrastive")
class Contrastive(Objective):
    """‖v − u‖² − strength·‖v − ũ‖², ũ the velocity of another pair at this sample's time (arXiv:2506.05350).

    The other pair is the next in the batch; samples whose label was dropped have no contrastive part. The batch's
    statistics leak into v: the minimum is (E[u|x] − strength·E[ũ])/(1 − strength), not the flow's velocity.

    Args:
        interpolant: a path without latent noise.
        times: law of the training times.
        label_dropout: see ``Objective``.
        coupling: see ``Objective``.
        strength: λ in [0, 1); the paper's 0.05.

    Raises:
        InputError: a strength out of range, a path with latent noise, or a batch of one.
    """

    def __init__(
        self,
        interpolant: Interpolant,
        *,
        times: TimeLawSpec = "uniform",
        label_dropout: float = 0.1,
        coupling: CouplingSpec | None = None,
        strength: float = 0.05,
    ) -> None:
        super().__init__(interpolant, times=times, label_dropout=label_dropout, coupling=coupling)
        if not 0 <= strength < 1:
            raise InputError(f"got strength {strength}, expected a number in [0, 1): from 1 on there is no minimum")
        if interpolant.latent_noise:
            raise InputError("got a path with latent noise, on which the contrastive objective is not defined")
        self.interval = interpolant.training_interval("velocity")
        self.weights = {"velocity": 1.0, "contrast": -strength}

    @property
    def mixes_samples(self) -> bool:
        """Always: a sample's loss depends on the next one."""
        return True

    def loss(
        self,
        backbone: nn.Module,
        data: Tensor,
        noise: Tensor,
        draws: BoundDraws,
        features: tuple[Tensor, ...],
        conditions: Mapping[str, Any],
    ) -> Loss:
        """Evaluate the loss: one network call."""
        if features:
            raise InputError("got encoder features, which the contrastive objective does not use; leave them out")
        if len(data) < 2:
            raise InputError("got a batch of one, which has no other sample to contrast with; use 2 or more")
        low, high = self.interval
        t = send(low + (high - low) * self.times.sample(draws), data.device)
        velocity = backbone(self.interpolant.interpolate(data, noise, t), t, **conditions)
        error = squared_error(velocity, self.interpolant.velocity(data, noise, t))
        other = self.interpolant.velocity(data.roll(-1, 0), noise.roll(-1, 0), t)
        contrast = squared_error(velocity, other) * self._kept(backbone, conditions, error)
        return self.combine({"velocity": error, "contrast": contrast}, {"velocity": error}, t)

    def _kept(self, backbone: nn.Module, conditions: Mapping[str, Any], error: Tensor) -> Tensor:
        """Return 0 for samples whose label is the null label, 1 for others, (N,)."""
        null, label = backbone_attribute(backbone, "null_label"), conditions.get("label")
        return torch.ones_like(error) if null is None or label is None else (label != null).to(error)
