"""Bits per dimension of data under a flow.

N samples; S the shape of one, D its number of values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pathline.core.draws import BoundDraws
from pathline.core.errors import InputError
from pathline.core.flow import BaseFlow
from pathline.interpolants.bridge import TwoEnded
from pathline.metrics.models import COLOURS, Measured, ModelMetric, register
from pathline.solvers import Solver
from pathline.solvers.likelihood import Dequantization, log_likelihood

if TYPE_CHECKING:  # an optional package
    from matplotlib.axes import Axes

__all__ = ["BitsPerDimension"]

_BITS, _CALLS = "bits per dimension", "network calls"


@register("bits-per-dimension")
class BitsPerDimension(ModelMetric):
    """Bits per dimension −log₂ P(data)/D along the flow's ODE, mean over samples with its standard error.

    Data of ``levels`` are dequantised: each value gets uniform noise over the bin about it, one draw a sample, so that
    the mean is an upper bound of −log₂ P/D in expectation (arXiv:1511.01844). Without levels it is that of the density
    in the data's unit, and compares with no other unit. The second row is the number of network calls of a solve; each
    has one vector–Jacobian product a probe beside it, or D if the divergence is exact.

    Args:
        solver: of the ODE: a name, ``{"name": …, **options}`` or an instance; see ``log_likelihood``, as the rest.
        levels: number of equally spaced values that the data may take: 256 for images, 17 for ``digits``; None for
            continuous data, as latents.
        interval: lowest and highest level.
        probes: of the estimate of the divergence.
        exact: compute the divergence exactly instead.

    Raises:
        InputError: levels, an interval or probes that cannot be.
    """

    title = "bits per dimension"
    by_time = False

    def __init__(
        self,
        *,
        solver: str | Mapping[str, Any] | Solver = "dopri5",
        levels: int | None = 256,
        interval: tuple[float, float] = (-1.0, 1.0),
        probes: int = 1,
        exact: bool = False,
    ) -> None:
        super().__init__()
        if levels is not None:
            Dequantization(levels, (interval[0], interval[1]))  # which checks both
        if not exact and (isinstance(probes, bool) or probes < 1):
            raise InputError(f"got probes {probes!r}, expected a whole number of 1 or more")
        self.solver, self.levels, self.interval = solver, levels, (interval[0], interval[1])
        self.probes, self.exact = probes, exact
        named = solver if isinstance(solver, str) else type(solver).__name__
        named = str(solver.get("name")) if isinstance(solver, Mapping) else named
        of = "continuous data" if levels is None else f"{levels} levels, uniformly dequantised"
        divergence = "exact divergence" if exact else f"{probes} Rademacher probe{'s' if probes > 1 else ''}"
        self.metric = f"bits-per-dimension, {of}, {named}, {divergence}"
        self.about = "-log2 p(data)/D" + ("" if levels is None else ", an upper bound in expectation")
        self.unit = f"bits; {_CALLS} in their row"

    def check(self, flow: BaseFlow) -> None:
        """Refuse flows that have no likelihood: of paths between two data sets, or with momentum."""
        if isinstance(flow.interpolant, TwoEnded) or flow.remembers:
            with_momentum = " with momentum" if flow.remembers else ""
            raise InputError(
                f"got a flow on the {type(flow.interpolant).__name__} path{with_momentum}, which has no likelihood "
                "here; give one from noise to data, without momentum"
            )

    def measure(self, flow: BaseFlow, data: Tensor, conditions: Mapping[str, Any], draws: BoundDraws) -> Measured:
        """Integrate the samples from data to noise."""
        found = log_likelihood(
            flow,
            data,
            solver=self.solver,
            probes=1 if self.exact else self.probes,
            exact=self.exact,
            levels=self.levels,
            interval=self.interval,
            seed=draws.draws.seed,
            sample_ids=draws.ids,
            **conditions,
        )
        calls = torch.full((len(data), 1), float(found.nfe))
        return Measured(torch.zeros(1), {_BITS: found.bits_per_dimension[:, None], _CALLS: calls})

    def plot(self, axes: Axes) -> None:
        """Draw the mean with one standard error either side: there is no other time than that of data."""
        record = self.compute()
        row = record.row(_BITS)
        axes.errorbar([0], [row.mean], yerr=[row.error], fmt="o", color=COLOURS[0], capsize=4)
        axes.set_title(self.title, loc="left", fontweight="bold")
        axes.set_title(f"{record.count} samples", loc="right", fontsize="small", color="0.4")
        axes.set_xticks([0], [f"{row.mean:.4g} ± {row.error:.2g}"])
        axes.set_ylabel("bits", color="0.4")
