"""How well a flow predicts at each time: plain errors on data at drawn times and noise.

N samples; S the shape of one; B bins of time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pathline.core.draws import BoundDraws, send
from pathline.core.errors import InputError
from pathline.core.flow import BaseFlow
from pathline.interpolants.base import Kind, check_kinds
from pathline.interpolants.bridge import TwoEnded
from pathline.metrics.models import Measured, ModelMetric, register

__all__ = ["ByTime", "LossByTime", "Point", "mean_square"]

_MARGIN = 1e-3  # kept from an end at which what is asked for does not exist, as where scores are trained


class Point(NamedTuple):
    """One time a sample, and what stands there.

    Attributes:
        x: x_t, (N, *S).
        t: (N,).
        data: (N, *S).
        noise: (N, *S).
        conditions: what the backbone takes.
    """

    x: Tensor
    t: Tensor
    data: Tensor
    noise: Tensor
    conditions: Mapping[str, Any]


class ByTime(ModelMetric):
    """A metric over bins of t: every sample is measured once in each, at a uniform time and noise of its own.

    Args:
        bins: B ≥ 1, of equal width, over the times at which what is measured exists.

    Raises:
        InputError: no whole number of bins.
    """

    def __init__(self, *, bins: int = 20) -> None:
        super().__init__()
        if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
            raise InputError(f"got bins {bins!r}, expected a whole number of 1 or more")
        self.bins = bins

    @abstractmethod
    def errors(self, flow: BaseFlow, point: Point) -> Mapping[str, Tensor]:
        """Measure one time a sample: name of a row -> (N,)."""

    def interval(self, flow: BaseFlow) -> tuple[float, float]:
        """Return the times (low, high) that are measured."""
        return flow.interpolant.training_interval("velocity")

    def check(self, flow: BaseFlow) -> None:
        """Refuse paths whose other end is data too: which pairs it was trained on is not known here."""
        if isinstance(flow.interpolant, TwoEnded):
            raise InputError(
                f"got the {type(flow.interpolant).__name__} path, whose ends are both data; {self.metric} is defined "
                "on paths from noise alone"
            )

    def measure(self, flow: BaseFlow, data: Tensor, conditions: Mapping[str, Any], draws: BoundDraws) -> Measured:
        """Measure every bin."""
        low, high = self.interval(flow)
        columns: list[Mapping[str, Tensor]] = []
        for b in range(self.bins):
            t = low + (high - low) * (b + draws.uniform(f"time in bin {b}").double()) / self.bins
            t = send(t.to(data.dtype), data.device)
            noise = send(draws.normal(f"noise in bin {b}", data.shape[1:]), data.device).to(data)
            x = flow.interpolant.interpolate(data, noise, t)
            columns.append(self.errors(flow, Point(x, t, data, noise, conditions)))
        middles = low + (high - low) * (torch.arange(self.bins, dtype=torch.float64) + 0.5) / self.bins
        return Measured(middles, {name: torch.stack([column[name] for column in columns], 1) for name in columns[0]})


@register("loss-by-time")
class LossByTime(ByTime):
    """‖prediction − target‖² by t, unweighted, whatever the flow was trained with.

    Args:
        bins: see ``ByTime``.
        kind: ``velocity``, ``score``, ``noise`` or ``data``; None is what the backbone predicts.
    """

    title = "loss by time"

    def __init__(self, *, bins: int = 20, kind: Kind | None = None) -> None:
        super().__init__(bins=bins)
        if kind is not None:
            check_kinds(kind)
        self.kind = kind
        of = kind or "what the backbone predicts"
        self.metric = f"loss-by-time, {of}, {bins} bins"
        self.about = f"squared error of {of} by t, mean over a sample's values"
        self.unit = "mean squared error"

    def interval(self, flow: BaseFlow) -> tuple[float, float]:
        """Return the times at which the kind is trained, without ends at which the flow does not have it."""
        kind = self._kind(flow)
        low, high = flow.interpolant.training_interval(kind)
        ends = flow.open_ends(kind)
        return max(low, _MARGIN * (0.0 in ends)), min(high, 1 - _MARGIN * (1.0 in ends))

    def errors(self, flow: BaseFlow, point: Point) -> dict[str, Tensor]:
        """Call the flow once."""
        kind = self._kind(flow)
        predicted: Tensor = getattr(flow.evaluate(point.x, point.t, point.conditions), kind)
        return {kind: mean_square(predicted - flow.interpolant.target(kind, point.data, point.noise, point.t))}

    def _kind(self, flow: BaseFlow) -> Kind:
        return self.kind or flow.predicts


def mean_square(values: Tensor) -> Tensor:
    """Return the mean square of each sample's values (N, *S), (N,), in float32 or wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32)).square().flatten(1).mean(1)
