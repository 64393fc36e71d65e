"""The entropic coupling, by Sinkhorn's iteration in the log domain (POT; ``pip install 'pathline[transport]'``).

N samples; S the shape of one sample.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from pathline.core.checks import require
from pathline.core.draws import Draws
from pathline.core.errors import ConvergenceError, InputError
from pathline.interpolants.couplings.base import (
    Batch,
    Coupling,
    Randomness,
    Report,
    assign,
    registry,
    squared_distances,
)

__all__ = ["Sinkhorn"]

Draw = Literal["permutation", "rows"]


@registry.register("sinkhorn")
class Sinkhorn(Coupling):
    """Entropic transport: the plan P of least Σ P·cost + regularisation·Σ P·log P with marginals 1/N (arXiv:1306.0895).

    It is solved in the log domain, where it does not underflow in many dimensions, and depends on the batch, what one
    device takes at once. In many dimensions all squared distances are alike, and a regularisation in units of their
    mean makes the plan nearly independent; lower it there.

    Args:
        regularisation: weight of the entropy, above 0; 0.05 as torchcfm's, which is absolute.
        relative: in units of the mean cost; an absolute one of 2·scale² is a Schrödinger bridge's (arXiv:2307.03672).
        iterations: budget, 1 or more; small batches on a line took up to 1941 of them at the other defaults.
        tolerance: of every marginal relative to 1/N, in (0, 1).
        draw: ``permutation`` takes the permutation of greatest Σ log P_ij + Gumbel_ij, so that every noise is used:
            the exact coupling for a small regularisation, a uniformly random one for a large. ``rows`` draws j from row
            i of P: the plan's own pairs, but noise may repeat.

    Raises:
        InputError: options out of range.
    """

    def __init__(
        self,
        regularisation: float = 0.05,
        *,
        relative: bool = True,
        iterations: int = 5000,
        tolerance: float = 1e-3,
        draw: Draw = "permutation",
    ) -> None:
        if not 0 < regularisation < math.inf or iterations < 1 or not 0 < tolerance < 1:
            raise InputError(
                f"got regularisation {regularisation}, iterations {iterations}, tolerance {tolerance}; expected "
                "a finite number above 0, 1 or more, and a number in (0, 1)"
            )
        if draw not in get_args(Draw):
            raise InputError(f"got draw {draw!r}, expected one of {', '.join(get_args(Draw))}")
        self.regularisation, self.relative, self.draw = regularisation, relative, draw
        self.iterations, self.tolerance = iterations, tolerance

    def solve(self, batch: Batch) -> tuple[Tensor, Report]:
        """Find the plan and draw from it."""
        log_plan, report = self.log_plan(squared_distances(batch.data, batch.noise))
        uniform = _uniform(batch.draws, len(batch))
        if self.draw == "rows":
            edges = log_plan.softmax(1).cumsum(1)
            drawn = torch.searchsorted(edges, uniform[:, :1].contiguous(), right=True).flatten()
            return drawn.clamp(max=len(batch) - 1), report
        gumbel = -torch.log(-torch.log(uniform.clamp(min=2.0**-25)))  # uniform draws are multiples of 2^-24, 0 included
        return assign(-(log_plan + gumbel)), report

    def log_plan(self, cost: Tensor) -> tuple[Tensor, Report]:
        """Return the logarithm of the plan, (N, N) float64, and how the iteration ended.

        Args:
            cost: (N, N) float64 on the host, finite.

        Raises:
            ConvergenceError: the marginals are not met within the budget.
            MissingPackageError: POT is not installed.
        """
        count = len(cost)
        weight = self.regularisation * ((float(cost.mean()) or 1.0) if self.relative else 1.0)
        marginal = np.full(count, 1 / count)
        with np.errstate(over="ignore"):  # POT also returns exponentials, which nothing here reads
            _, solved = require("ot", "transport").bregman.sinkhorn_log(
                marginal,
                marginal,
                cost.numpy(),
                weight,
                numItermax=self.iterations,
                stopThr=self.tolerance / count,  # of the norm, which bounds every entry
                log=True,
                warn=False,
            )
        rows, columns = (torch.as_tensor(solved[name]) for name in ("log_u", "log_v"))
        log_plan = rows[:, None] + columns[None] - cost / weight
        error = max(float((log_plan.logsumexp(axis).exp() * count - 1).abs().max()) for axis in (0, 1))
        report = Report(int(solved["niter"]) + 1, error)
        if not error <= self.tolerance:
            raise ConvergenceError(
                f"got a Sinkhorn plan whose marginals are off by {error:.2g} of 1/N after {report.iterations} "
                f"iterations at regularisation {weight:.3g}, expected {self.tolerance:g}; raise one or the other"
            )
        return log_plan, report


def _uniform(draws: Randomness, count: int) -> Tensor:
    """Return (N, N) uniform draws in [0, 1), float64 on the host; row i belongs to sample i."""
    if isinstance(draws, torch.Generator):
        return torch.rand(count, count, generator=draws, device=draws.device).to("cpu", torch.float64)
    bound = Draws.from_torch().at(range(count)) if draws is None else draws
    return bound.uniform("coupling", (count,)).double()
