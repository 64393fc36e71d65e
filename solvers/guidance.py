"""Guidance: a callable that turns a flow into another flow. It never enters a solver's loop.

N samples; S the shape of one sample.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pathline.core.checks import check_labels
from pathline.core.errors import InputError
from pathline.core.flow import BaseFlow, Prediction
from pathline.core.registry import Registry
from pathline.interpolants.base import broadcast

__all__ = ["ClassifierFree", "Guidance", "build", "names", "register", "registry"]


class Guidance(ABC):
    """Turns a flow into a guided one. Guided flows can be guided again."""

    @abstractmethod
    def __call__(self, flow: BaseFlow) -> BaseFlow:
        """Wrap a flow."""


registry: Registry[Guidance] = Registry("guidance", "solvers.guidance", Guidance)
register, build, names = registry.register, registry.build, registry.names


@registry.register("classifier-free", aliases=("cfg",))
class ClassifierFree(Guidance):
    """v = v_null + scale·(v_given − v_null), both from one network call on a doubled batch (arXiv:2207.12598).

    Args:
        scale: 1 is off and calls the conditional model alone; above 1 sharpens.
        interval: (low, high) in t: guide while low ≤ t ≤ high, call the conditional model alone elsewhere
            (arXiv:2404.07724).
        null: the label that stands for none; None takes the backbone's.

    Raises:
        InputError: a scale that is not finite, or an interval outside [0, 1].
    """

    def __init__(
        self, scale: float = 1.5, *, interval: tuple[float, float] = (0.0, 1.0), null: int | None = None
    ) -> None:
        if len(interval) != 2:
            raise InputError(f"got guidance interval {tuple(interval)}, expected (low, high)")
        low, high = interval
        if not isinstance(scale, int | float) or not math.isfinite(scale):
            raise InputError(f"got guidance scale {scale}, expected a finite number; 1 is off")
        if not 0 <= low <= high <= 1:
            raise InputError(f"got guidance interval {tuple(interval)}, expected (low, high) with 0 ≤ low ≤ high ≤ 1")
        self.scale, self.interval, self.null = float(scale), (float(low), float(high)), null

    def __call__(self, flow: BaseFlow) -> BaseFlow:
        """Wrap a flow; raises InputError if neither the backbone nor ``null`` names a null label."""
        null = getattr(flow.backbone, "null_label", None) if self.null is None else self.null
        if null is None:
            raise InputError(
                "got guidance for a backbone without a null label; pass null=…, or train with label dropout and one"
            )
        return _ClassifierFreeFlow(flow, self, null)


class _ClassifierFreeFlow(BaseFlow):
    def __init__(
        self, flow: BaseFlow, guidance: ClassifierFree, null: int, bound: Mapping[str, Any] | None = None
    ) -> None:
        self.flow, self.guidance, self.null, self._bound = flow, guidance, null, dict(bound or {})
        self.interpolant, self.backbone, self.predicts = flow.interpolant, flow.backbone, flow.predicts

    @property
    def nfe(self) -> int:
        return self.flow.nfe

    def given(self, **conditions: Any) -> BaseFlow:
        return _ClassifierFreeFlow(self.flow, self.guidance, self.null, {**self._bound, **conditions})

    def check(self, x: Tensor, conditions: Mapping[str, Any]) -> None:
        conditions = {**self._bound, **conditions}
        self.flow.check(x, conditions)
        if conditions.get("label") is None:
            raise InputError("got no label to guide towards, expected label of shape (N,); pass label=…")
        num_classes = getattr(self.backbone, "num_classes", None)
        if num_classes:
            check_labels(torch.tensor([self.null]), 1, num_classes, null=True)

    def open_ends(self, target: str) -> tuple[float, ...]:
        return self.flow.open_ends(target)

    def evaluate(self, x: Tensor, t: Tensor, conditions: Mapping[str, Any]) -> Prediction:
        conditions = {**self._bound, **conditions}
        low, high = self.guidance.interval
        inside = (t >= low) & (t <= high)
        if self.guidance.scale == 1 or not bool(inside.any()):
            return self.flow.evaluate(x, t, conditions)
        doubled = {name: _twice(value, len(x)) for name, value in conditions.items()}
        doubled["label"][len(x) :] = self.null
        times = t if t.ndim == 0 else torch.cat((t, t))
        both = self.flow.evaluate(torch.cat((x, x)), times, doubled)
        scale = broadcast(torch.where(inside, self.guidance.scale, 1.0).to(x.dtype), x)

        def guide(value: Tensor) -> Tensor:
            given, null = value.chunk(2)
            return null + scale * (given - null)

        return both.mixed(guide, x, t)


def _twice(value: Any, count: int) -> Any:
    """Repeat a condition that has one row a sample; hand anything else through."""
    return torch.cat((value, value)) if isinstance(value, Tensor) and value.ndim and len(value) == count else value
