"""Alignment to an encoder: the velocity objective beside agreement with an image encoder's tokens.

N samples; T tokens; S the shape of one sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pathline.core.checks import check_finite
from pathline.core.errors import InputError
from pathline.interpolants.base import Interpolant
from pathline.interpolants.couplings import CouplingSpec
from pathline.objectives.base import registry
from pathline.objectives.times import TimeLawSpec
from pathline.objectives.velocity import Velocity
from pathline.objectives.weightings import WeightingSpec

__all__ = ["Alignment", "negative_cosine"]


@registry.register("alignment", aliases=("repa",))
class Alignment(Velocity):
    """‖v − dx_t/dt‖² − align·cos(projected tokens, encoder tokens), as REPA (arXiv:2410.06940).

    The cosine is averaged over tokens and encoders. The backbone names the encoders' widths in ``align_dims`` and
    returns ``(velocity, features)`` when called with ``with_features=True``: ``sit`` built with ``align_layer`` does.
    The first tensor of ``features=`` goes with the first projector, and so on; frozen encoders that give such tensors
    are in ``pathline.encoders``, and a configuration's section ``encoders`` has training compute them.

    Args:
        interpolant: see ``Regression``, as all options but the last.
        times: law of the training times.
        label_dropout: see ``Objective``.
        coupling: see ``Objective``.
        loss: of the velocity, ``mse`` or ``huber``.
        delta: of the Huber loss.
        cosine: weight of the velocity's direction; not that of the alignment.
        weighting: weight of the velocity's loss along the path.
        wanted_times: a second law; its importance weighs the alignment as well.
        interval: (low, high) in t.
        align: weight of the alignment, above 0; the paper's 0.5.

    Raises:
        InputError: as ``Regression``, or an ``align`` that is not above 0 and finite.
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
        align: float = 0.5,
    ) -> None:
        super().__init__(
            interpolant,
            times=times,
            label_dropout=label_dropout,
            coupling=coupling,
            loss=loss,
            delta=delta,
            cosine=cosine,
            weighting=weighting,
            wanted_times=wanted_times,
            interval=interval,
        )
        if not 0 < align < math.inf:
            raise InputError(
                f"got align {align}, expected a finite weight above 0; without alignment use the objective 'velocity'"
            )
        self.weights = {**self.weights, "align": align}

    def check_features(self, features: tuple[Tensor, ...], backbone: nn.Module, count: int) -> None:
        """Check what can be known before the network is called: how many encoders, their samples and widths."""
        _check_features(features, _align_dims(backbone), count)

    def predict(
        self,
        backbone: nn.Module,
        x: Tensor,
        t: Tensor,
        features: tuple[Tensor, ...],
        conditions: Mapping[str, Any],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Call the network once; return its velocity and the alignment's term."""
        velocity, projected = backbone(x, t, with_features=True, **conditions)
        return velocity, {"align": negative_cosine(projected, features)}


def negative_cosine(projected: Sequence[Tensor], encoded: Sequence[Tensor]) -> Tensor:
    """Return minus the cosine between tokens, mean over tokens and encoders, (N,), in float32 or wider.

    Args:
        projected: the network's tokens, one (N, T, dim) tensor an encoder; dim may differ between encoders.
        encoded: the encoders' tokens, in the same order.

    Raises:
        InputError: numbers of tensors or shapes that differ.
    """
    if len(projected) != len(encoded):
        raise InputError(
            f"got features of {len(encoded)} encoders for a backbone with {len(projected)} projectors; "
            "set align_dims to the encoders' widths"
        )
    losses = []
    for ours, theirs in zip(projected, encoded, strict=True):
        if ours.shape != theirs.shape:
            raise InputError(
                f"got encoder features of shape {tuple(theirs.shape)}, expected {tuple(ours.shape)} (N, T, dim); "
                "for another token grid call encoders.on_grid"
            )
        precision = torch.promote_types(ours.dtype, torch.float32)
        losses.append(
            -functional.cosine_similarity(ours.to(precision), theirs.to(ours.device, precision), dim=-1).mean(1)
        )
    return torch.stack(losses).mean(0)


def _align_dims(backbone: nn.Module) -> tuple[int, ...]:
    """Return the widths that a backbone projects to, through a data-parallel wrapper if there is one."""
    dims = getattr(backbone, "align_dims", getattr(getattr(backbone, "module", None), "align_dims", None))
    if not dims:
        raise InputError(
            f"got a {type(backbone).__name__} without projectors, expected a backbone to align; "
            "build 'sit' with align_layer and align_dims, or use the objective 'velocity'"
        )
    return tuple(dims)


def _check_features(features: Sequence[Tensor], dims: Sequence[int], count: int) -> None:
    """Check what can be known before the network is called: how many encoders, their samples and widths."""
    if len(features) != len(dims):
        raise InputError(
            f"got features of {len(features)} encoders for a backbone with {len(dims)} projectors; pass "
            "features=(…), one (N, T, dim) tensor an entry of align_dims"
        )
    for number, (tokens, dim) in enumerate(zip(features, dims, strict=True)):
        if tokens.ndim != 3 or tokens.shape[0] != count or tokens.shape[2] != dim or not tokens.is_floating_point():
            raise InputError(
                f"got features {tokens.dtype} {tuple(tokens.shape)} of encoder {number}, expected floats "
                f"({count}, T, {dim}); align_dims gives the widths in the encoders' order"
            )
        if tokens.device.type == "cpu":
            check_finite(tokens, f"the features of encoder {number}")
