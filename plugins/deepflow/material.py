"""Material acceleration: how a velocity field changes along its own flow, D v/Dt = ∂v/∂t + (v·∇)v.

It is the second derivative of a sample's course x(t), dx/dt = v(x, t), and what a step of second order needs.

N samples, S the shape of one sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.func import jvp

from pathline.backbones.layers import math_attention
from pathline.core.errors import InputError
from pathline.interpolants.base import broadcast

__all__ = ["METHODS", "MaterialMethod", "check_material", "material_acceleration"]

MaterialMethod = Literal["jvp", "central-difference", "branch-times"]
METHODS: tuple[MaterialMethod, ...] = get_args(MaterialMethod)

_STEP = 5e-3  # for a network in float32; tf32, bf16 and fp16 round v by more than it changes over such a step
_LEAST_GAP = 1e-3  # below it float32 rounding of v would outweigh what a difference tells


@torch.no_grad()
def material_acceleration(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    t: Tensor,
    *,
    method: MaterialMethod = "jvp",
    gap: Tensor | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
    step: float = _STEP,
) -> Tensor:
    """Return the derivative of v along (v, 1) at (x, t), (N, *S), without gradients.

    Args:
        velocity: v(x, t), called twice, three times by ``central-difference``; computed in float32 or wider unless the
            method is ``jvp``, as rounding to tf32, bf16 or fp16 would outweigh the differences.
        x: states, (N, *S).
        t: times, (N,).
        method: ``jvp``, forward-mode differentiation through the plain attention kernel, exact;
            ``central-difference``, from v at two more points of the line (x + δv, t + δ), δ = ±step, or both on one
            side where the interval ends: of second order; ``branch-times``, from v at δ = gap alone: of first order.
        gap: signed lengths of time to differentiate over, (N,); only with ``branch-times``. Those shorter than 1e-3 are
            lengthened, and those that would leave the interval turned round.
        interval: times at which v exists.
        step: δ of ``central-difference``, above 0 and below a quarter of the interval.

    Raises:
        InputError: an unknown method, a gap missing or without effect, or a step out of range.
    """
    if method not in METHODS:
        raise InputError(f"got material_method {method!r}, expected one of {', '.join(METHODS)}")
    if (gap is None) == (method == "branch-times"):
        raise InputError(
            f"got {'no gap' if gap is None else 'a gap'} with {method!r}; give one to 'branch-times' alone"
        )
    if not 0 < step < (interval[1] - interval[0]) / 4:
        raise InputError(f"got step {step}, expected one above 0 and below a quarter of the interval {interval}")
    v = velocity(x, t)
    if method == "jvp":
        with math_attention():
            _, rate, *_ = jvp(velocity, (x, t), (v.to(x), torch.ones_like(t)))
        return torch.as_tensor(rate)

    def along(offset: Tensor) -> Tensor:
        return velocity(x + broadcast(offset, x).to(x) * v, t + offset)

    if gap is not None:
        offset = _inside(gap, t, interval)
        return (along(offset) - v) / broadcast(offset, x)
    first, second = _stencil(t, interval, step)
    a, b = broadcast(first, x), broadcast(second, x)
    # the derivative at 0 of the parabola through (0, v), (a, ·) and (b, ·)
    return (b * (along(first) - v) / a - a * (along(second) - v) / b) / (b - a)


def check_material(material: float, method: MaterialMethod, max_gap: float) -> None:
    """Raise InputError for a method that is unknown, without effect, or without a gap to differentiate over."""
    if method not in METHODS:
        raise InputError(f"got material_method {method!r}, expected one of {', '.join(METHODS)}")
    if not material and method != "jvp":
        raise InputError(f"got material_method {method!r} with material 0, which takes no derivative; leave it out")
    if material and method == "branch-times" and not max_gap:
        raise InputError("got material_method 'branch-times' with max_gap 0, between whose times nothing changes")


def _stencil(t: Tensor, interval: tuple[float, float], step: float) -> tuple[Tensor, Tensor]:
    """Return two offsets a sample, (N,) each: −step and step, or two to one side near an end."""
    low, high = interval
    down, up = t - step < low, t + step > high
    first = torch.where(down, 2.0, torch.where(up, -2.0, -1.0))
    second = torch.where(up, -1.0, 1.0)
    return step * first.to(t), step * second.to(t)


def _inside(gap: Tensor, t: Tensor, interval: tuple[float, float]) -> Tensor:
    """Return gaps of at least 1e-3 that stay in the interval, (N,)."""
    length = gap.abs().clamp(min=_LEAST_GAP)
    offset = torch.where(gap < 0, -length, length)
    reached = t + offset
    return torch.where((reached < interval[0]) | (reached > interval[1]), -offset, offset)
