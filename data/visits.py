"""What chance decides at a visit of training, the same for all data sets: mirroring, and the draw from a posterior.

N samples of a visit; S the shape of one.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pathline.core.draws import BoundDraws

__all__ = ["FLIPS", "NOISE", "flips", "posterior_noise"]

# names of what was drawn, among what is loaded; that of the noise is its stream's too
FLIPS, NOISE = "flipped", "posterior noise"
_FLIP = "flip"  # the other stream


def flips(draws: BoundDraws) -> Tensor:
    """Return which samples are mirrored, (N,) of type bool, each with probability 1/2."""
    return draws.uniform(_FLIP) < 0.5


def posterior_noise(draws: BoundDraws, shape: Sequence[int]) -> Tensor:
    """Return what multiplies a posterior's standard deviation: standard normal, (N, *S)."""
    return draws.normal(NOISE, tuple(shape))
