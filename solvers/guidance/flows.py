"""Guided flows: which two predictions a guidance acts on, and what the flow knows after it.

N samples; S the shape of one sample.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from itertools import count
from typing import Any, Self

import torch
from torch import Tensor

from pathline.core.checks import check_labels
from pathline.core.errors import InputError
from pathline.core.flow import BaseFlow, Conditions, Mix, Prediction, Spent
from pathline.interpolants.base import Interpolant, Kind, broadcast
from pathline.interpolants.bridge import Stochastic
from pathline.solvers.guidance.base import Moment, PairGuidance, Past

__all__ = ["GuidedFlow", "LabelGuidedFlow", "WeakGuidedFlow"]

Pair = tuple[Prediction, Prediction]


class GuidedFlow(BaseFlow):
    """A flow that follows the stronger of two predictions; a subclass says which two."""

    def __init__(self, flow: BaseFlow, guidance: PairGuidance) -> None:
        self.flow, self.guidance = flow, guidance
        self.interpolant, self.backbone = flow.interpolant, flow.backbone
        self.predicts = guidance.quantity or flow.predicts
        self._bound = {**flow.bound}
        self._past: Past | None = None

    @property
    def nfe(self) -> int:
        """See ``BaseFlow``."""
        return self.flow.nfe

    @property
    def block_evaluations(self) -> int | None:
        """See ``BaseFlow``."""
        return self.flow.block_evaluations

    @property
    def bound(self) -> Conditions:
        """See ``BaseFlow``: they are doubled, and handed to a weaker flow, as all conditions are."""
        return self._bound

    def given(self, **conditions: Any) -> Self:
        """See ``BaseFlow``."""
        other = copy.copy(self)
        other._bound = {**self._bound, **conditions}
        return other

    def begin(self) -> Self:
        """See ``BaseFlow``."""
        other = copy.copy(self)
        other.flow = self.flow.begin()
        other._past = Past() if self.guidance.remembers else None
        return other

    @property
    def remembers(self) -> bool:
        """See ``BaseFlow``."""
        return self.flow.remembers or (self.guidance.remembers and not self.guidance.off)

    def check(self, x: Tensor, conditions: Conditions) -> None:
        """See ``BaseFlow``; also the guidance's options against the state."""
        self.flow.check(x, {**self._bound, **conditions})
        self.guidance.check(x)
        if self.guidance.quantity:
            self.flow.open_ends(self.guidance.quantity)  # raises where it can be had nowhere

    def open_ends(self, target: str) -> tuple[float, ...]:
        """See ``BaseFlow``: ends at which the flow lacks it, or, while guided, the quantity, or that the target."""
        ends, (low, high) = set(self.flow.open_ends(target)), self.guidance.interval
        kind = self._quantity
        if kind is None or self.guidance.off or target == "diffusion":
            return tuple(sorted(ends))
        guided = {*self._quantity_ends(kind), *self.interpolant.open_ends(kind, target)}
        outside = ends if self.guidance.partly_off else {end for end in ends if not low <= end <= high}
        return tuple(sorted(outside | {end for end in guided if low <= end <= high}))

    @property
    def _quantity(self) -> Kind | None:
        """What the formula acts on; None for each value that the networks predict."""
        return self.guidance.quantity

    def _quantity_ends(self, kind: Kind) -> tuple[float, ...]:
        return self.flow.open_ends(kind)

    def evaluate(self, x: Tensor, t: Tensor, conditions: Conditions) -> Prediction:
        """See ``BaseFlow``: the two predictions and the formula, or the conditional model alone."""
        conditions = {**self._bound, **conditions}
        active = self.guidance.active(t, x)
        if active is False:
            return self.flow.evaluate(x, t, conditions)
        strong, weak = self._pair(x, t, conditions)
        kind = self._quantity
        if kind is None and not _alike(strong, weak):
            kind = "velocity"
        scale, numbers = self.guidance.weights(x), count()

        def mix(first: Tensor, second: Tensor) -> Tensor:
            at = Moment(t, scale, active, self._past, (kind or strong.kind, next(numbers)))
            return self.guidance.guide(first, second, at)

        if kind is None:
            return _mixed(strong, weak, mix, x, t)
        if kind != strong.kind:  # the same for all three, of which two ask for them
            weak.coefficients = strong.coefficients
        value = mix(getattr(strong, kind), getattr(weak, kind))
        guided = Prediction(value, x, t, self.interpolant, kind)
        if kind != strong.kind:
            guided.coefficients = strong.coefficients
        return _Chosen(guided, strong, active) if isinstance(active, Tensor) else guided

    @abstractmethod
    def _pair(self, x: Tensor, t: Tensor, conditions: Conditions) -> Pair:
        """Return the stronger and the weaker prediction at (x, t)."""


class LabelGuidedFlow(GuidedFlow):
    """With and without the label, both from one network call on a doubled batch."""

    def __init__(self, flow: BaseFlow, guidance: PairGuidance, null: int) -> None:
        super().__init__(flow, guidance)
        self.null = null

    def check(self, x: Tensor, conditions: Conditions) -> None:
        """See ``BaseFlow``; also the label to guide towards, and the null label."""
        super().check(x, conditions)
        if {**self._bound, **conditions}.get("label") is None:
            raise InputError("got no label to guide towards, expected label of shape (N,); pass label=…")
        num_classes = getattr(self.backbone, "num_classes", None)
        if num_classes:
            check_labels(torch.tensor([self.null]), 1, num_classes, null=True)

    def _pair(self, x: Tensor, t: Tensor, conditions: Conditions) -> Pair:
        rows = len(x)
        doubled = {name: _twice(value, rows) for name, value in conditions.items()}
        doubled["label"][rows:] = self.null
        both = self.flow.evaluate(torch.cat((x, x)), torch.cat((t, t)) if t.ndim else t, doubled)
        return both.mixed(lambda value: value[:rows], x, t), both.mixed(lambda value: value[rows:], x, t)


class WeakGuidedFlow(GuidedFlow):
    """One flow, and a weaker one on the same path with the same conditions.

    Raises:
        InputError: a weaker flow on another path, or for samples of another shape.
    """

    def __init__(self, flow: BaseFlow, guidance: PairGuidance, weak: BaseFlow) -> None:
        super().__init__(flow, guidance)
        self.weak = weak
        if not _same_path(flow.interpolant, weak.interpolant):
            paths = f"the {type(weak.interpolant).__name__} path beside one on the {type(flow.interpolant).__name__}"
            raise InputError(f"got a weak flow on {paths} path, expected one path; use Rescheduled")
        ours, theirs = (getattr(network, "input_shape", None) for network in (flow.backbone, weak.backbone))
        if ours is not None and theirs is not None and tuple(ours) != tuple(theirs):
            raise InputError(f"got a weak flow for samples of shape {tuple(theirs)}, expected {tuple(ours)}")
        if self._quantity:
            self.predicts = self._quantity
        self._more = Spent()

    @property
    def nfe(self) -> int:
        """Calls of both networks."""
        return self.flow.nfe + self._more.calls

    @property
    def block_evaluations(self) -> int | None:
        """Blocks of both networks; None if one does not tell."""
        strong, weak = self.flow.block_evaluations, self.weak.block_evaluations
        return None if strong is None or weak is None else strong + self._more.blocks

    def begin(self) -> Self:
        """See ``BaseFlow``."""
        other = super().begin()
        other.weak = self.weak.begin()
        return other

    @property
    def remembers(self) -> bool:
        """See ``BaseFlow``."""
        return super().remembers or (self.weak.remembers and not self.guidance.off)

    def check(self, x: Tensor, conditions: Conditions) -> None:
        """See ``BaseFlow``; the weaker flow's too."""
        super().check(x, conditions)
        self.weak.check(x, {**self._bound, **conditions})
        if self._quantity:
            self.weak.open_ends(self._quantity)

    @property
    def _quantity(self) -> Kind | None:
        return self.guidance.quantity or (None if self.flow.predicts == self.weak.predicts else "velocity")

    def _quantity_ends(self, kind: Kind) -> tuple[float, ...]:
        return (*self.flow.open_ends(kind), *self.weak.open_ends(kind))

    def open_ends(self, target: str) -> tuple[float, ...]:
        """See ``BaseFlow``; where it is guided, also the weaker flow's."""
        ends, (low, high) = set(super().open_ends(target)), self.guidance.interval
        if self._quantity is None and not self.guidance.off and target != "diffusion":
            ends |= {end for end in self.weak.open_ends(target) if low <= end <= high}
        return tuple(sorted(ends))

    def _pair(self, x: Tensor, t: Tensor, conditions: Conditions) -> Pair:
        strong = self.flow.evaluate(x, t, conditions)
        if self.weak.backbone is self.backbone:  # it may answer in the same memory again
            strong = strong.mixed(torch.clone, x, t)
        ours, theirs = _spent(self.flow), _spent(self.weak)
        weak = self.weak.evaluate(x, t, conditions)
        shared, made = _spent(self.flow), _spent(self.weak)  # shared by calls of a network that both have in common
        self._more.calls += (made.calls - theirs.calls) - (shared.calls - ours.calls)
        self._more.blocks += (made.blocks - theirs.blocks) - (shared.blocks - ours.blocks)
        return strong, weak


class _Chosen(Prediction):
    """One of two predictions, sample by sample: each keeps what it alone can tell."""

    single = False

    def __init__(self, guided: Prediction, plain: Prediction, active: Tensor) -> None:
        super().__init__(guided.value, guided.x, guided.t, guided.interpolant, guided.kind)
        self.guided, self.plain, self.active = guided, plain, active

    def _as(self, target: Kind) -> Tensor:
        guided, plain = (getattr(prediction, target) for prediction in (self.guided, self.plain))
        return torch.where(broadcast(self.active, guided), guided, plain)

    def mixed(self, mix: Mix, x: Tensor, t: Tensor) -> Prediction:
        """See ``Prediction``."""
        # rows that are mixed share their time and scale, so that they are active together
        return _Chosen(self.guided.mixed(mix, x, t), self.plain.mixed(mix, x, t), self.active[: len(x)])


def _alike(first: Prediction, second: Prediction) -> bool:
    """Whether two predictions are made of the same values."""
    if isinstance(first, _Chosen) and isinstance(second, _Chosen):
        return _alike(first.guided, second.guided) and _alike(first.plain, second.plain)
    return type(first) is type(second) and first.kind == second.kind


def _mixed(
    strong: Prediction, weak: Prediction, mix: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor
) -> Prediction:
    """Mix each value of one prediction with its counterpart in another of the same form."""
    others: list[Tensor] = []

    def note(value: Tensor) -> Tensor:
        others.append(value)
        return value

    weak.mixed(note, x, t)
    values = iter(others)
    return strong.mixed(lambda value: mix(value, next(values)), x, t)


def _spent(flow: BaseFlow) -> Spent:
    return Spent(flow.nfe, flow.block_evaluations or 0)


def _twice(value: Any, rows: int) -> Any:
    """Repeat a condition that has one row a sample; hand anything else through."""
    return torch.cat((value, value)) if isinstance(value, Tensor) and value.ndim and len(value) == rows else value


def _same_path(first: Interpolant, second: Interpolant) -> bool:
    """Whether two paths have the same coefficients, by their values at nine times."""
    if first is second:
        return True
    t = torch.linspace(0, 1, 11, dtype=torch.float64)[1:-1]
    ours, theirs = ([*path.evaluate(t)] for path in (first, second))
    for path, values in ((first, ours), (second, theirs)):
        values += path.latent(t) if isinstance(path, Stochastic) else ()
    return len(ours) == len(theirs) and all(torch.allclose(*pair, rtol=1e-9) for pair in zip(ours, theirs, strict=True))
