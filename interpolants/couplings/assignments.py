"""Couplings by assignment, a permutation of the noise, solved with scipy (``pip install 'pathline[transport]'``).

N samples; S the shape of one sample.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pathline.core.draws import BoundDraws
from pathline.core.errors import InputError
from pathline.interpolants.couplings.base import (
    Batch,
    Coupling,
    CouplingSpec,
    Report,
    assign,
    registry,
    squared_distances,
)

__all__ = ["ClassConditional", "Conditional", "Exact", "Independent", "Partial"]


@registry.register("independent")
class Independent(Coupling):
    """Every data sample keeps the noise that was drawn for it."""

    def solve(self, batch: Batch) -> Tensor:
        """Return 0 … N − 1."""
        return torch.arange(len(batch))


@registry.register("exact")
class Exact(Coupling):
    """The permutation of least mean squared distance: minibatch optimal transport (arXiv:2302.00482, 2304.14772).

    It depends on the batch, what one device takes at once: the larger, the nearer to transport of the distributions.
    """

    def solve(self, batch: Batch) -> Tensor:
        """Solve the assignment problem."""
        return assign(squared_distances(batch.data, batch.noise))


@registry.register("conditional")
class Conditional(Coupling):
    """Exact transport that also keeps conditions: cost ‖data_i − noise_j‖² + weight·‖c_i − c_j‖² (arXiv:2503.10636).

    c_j is the condition of the sample for which noise j was drawn; the larger the weight, the less the noise that a
    condition gets departs from noise drawn for it. Depends on the batch, what one device takes at once.

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

    def solve(self, batch: Batch) -> Tensor:
        """Solve the assignment problem with the conditions' cost."""
        if batch.condition is None:
            raise InputError("got no condition for the coupling 'conditional'; pass condition=… of shape (N, …)")
        cost = squared_distances(batch.data, batch.noise)
        cost = cost + self.weight * squared_distances(batch.condition, batch.condition)
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

    def solve(self, batch: Batch) -> Tensor | tuple[Tensor, Report]:
        """Couple the samples of one label after the other, in ascending order; the report is the worst of theirs."""
        if batch.label is None:
            raise InputError("got no labels for the coupling 'class-conditional'; pass label=… of shape (N,)")
        indices, reports = torch.empty(len(batch), dtype=torch.int64), []
        labels = batch.label.cpu()
        for value in torch.unique(labels):
            own = torch.nonzero(labels == value).flatten()
            part = _rows(batch, own)
            pairing = self.within.pair(
                part.data, part.noise, label=part.label, condition=part.condition, draws=part.draws
            )
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

    def solve(self, batch: Batch) -> Tensor:
        """Find the k pairs of least total cost; data whose own noise is taken get what remains, in order."""
        count = len(batch)
        cost = squared_distances(batch.data, batch.noise)
        indices = assign(_with_dummies(cost, count - round(self.share * count)))[:count]
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


def _rows(batch: Batch, rows: Tensor) -> Batch:
    """Return some rows of a batch; draws are bound to their sample ids."""
    data, noise = (x[rows.to(x.device)] for x in (batch.data, batch.noise))
    label, condition = (None if x is None else x[rows.to(x.device)] for x in (batch.label, batch.condition))
    draws = batch.draws
    if isinstance(draws, BoundDraws):
        draws = draws.draws.at(torch.as_tensor(draws.ids, device="cpu")[rows], draws.counter, step=draws.step)
    return Batch(data, noise, label, condition, draws)
