"""Guidance by the branches of one backbone, by name: exits, later branches that look ahead, and internal guidance.

Each wraps the plain flow of a DeepFlow backbone, in any order and once each, before other guidance.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from pathline.core.errors import InputError
from pathline.core.flow import BaseFlow
from pathline.plugins.deepflow.flows import BranchFlow, branched, check_branch
from pathline.solvers.guidance import Guidance, Moment, PairGuidance, register
from pathline.solvers.guidance.base import Interval, finite

__all__ = ["BranchExit", "InternalGuidance", "LookAhead"]


@register("branch")
class BranchExit(Guidance):
    """Sample by the velocity of a branch, or switch branches along t: no block after the branch read is run.

    Args:
        branch: number of the branch, from 1; the last is plain sampling.
        schedule: in place of ``branch``, pairs (from, branch) with falling times, the first 1: each branch is read from
            its time downward, that time included. ((1, 1), (0.7, 2)) leaves after branch 1 while t > 0.7.

    Raises:
        InputError: neither or both, times that do not fall from 1, or a branch that does not exist.
    """

    def __init__(self, branch: int | None = None, *, schedule: Sequence[tuple[float, int]] | None = None) -> None:
        if (branch is None) == (schedule is None):
            raise InputError(f"got branch {branch} and schedule {schedule}; give one of them")
        self.schedule = _checked_schedule([(1.0, branch)] if schedule is None else schedule)

    def __call__(self, flow: BaseFlow) -> BranchFlow:
        """Wrap a flow; raises InputError unless it is one of branches."""
        return branched(flow, "branch", schedule=self.schedule)


@register("look-ahead")
class LookAhead(Guidance):
    """Give later branches other times: branch 1 + i is told clip(t − i·gap, 0, 1).

    In training the times of branches differ by at most the objective's ``max_gap``, 0.01 in the paper, either way.

    Args:
        gap: above 0 towards data, below 0 towards noise, 0 is plain sampling; in [−1, 1].

    Raises:
        InputError: a gap outside [−1, 1], or one other than 0 where no branch after the first is read.
    """

    def __init__(self, gap: float) -> None:
        self.gap = finite("gap", gap)
        if not -1 <= self.gap <= 1:
            raise InputError(f"got gap {gap}, expected a length of time in [-1, 1]; above 0 looks towards data")

    def __call__(self, flow: BaseFlow) -> BranchFlow:
        """Wrap a flow; raises InputError unless it is one of branches."""
        return branched(flow, "look-ahead", gap=self.gap)


@register("internal")
class InternalGuidance(PairGuidance):
    """v + w·(v − v_i): from the velocity of an earlier branch to the one read, and on, in one network call.

    The one read is the last, or what ``branch`` says. An acceleration, as ``taylor`` needs it, stays as it is.

    Args:
        weight: w; 0 is off. 1 + w is the scale of other guidance.
        branch: i, the weaker one; before the one read.
        interval: see ``PairGuidance``.
        rescale: see ``PairGuidance``.
        channels: see ``PairGuidance``.

    Raises:
        InputError: a weight that is not finite, a branch below 1; see also ``PairGuidance``.
    """

    def __init__(
        self,
        weight: float = 0.5,
        branch: int = 1,
        *,
        interval: Interval = (0.0, 1.0),
        rescale: float = 0.0,
        channels: int | None = None,
    ) -> None:
        super().__init__(1 + finite("weight", weight), interval=interval, rescale=rescale, channels=channels)
        self.branch = check_branch("weaker branch", branch)

    def __call__(self, flow: BaseFlow) -> BranchFlow:
        """Wrap a flow; raises InputError unless it is one of branches."""
        return branched(flow, "internal", internal=self, weaker=self.branch)

    def formula(self, strong: Tensor, weak: Tensor, at: Moment) -> Tensor:
        """See ``PairGuidance``."""
        return torch.lerp(weak, strong, at.scale)


def _checked_schedule(schedule: Sequence[tuple[float, int | None]]) -> tuple[tuple[float, int], ...]:
    if not isinstance(schedule, Sequence) or not all(isinstance(p, Sequence) and len(p) == 2 for p in schedule):
        raise InputError(f"got schedule {schedule!r}, expected pairs (from, branch), as ((1, 1), (0.7, 2))")
    checked = tuple((finite("schedule with time", start), check_branch("branch", branch)) for start, branch in schedule)
    times = [start for start, _ in checked]
    if not times or times[0] != 1 or times[-1] < 0 or any(later >= start for start, later in pairwise(times)):
        raise InputError(
            f"got a schedule with the times {times}, expected ones that fall from 1 and stay in [0, 1], so that each t "
            "has one branch"
        )
    return checked
