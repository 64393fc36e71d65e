"""Couplings that solve an assignment problem with scipy (``pip install 'pathline[transport]'``): all are permutations.

N samples; S the shape of one sample.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pathline.core.draws import BoundDraws
from pathline.core.errors import InputError
from pathline.interpolants.couplings.base import (
    Coupling,
    CouplingSpec,
    Randomness,
    Report,
    assign,
    registry,
    squared_distances,
)

__all__ = ["ClassConditional", "Conditional", "Exact", "Independent", "Partial"]


@registry.register("independent")
class Independent(Coupling):
    """Every data sample keeps the noise that was drawn for it."""

    def solve(
        self,
        data: Tensor,
        noise: Tensor,
        *,
        label: Tensor | None = None,
        condition: Tensor | None = None,
        draws: Randomness = None,
    ) -> Tensor:
        """Return 0 … N − 1."""
        return torch.arange(len(data))


@registry.register("exact")
class Exact(Coupling):
    """The permutation of least mean squared distance: minibatch optimal transport (arXiv:2302.00482, 2304.14772).

    It depends on the batch, what one device takes at once: the larger, the nearer to transport of the distributions.
    """

    def solve(
        self,
        data: Tensor,
        noise: Tensor,
        *,
        label: Tensor | None = None,
        condition: Tensor | None = None,
        draws: Randomness = None,
    ) -> Tensor:
        """Solve the assignment problem."""
        return assign(squared_distances(data, noise))


@registry.register("conditional")
class Conditional(Coupling):
    """Exact transport that also keeps conditions: cost ‖data_i − noise_j‖² + weight·‖c_i − c_j‖² (arXiv:2503.10636).

    c_j is the condition of the sample for which noise j was drawn, so that conditions and noise stay independent. It
    depends on the batch, what one device takes at once.

    Args:
        weight: of the conditions, 0 or more, in units of squared data by squared conditions; 0 is ``exact``, a large
            one pairs within equal conditions only.

    Raises:
        InputError: weight out of range.
    """

    def __init__(self, weight: float = 1.0) -> None:
        if not 0 <= weight < math.inf:
            raise InputError(f"got weight {weight}, expected a finite number of 0 or more")
        self.weight = weight

    def solve(
        self,
        data: Tensor,
        noise: Tensor,
        *,
        label: Tensor | None = None,
        condition: Tensor | None = None,
        draws: Randomness = None,
    ) -> Tensor:
        """Solve the assignment problem with the conditions' cost."""
        if condition is None:
            raise InputError("got no condition for the coupling 'conditional'; pass condition=… of shape (N, …)")
        cost = squared_distances(data, noise) + self.weight * squared_distances(condition, condition)
        if not bool(cost.isfinite().all()):
            raise InputError(f"got weight {self.weight:g}, whose cost is infinite for these conditions; lower it")
        return assign(cost)


@registry.register("class-conditional")
class ClassConditional(Coupling):
    """Couple within each label alone: labels never mix. Depends on the batch, as ``within`` does.

    Args:
        within: the coupling of each class, by name, mapping or instance.
    """

    def __init__(self, within: CouplingSpec = "exact") -> None:
        self.within: Coupling = registry.build(within)

    def solve(
        self,
        data: Tensor,
        noise: Tensor,
        *,
        label: Tensor | None = None,
        condition: Tensor | None = None,
        draws: Randomness = None,
    ) -> Tensor | tuple[Tensor, Report]:
        """Couple the samples of one label after the other, in ascending order; the report is the worst of theirs."""
        if label is None:
            raise InputError("got no labels for the coupling 'class-conditional'; pass label=… of shape (N,)")
        indices, reports = torch.empty(len(data), dtype=torch.int64), []
        labels = label.cpu()
        for value in torch.unique(labels):
            own = torch.nonzero(labels == value).flatten()
            rows = (x if x is None else x[own.to(x.device)] for x in (data, noise, label, condition))
            mine, others, classes, conditions = rows
            assert mine is not None and others is not None
            pairing = self.within.pair(mine, others, label=classes, condition=conditions, draws=_of(draws, own))
            indices[own] = own[pairing.indices]
            if pairing.report:
                reports.append(pairing.report)
        if not reports:
            return indices
        return indices, Report(*(max(column) for column in zip(*reports, strict=True)))


@registry.register("partial")
class Partial(Coupling):
    """Transport the cheapest pairs only; the others keep their independent noise where it is not taken.

    It depends on the batch, what one device takes at once.

    Args:
        share: of the batch that is transported, in [0, 1], rounded to whole pairs; 1 is ``exact``, 0 ``independent``.

    Raises:
        InputError: share out of range.
    """

    def __init__(self, share: float = 0.5) -> None:
        if not 0 <= share <= 1:
            raise InputError(f"got share {share}, expected a number in [0, 1]")
        self.share = share

    def solve(
        self,
        data: Tensor,
        noise: Tensor,
        *,
        label: Tensor | None = None,
        condition: Tensor | None = None,
        draws: Randomness = None,
    ) -> Tensor:
        """Find the k pairs of least total cost; data whose own noise is taken get what remains, in order."""
        count = len(data)
        indices = assign(_with_dummies(squared_distances(data, noise), count - round(self.share * count)))[:count]
        left = indices >= count
        unused = torch.ones(count, dtype=torch.bool)
        unused[indices[~left]] = False
        keep = left & unused
        indices[keep] = torch.arange(count)[keep]
        indices[left & ~keep] = torch.nonzero(unused & ~keep).flatten()
        return indices


def _with_dummies(cost: Tensor, dummies: int) -> Tensor:
    """Extend a cost (N, N) so that its least assignment leaves out as many rows and columns as there are dummies.

    A dummy takes a row or column for nothing. Two dummies never pair: that costs, and another pair of ``cost`` beside.
    """
    count = len(cost)
    padded = cost.new_zeros(count + dummies, count + dummies)
    padded[:count, :count] = cost
    padded[count:, count:] = cost.max() + 1
    return padded


def _of(draws: Randomness, rows: Tensor) -> Randomness:
    """Bind draws to the sample ids of some rows."""
    if not isinstance(draws, BoundDraws):
        return draws
    ids = torch.as_tensor(draws.ids, device="cpu")[rows]
    return draws.draws.at(ids, draws.counter, step=draws.step)
