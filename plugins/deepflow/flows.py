"""Flows that read more of a branched backbone than its last velocity, in one network call.

N samples; S the shape of one sample; branches are numbered 1 … k; t has shape (N,) or ().
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from pathline.core.errors import InputError
from pathline.core.flow import BaseFlow, Conditions, Flow, Mix, Prediction
from pathline.interpolants.base import Interpolant, broadcast
from pathline.plugins.deepflow.branches import Branches, Spoken
from pathline.solvers.guidance.base import Moment, PairGuidance
from pathline.solvers.guidance.flows import GuidedFlow, WeakGuidedFlow

__all__ = [
    "AcceleratedPrediction",
    "BranchFlow",
    "BranchedBackbone",
    "Reading",
    "accelerated",
    "branched",
    "check_branch",
]

Schedule = tuple[tuple[float, int], ...]


@runtime_checkable
class BranchedBackbone(Protocol):
    """What these flows ask of a backbone, beside ``backbone(x, t, spoken=…, branch_times=…)`` -> ``Branches``.

    Attributes:
        branch_count: k.
        has_acceleration: whether the branches 1 … k − 1 say an acceleration.
    """

    branch_count: int
    has_acceleration: bool

    def blocks_until(self, branch: int) -> int:
        """Return how many transformer blocks run for the velocity of a branch."""
        ...


class AcceleratedPrediction(Prediction):
    """A velocity, and the acceleration Dv/Dt along the flow, each (N, *S)."""

    def __init__(self, velocity: Tensor, acceleration: Tensor, x: Tensor, t: Tensor, interpolant: Interpolant) -> None:
        super().__init__(velocity, x, t, interpolant)
        self.acceleration = acceleration

    def mixed(self, mix: Mix, x: Tensor, t: Tensor) -> AcceleratedPrediction:
        """See ``Prediction``."""
        return AcceleratedPrediction(mix(self.value), mix(self.acceleration), x, t, self.interpolant)


@dataclass(frozen=True)
class Reading:
    """What is read of the branches along t; None wherever nothing was said.

    Attributes:
        schedule: (from, branch), the times from 1 down: each branch is read from its time on, that time included, until
            the next. None reads the last branch.
        gap: branch 1 + i stands at clip(t − i·gap, 0, 1). None puts all at t.
        internal: guidance of the velocity read by that of the branch ``weaker``.
        weaker: given with ``internal``.
        accelerates: whether an acceleration is read.
        acceleration: its branch; None is the one before the branch read, or the first where that is read.
    """

    schedule: Schedule | None = None
    gap: float | None = None
    internal: PairGuidance | None = None
    weaker: int | None = None
    accelerates: bool = False
    acceleration: int | None = None

    def acceleration_of(self, branch: int) -> int:
        """Return the branch whose acceleration goes with the velocity of ``branch``."""
        return max(branch - 1, 1) if self.acceleration is None else self.acceleration


class BranchFlow(Flow):
    """The flow of a branched backbone, read as ``reading`` says; it counts its calls with the flow that it is made of.

    Args:
        flow: of a branched backbone that predicts velocities.
        reading: what is read.

    Raises:
        InputError: branches that do not exist, or not where they are needed.
    """

    def __init__(self, flow: Flow, reading: Reading) -> None:
        super().__init__(flow.backbone, flow.interpolant, flow.predicts)
        self._bound, self._spent, self.reading = flow._bound, flow._spent, reading
        self.branches = cast("BranchedBackbone", flow.backbone)
        self.schedule: Schedule = reading.schedule or ((1.0, self.branches.branch_count),)
        self._check_reading()

    def given(self, **conditions: Any) -> BranchFlow:
        """See ``BaseFlow``."""
        return BranchFlow(super().given(**conditions), self.reading)

    def check(self, x: Tensor, conditions: Conditions) -> None:
        """See ``Flow``; also the options of internal guidance against the state."""
        super().check(x, conditions)
        if self.reading.internal is not None:
            self.reading.internal.check(x)

    def evaluate(self, x: Tensor, t: Tensor, conditions: Conditions) -> Prediction:
        """Call the network once, up to the last branch that is read at t."""
        reading, given = self.reading, {**self._bound, **conditions}
        active = reading.internal is not None and reading.internal.active(t, x)
        branches = self.branches_at(t)
        asked = self._asked(branches, guided=active is not False)
        blocks = self.branches.blocks_until(asked.last)
        out = self.call(lambda x, t: self._speak(x, t, asked, given), x, t, blocks)
        velocities = dict(zip(asked.velocities, out, strict=False))
        velocity = _row_by_row(velocities, branches)
        if reading.internal is not None and reading.weaker is not None and active is not False:
            at = Moment(t, reading.internal.weights(x), active, None, "velocity")
            velocity = reading.internal.guide(velocity, velocities[reading.weaker], at)
        if not reading.accelerates:
            return Prediction(velocity, x, t, self.interpolant)
        said = dict(zip(asked.accelerations, out[len(asked.velocities) :], strict=True))
        by_branch = {branch: said[reading.acceleration_of(branch)] for branch in _numbers(branches)}
        return AcceleratedPrediction(velocity, _row_by_row(by_branch, branches), x, t, self.interpolant)

    def branches_at(self, t: Tensor) -> int | Tensor:
        """Return the branch to read at t; one a sample, (N,), where they differ."""
        (_, first), *later = self.schedule
        if not later:
            return first
        numbers = torch.full_like(t, first, dtype=torch.long)
        for start, branch in later:  # in t's precision, in which 0.7 ≤ 0.7
            numbers = torch.where(t <= start, branch, numbers)
        present = _numbers(numbers)
        return numbers if len(present) > 1 else present[0]

    def _asked(self, branches: int | Tensor, *, guided: bool) -> Spoken:
        read, weaker = _numbers(branches), self.reading.weaker
        velocities = {*read, weaker} if guided and weaker is not None else {*read}
        accelerations = {self.reading.acceleration_of(branch) for branch in read if self.reading.accelerates}
        return Spoken(tuple(sorted(velocities)), tuple(sorted(accelerations)))

    def _speak(self, x: Tensor, t: Tensor, asked: Spoken, given: Conditions) -> tuple[Tensor, ...]:
        gap, later = self.reading.gap, range(1, self.branches.branch_count)
        times = tuple((t - i * gap).clamp(0, 1) for i in later) if gap else None
        out: Branches = self.backbone(x, t, spoken=asked, branch_times=times, **given)
        return (*out.velocities, *out.accelerations)

    def _check_reading(self) -> None:
        reading, count = self.reading, self.branches.branch_count
        for _, branch in self.schedule:
            check_branch("branch", branch, count)
            if reading.accelerates:
                check_branch("acceleration of branch", reading.acceleration_of(branch), min(branch, count - 1))
        if reading.gap and all(branch == 1 for _, branch in self.schedule):
            raise InputError(
                f"got look-ahead {reading.gap} where branch 1 alone is read, which stands at t; set gap 0, or read a "
                "later branch"
            )
        if reading.internal is None or reading.weaker is None:
            return
        check_branch("weaker branch", reading.weaker, count - 1)
        (low, high), ends = reading.internal.interval, [start for start, _ in self.schedule[1:]]
        for (start, branch), end in zip(self.schedule, (*ends, -1.0), strict=True):
            if low <= start and high > end and branch <= reading.weaker:
                raise InputError(
                    f"got internal guidance by branch {reading.weaker} at times where branch {branch} is read, "
                    "expected a branch before it; give another branch, interval or schedule"
                )


def branched(flow: BaseFlow, name: str, **read: Any) -> BranchFlow:
    """Return the flow of a branched backbone that reads more, as fields of ``Reading``.

    Args:
        flow: plain, or read already.
        name: of the guidance that asks, for messages.
        read: what had not been said yet.

    Raises:
        InputError: another flow or backbone, a prediction other than the velocity, or what was said before.
    """
    if type(flow) is not Flow and not isinstance(flow, BranchFlow):
        raise InputError(
            f"got a {type(flow).__name__}, in which {name!r} cannot reach the branches, expected the plain flow of a "
            f"DeepFlow backbone; put {name!r} before other guidance"
        )
    if not isinstance(flow.backbone, BranchedBackbone) or flow.predicts != "velocity":
        raise InputError(
            f"got a {type(flow.backbone).__name__} that predicts {flow.predicts} for {name!r}, which reads the "
            "velocities of branches, expected a DeepFlow backbone; leave it out"
        )
    reading = flow.reading if isinstance(flow, BranchFlow) else Reading()
    if any(getattr(reading, field) is not None for field in read):
        raise InputError(f"got {name!r} twice for one flow; give it once")
    return BranchFlow(flow, replace(reading, **read))


def accelerated(flow: BaseFlow, branch: int | None) -> BaseFlow:
    """Return a flow whose predictions carry an acceleration, guided as velocities are.

    Args:
        flow: of a DeepFlow backbone, guided or not.
        branch: see ``Reading.acceleration``.

    Raises:
        InputError: a flow that has none, or in which it does not reach the solver.
    """
    if isinstance(flow, GuidedFlow):
        if flow.guidance.quantity is not None:
            raise InputError(
                f"got guidance of the {flow.guidance.quantity} alone, which leaves no acceleration; set its quantity "
                "to None, or use 'heun'"
            )
        other = copy.copy(flow)
        other.flow = accelerated(flow.flow, branch)
        if isinstance(other, WeakGuidedFlow):
            other.weak = accelerated(other.weak, branch)
        return other
    if type(flow) is not Flow and not isinstance(flow, BranchFlow):
        raise InputError(f"got a {type(flow).__name__}, which hands no acceleration on; use its flow, or 'heun'")
    network = flow.backbone
    if not isinstance(network, BranchedBackbone) or not network.has_acceleration or flow.predicts != "velocity":
        raise InputError(
            f"got a {type(network).__name__} that predicts {flow.predicts} and no acceleration, expected a DeepFlow "
            "backbone of two branches or more whose refiner has one; use 'heun'"
        )
    reading = flow.reading if isinstance(flow, BranchFlow) else Reading()
    return BranchFlow(flow, replace(reading, accelerates=True, acceleration=branch))


def check_branch(name: str, branch: int | None, highest: int | None = None) -> int:
    """Return the number of a branch; raise InputError unless it is one of 1 … ``highest`` (None: not known yet)."""
    largest = math.inf if highest is None else highest
    if isinstance(branch, bool) or not isinstance(branch, int) or not 1 <= branch <= largest:
        there = "1 and more" if highest is None else f"1 … {highest}" if highest else "none, as the backbone has one"
        raise InputError(f"got {name} {branch!r}, expected a branch of {there}; they are numbered from 1")
    return branch


def _numbers(branches: int | Tensor) -> list[int]:
    return [branches] if isinstance(branches, int) else sorted(set(branches.reshape(-1).tolist()))


def _row_by_row(values: Mapping[int, Tensor], branches: int | Tensor) -> Tensor:
    """Return the value of each row's branch, of values by branch."""
    if isinstance(branches, int):
        return values[branches]
    (_, chosen), *others = values.items()
    for branch, value in others:
        chosen = torch.where(broadcast(branches == branch, value), value, chosen)
    return chosen
