"""What every guidance shares: the options, and the formula on two predictions, of which it follows the stronger.

N samples; S the shape of one sample; t has shape (N,) or ().
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pathline.core.errors import InputError, InputTypeError
from pathline.core.flow import BaseFlow
from pathline.core.registry import Registry
from pathline.interpolants.base import Kind, broadcast, check_kinds

__all__ = ["Guidance", "Interval", "Moment", "PairGuidance", "Past", "Scale", "dot", "finite", "length", "registry"]

Scale = float | Sequence[float] | Tensor
Interval = tuple[float, float]


class Guidance(ABC):
    """Turns a flow into a guided one. Guided flows can be guided again."""

    @abstractmethod
    def __call__(self, flow: BaseFlow) -> BaseFlow:
        """Wrap a flow."""

    def of_samples(self, numbers: range) -> Guidance:
        """Return the guidance of some samples by number, where each has its own; itself where all have the same."""
        del numbers
        return self


registry: Registry[Guidance] = Registry("guidance", "solvers.guidance", Guidance)


class Past:
    """The accumulated differences of one trajectory, by quantity: what momentum remembers."""

    def __init__(self) -> None:
        self._sums: dict[Hashable, Tensor] = {}

    def add(self, key: Hashable, difference: Tensor, momentum: float, active: Tensor | bool) -> Tensor:
        """Return difference + momentum·(the last sum), and remember it for the active rows.

        Rows are known by their place: a flow that is guided twice is called on N rows, or on N and N more behind them.
        """
        rows, last = len(difference), self._sums.get(key)
        if last is None:
            last = torch.zeros_like(difference)
        elif len(last) < rows:
            last = torch.cat((last, torch.zeros_like(difference[len(last) :])))
        total = difference.add(last[:rows], alpha=momentum)
        kept = torch.where(broadcast(active, total), total, last[:rows]) if isinstance(active, Tensor) else total
        self._sums[key] = torch.cat((kept, last[rows:])) if len(last) > rows else kept
        return total


@dataclass(frozen=True)
class Moment:
    """What a formula may know beside its two predictions.

    Attributes:
        t: times, (N,) or ().
        scale: a number, or one a sample, shaped to multiply x.
        active: the samples that are guided, (N,), or True for all.
        past: of the trajectory; None outside of one.
        key: of the quantity at hand in ``past``.
    """

    t: Tensor
    scale: float | Tensor
    active: Tensor | bool
    past: Past | None
    key: Hashable

    def accumulate(self, difference: Tensor, momentum: float) -> Tensor:
        """Return the difference plus ``momentum`` times the accumulated one of the evaluation before."""
        return difference if self.past is None else self.past.add(self.key, difference, momentum, self.active)


class PairGuidance(Guidance):
    """Guidance by a stronger and a weaker prediction; a subclass gives its formula.

    Args:
        scale: w, or one a sample, (N,); 1 is off and calls the conditional model alone.
        interval: (low, high) in t, both ends included: guide while low ≤ t ≤ high, call the conditional model alone
            elsewhere (arXiv:2404.07724).
        rescale: φ in [0, 1]: the share in which a guided prediction is brought back to the standard deviation of the
            stronger one, sample by sample (arXiv:2305.08891, Eqs. 15 and 16); 0 is off.
        channels: guide the first so many channels (axis 1) and leave the others to the conditional model, as programs
            do that guide 3 of 4; None guides all.
        quantity: what the formula acts on: ``velocity``, ``score``, ``noise`` or ``data``; the guided prediction is
            then one of that. None: what the network predicts.

    Raises:
        InputError: a scale that is not finite, an interval outside [0, 1], a rescale outside [0, 1], or channels < 1.
        InputTypeError: an option of a wrong type.
        UnknownNameError: an unknown quantity.
    """

    def __init__(
        self,
        scale: Scale,
        *,
        interval: Interval = (0.0, 1.0),
        rescale: float = 0.0,
        channels: int | None = None,
        quantity: Kind | None = None,
    ) -> None:
        self._set_scale(_checked_scale(scale))
        self.interval = _checked_interval(interval)
        self.rescale, self.channels, self.quantity = finite("rescale", rescale), channels, quantity
        if not 0 <= self.rescale <= 1:
            raise InputError(f"got rescale {rescale}, expected a share in [0, 1]; 0 is off")
        if channels is not None and (isinstance(channels, bool) or not isinstance(channels, int) or channels < 1):
            raise InputError(f"got channels {channels!r}, expected a whole number of 1 or more, or None for all")
        if quantity is not None:
            check_kinds(quantity)

    def _set_scale(self, scale: float | Tensor) -> None:
        self.scale, apart = scale, scale != 1
        self.off = not bool(apart.any()) if isinstance(apart, Tensor) else not apart
        self._apart = apart if isinstance(apart, Tensor) and not self.off and not bool(apart.all()) else None

    def of_samples(self, numbers: range) -> Guidance:
        """See ``Guidance``: the scales of these samples."""
        if not isinstance(self.scale, Tensor):
            return self
        other = copy.copy(self)
        other._set_scale(self.scale[numbers.start : numbers.stop])
        return other

    @abstractmethod
    def formula(self, strong: Tensor, weak: Tensor, at: Moment) -> Tensor:
        """Return the guided values, of the shape of ``strong`` and ``weak``, (N, *S) or fewer channels."""

    @property
    def remembers(self) -> bool:
        """Whether the formula looks at earlier evaluations."""
        return False

    @property
    def partly_off(self) -> bool:
        """Whether some samples have scale 1, and others not."""
        return self._apart is not None

    def check(self, x: Tensor) -> None:
        """Check the options against a state (N, *S).

        Raises:
            InputError: scales of another number than the samples, or more channels than they have.
        """
        if isinstance(self.scale, Tensor) and len(self.scale) != len(x):
            raise InputError(
                f"got {len(self.scale)} guidance scales for {len(x)} samples; give one for all, or one each"
            )
        if self.channels is not None and (x.ndim < 2 or self.channels > x.shape[1]):
            has = x.shape[1] if x.ndim > 1 else 0
            raise InputError(f"got channels {self.channels} to guide, expected at most the {has} of x; None guides all")

    def active(self, t: Tensor, x: Tensor) -> Tensor | bool:
        """Return which rows are guided, (N,); True if all are, False if none is."""
        inside = self._inside(t)
        if self._apart is None or inside is False:
            return inside
        apart = self._apart.to(x.device).repeat(len(x) // len(self._apart))
        return apart & inside if isinstance(inside, Tensor) else apart

    def _inside(self, t: Tensor) -> Tensor | bool:
        low, high = self.interval
        if self.off:
            return False
        if (low, high) == (0.0, 1.0):
            return True
        if t.ndim == 0 and t.dtype == torch.float64:
            return low <= float(t) <= high
        inside = (t >= low) & (t <= high)  # in t's precision, in which 0.7 ≤ 0.7
        count = int(inside.sum())
        return inside if 0 < count < inside.numel() else count > 0

    def weights(self, x: Tensor) -> float | Tensor:
        """Return the scale as a number, or shaped to multiply x."""
        if not isinstance(self.scale, Tensor):
            return self.scale
        return broadcast(self.scale.to(x).repeat(len(x) // len(self.scale)), x)

    def guide(self, strong: Tensor, weak: Tensor, at: Moment) -> Tensor:
        """Return guided values, (N, *S): the formula, rescaled, on the channels asked for; strong where not active."""
        count = self.channels
        if count is not None and count < strong.shape[1]:
            guided = torch.cat((self._rescaled(strong[:, :count], weak[:, :count], at), strong[:, count:]), 1)
        else:
            guided = self._rescaled(strong, weak, at)
        return torch.where(broadcast(at.active, guided), guided, strong) if isinstance(at.active, Tensor) else guided

    def _rescaled(self, strong: Tensor, weak: Tensor, at: Moment) -> Tensor:
        guided = self.formula(strong, weak, at)
        if not self.rescale:
            return guided
        # lengths about the mean: their ratio is that of the standard deviations, which are slower to come by
        wanted, came = (length(_rows(value) - _rows(value).mean(1, keepdim=True)) for value in (strong, guided))
        # arXiv:2305.08891, Eqs. 15 and 16: g·std(c)/std(g), mixed with g; a constant g has nothing to be scaled by
        ratio = torch.where(came > 0, wanted / came.clamp(min=torch.finfo(came.dtype).tiny), 1.0)
        return guided * broadcast((self.rescale * ratio + (1 - self.rescale)).reshape(-1), guided).to(guided.dtype)


def dot(first: Tensor, second: Tensor) -> Tensor:
    """Return the inner product of each sample, float32 or wider, shaped to multiply x."""
    wide = torch.promote_types(first.dtype, torch.float32)
    return broadcast(torch.linalg.vecdot(_rows(first).to(wide), _rows(second).to(wide)), first)


def length(value: Tensor) -> Tensor:
    """Return the Euclidean norm of each sample, float32 or wider, shaped to multiply x."""
    wide = torch.promote_types(value.dtype, torch.float32)
    return broadcast(torch.linalg.vector_norm(_rows(value), dim=1, dtype=wide), value)


def _rows(value: Tensor) -> Tensor:
    return value.flatten(1) if value.ndim > 1 else value[:, None]


def finite(name: str, value: float) -> float:
    """Return an option as a float; raise InputError unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"got {name} {value!r}, expected a finite number")
    return float(value)


def _checked_scale(scale: Scale) -> float | Tensor:
    try:
        values = torch.as_tensor(scale, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputTypeError(f"got guidance scale {scale!r}, expected a finite number, or one a sample") from error
    if values.ndim > 1 or not values.numel() or not bool(values.isfinite().all()):
        raise InputError(f"got guidance scale {scale}, expected a finite number, or one a sample, (N,); 1 is off")
    return values.clone() if values.ndim else float(values)


def _checked_interval(interval: Interval) -> Interval:
    if not isinstance(interval, Sequence) or len(interval) != 2:
        raise InputError(f"got guidance interval {interval!r}, expected (low, high)")
    low, high = (finite("guidance interval with", end) for end in interval)
    if not 0 <= low <= high <= 1:
        raise InputError(f"got guidance interval {tuple(interval)}, expected (low, high) with 0 ≤ low ≤ high ≤ 1")
    return low, high
