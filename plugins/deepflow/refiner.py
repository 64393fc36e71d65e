"""What stands between two branches: VeRA, which refines velocity features by a learned acceleration, and its parts.

Source: arXiv:2503.14494, 3.3 and Table 7. N samples, T tokens, D width, F features, W width of the acceleration MLP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from pathline.backbones.layers import Mlp, Modulation, attend, initialize_linear, modulate, norm_without_affine
from pathline.core.errors import InputError

__all__ = [
    "ACCELERATING",
    "AccelerationMlp",
    "CrossSpaceAttention",
    "GapMerge",
    "GapModulation",
    "RefinerName",
    "Residual",
    "VelocityRefiner",
    "check_used",
    "gap_width",
    "hidden_widths",
    "resolve_residual",
]

RefinerName = Literal["vera", "addition", "acceleration", "gap", "none"]
Residual = Literal["normed-query", "query", "velocity"]

ACCELERATING = ("vera", "addition", "acceleration")
"""Refiners that learn an acceleration."""

_CROSSING = ("normed-query", "query", "velocity")
RESIDUALS: dict[str, tuple[str, ...]] = {
    "vera": _CROSSING,
    "addition": _CROSSING,
    "acceleration": ("velocity",),
    "gap": ("velocity",),
    "none": (),
}
"""Refiner -> what its output can be added to; the first of several is its default."""


def hidden_widths(width: int | Sequence[int]) -> tuple[int, ...]:
    """Return the hidden widths of an acceleration MLP: W, 2W, W of a number W, a sequence as it is.

    Raises:
        InputError: none, or one that is not a positive whole number.
    """
    several = tuple(width) if isinstance(width, Sequence) else ()
    widths = (width, 2 * width, width) if type(width) is int else several
    if not widths or not all(type(hidden) is int and hidden >= 1 for hidden in widths):
        raise InputError(f"got acceleration_width {width}, expected positive numbers: W, or all hidden widths")
    return widths


def resolve_residual(refiner: str, residual: str | None) -> str | None:
    """Return what a refiner's output is added to, by default what the authors' program adds it to.

    Raises:
        InputError: an unknown refiner, or a residual that it does not have.
    """
    if refiner not in RESIDUALS:
        raise InputError(f"got refiner {refiner!r}, expected one of {', '.join(RESIDUALS)}")
    fitting = RESIDUALS[refiner]
    if residual is None:
        return fitting[0] if len(fitting) > 1 else None
    if residual not in fitting:
        raise InputError(
            f"got residual {residual!r} for refiner {refiner!r}, expected {' or '.join(('None', *fitting))}"
        )
    return residual


def check_used(
    refiner: str,
    residual: str | None,
    zero_output: bool,
    acceleration_width: int | Sequence[int],
    gap_scale: float,
    clamp_gap: bool,
) -> None:
    """Raise InputError for an option that a refiner does not use."""
    if not isinstance(gap_scale, int | float) or not 0 < gap_scale < math.inf:
        raise InputError(f"got gap_scale {gap_scale}, expected a positive finite number")
    if zero_output and residual is None:
        raise InputError(
            f"got zero_output for refiner {refiner!r} without a residual, which would pass nothing on; "
            "give residual='velocity' with a refiner other than 'none'"
        )
    if acceleration_width != 2048 and refiner not in ACCELERATING:
        raise InputError(
            f"got acceleration_width {acceleration_width} for refiner {refiner!r}, which has no acceleration; "
            f"leave it out, or use one of {', '.join(ACCELERATING)}"
        )
    if refiner == "none" and (clamp_gap or gap_scale != 1):
        raise InputError(
            f"got clamp_gap {clamp_gap} and gap_scale {gap_scale} for refiner 'none', which sees no gap; leave them out"
        )


class AccelerationMlp(nn.Sequential):
    """Velocity features to acceleration features: linear layers from D through the hidden widths to D, SiLU between."""

    def __init__(self, width: int, hidden: Sequence[int]) -> None:
        layers: list[nn.Module] = []
        for entering, leaving in pairwise((width, *hidden, width)):
            layers += [nn.Linear(entering, leaving), nn.SiLU()]
        super().__init__(*layers[:-1])
        self.apply(initialize_linear)


class GapModulation(nn.Module):
    """Normalise features and modulate them by the time gap: (N, T, F) to (N, T, F).

    Args:
        features: F, which is also the width of the gap's embedding.
        clamp: limit the scale to [−5, 5], as the weights released with alignment were trained.
    """

    def __init__(self, features: int, *, clamp: bool = False) -> None:
        super().__init__()
        self.clamp = clamp
        self.norm = norm_without_affine(features)
        self.modulation = Modulation(features, 2)

    def forward(self, features: Tensor, gap: Tensor) -> Tensor:
        """Modulate ``features`` (N, T, F) given the gap embedding (N, F)."""
        shift, scale = self.modulation(gap)
        if self.clamp:
            scale = scale.clamp(-5.0, 5.0)
        return modulate(self.norm(features), shift, scale)


class GapMerge(GapModulation):
    """Modulate features by the time gap and merge them: (N, T, F) to (N, T, D)."""

    def __init__(self, features: int, width: int, *, clamp: bool = False) -> None:
        super().__init__(features, clamp=clamp)
        self.mlp = Mlp(features, features, width)

    def forward(self, features: Tensor, gap: Tensor) -> Tensor:
        """Merge ``features`` (N, T, F) given the gap embedding (N, F)."""
        merged: Tensor = self.mlp(super().forward(features, gap))
        return merged


class CrossSpaceAttention(nn.Module):
    """Let the image tokens attend to refined features; one affine norm serves both sides, and nothing forms a map.

    Args:
        width: D.
        num_heads: attention heads.
        residual: what the attention is added to: the normed query (the authors' program), the image tokens that it is
            made from, or the velocity features of the branch that ends.
    """

    def __init__(self, width: int, num_heads: int, residual: str = "normed-query") -> None:
        super().__init__()
        self.num_heads, self.residual = num_heads, residual
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.apply(initialize_linear)

    def forward(self, space: Tensor, features: Tensor, velocity: Tensor) -> Tensor:
        """Attend from ``space`` (N, T, D) to ``features`` (N, T, D); ``velocity`` is (N, T, D) as well."""
        query, refined = self.norm(space), self.norm(features)
        width = query.shape[-1]
        weight, bias = self.query_key_value.weight, self.query_key_value.bias
        key, value = functional.linear(refined, weight[width:], bias[width:]).chunk(2, dim=-1)
        attended = attend(functional.linear(query, weight[:width], bias[:width]), key, value, self.num_heads)
        kept = {"normed-query": query, "query": space, "velocity": velocity}[self.residual]
        summed: Tensor = kept + self.output(attended)
        return summed


class VelocityRefiner(nn.Module):
    """One block between two branches: acceleration features, and refined features for the next branch.

    With h the features of the branch that ends, a* = ACC_MLP(h) and g the gap's embedding:

    - ``vera``: the whole block; a gap-modulated MLP merges [h, a*], and the image tokens attend to what comes out.
    - ``addition``: as vera, but m = h + gap-modulated a* in place of the MLP.
    - ``acceleration``: the gap-modulated MLP on [h, a*] alone.
    - ``gap``: the gap-modulated MLP on h alone, without an acceleration.

    Args:
        width: D.
        num_heads: heads of the cross-space attention, those of the trunk.
        acceleration_widths: hidden widths of the acceleration MLP.
        refiner: which of the above.
        residual: what the output is added to; see ``resolve_residual``.
        clamp_gap: limit the gap's scale to [−5, 5].
        zero_output: let the last layer be zero at first.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        acceleration_widths: Sequence[int],
        *,
        refiner: RefinerName = "vera",
        residual: str | None = "normed-query",
        clamp_gap: bool = False,
        zero_output: bool = False,
    ) -> None:
        super().__init__()
        self.acceleration = AccelerationMlp(width, acceleration_widths) if refiner in ACCELERATING else None
        self.adds = refiner == "addition"
        features = gap_width(refiner, width)
        self.gap_modulation = (
            GapModulation(features, clamp=clamp_gap) if self.adds else GapMerge(features, width, clamp=clamp_gap)
        )
        crosses = refiner in ("vera", "addition")
        self.cross_space = CrossSpaceAttention(width, num_heads, residual or "normed-query") if crosses else None
        self.skips = not crosses and residual is not None
        if zero_output:
            last = cast("GapMerge", self.gap_modulation).mlp if self.cross_space is None else self.cross_space
            nn.init.zeros_(last.output.weight)

    def forward(
        self, velocity: Tensor, space: Tensor | None = None, gap: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return acceleration features and refined tokens, both (N, T, D); None for what there is not.

        Args:
            velocity: tokens of the branch that ends here, (N, T, D).
            space: the embedded image, (N, T, D).
            gap: embedding of the time gap to the next branch, (N, F); None asks for the acceleration alone.
        """
        acceleration = None if self.acceleration is None else self.acceleration(velocity)
        if gap is None:
            return acceleration, None
        if self.adds:
            merged = velocity + self.gap_modulation(acceleration, gap)
        else:
            both = velocity if acceleration is None else torch.cat((velocity, acceleration), dim=-1)
            merged = self.gap_modulation(both, gap)
        if self.cross_space is not None:
            return acceleration, self.cross_space(space, merged, velocity)
        return acceleration, velocity + merged if self.skips else merged


def gap_width(refiner: str, width: int) -> int:
    """Return F, the width of what the gap modulates: 2D for [h, a*], else D."""
    return 2 * width if refiner in ("vera", "acceleration") else width
