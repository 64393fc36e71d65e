"""A flow with its divergence: samples in rows, behind them the integrals that a likelihood needs.

The divergence is estimated by div v = E[εᵀ·∂v/∂x·ε], ε a probe of mean 0 and covariance 1 (arXiv:1810.01367, 3.1).

N samples; S the shape of one sample, D its number of values; k probes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pathline.core.draws import Draws
from pathline.core.errors import InputError
from pathline.core.flow import BaseFlow, Conditions, Prediction

__all__ = ["DivergenceFlow", "Probe", "draw_probes"]

Probe = Literal["rademacher", "gaussian"]


def draw_probes(x: Tensor, count: int, probe: Probe, seed: int, ids: Sequence[int] | Tensor) -> Tensor:
    """Return probes for samples (N, *S), (k, N, D): a function of (seed, sample id, number), whatever the count."""
    draws, size = Draws(seed), math.prod(x.shape[1:])
    if probe == "gaussian":
        drawn = [draws.normal("probe", ids, (size,), counter=i) for i in range(count)]
    else:
        drawn = [draws.uniform("probe", ids, (size,), counter=i).lt(0.5).float() * 2 - 1 for i in range(count)]
    return torch.stack(drawn).to(x)


class DivergenceFlow(BaseFlow):
    """A flow of states (N, D + k), for any ODE solver: samples in rows, behind them an integral for each probe.

    Args:
        flow: of samples (N, *S).
        shape: S.
        probes: (k, N, D), the same in every call of a solve; None for the exact divergence.
        gradients: keep the graph.
    """

    def __init__(self, flow: BaseFlow, shape: tuple[int, ...], probes: Tensor | None, gradients: bool) -> None:
        self.flow, self.shape, self.probes, self.gradients = flow, shape, probes, gradients
        self.interpolant, self.backbone, self.predicts = flow.interpolant, flow.backbone, flow.predicts
        self.size, self.count = math.prod(shape), 1 if probes is None else len(probes)

    @property
    def nfe(self) -> int:
        """See ``BaseFlow``."""
        return self.flow.nfe

    def given(self, **conditions: Any) -> DivergenceFlow:
        """See ``BaseFlow``."""
        return DivergenceFlow(self.flow.given(**conditions), self.shape, self.probes, self.gradients)

    def begin(self) -> DivergenceFlow:
        """See ``BaseFlow``."""
        return DivergenceFlow(self.flow.begin(), self.shape, self.probes, self.gradients)

    def check(self, x: Tensor, conditions: Conditions) -> None:
        """See ``BaseFlow``."""
        self.flow.check(self.split(x)[0], conditions)

    def open_ends(self, target: str) -> tuple[float, ...]:
        """See ``BaseFlow``."""
        return self.flow.open_ends(target)

    def begun(self, x: Tensor) -> Tensor:
        """Return samples with integrals of 0."""
        return torch.cat((x.reshape(len(x), self.size), x.new_zeros(len(x), self.count)), 1)

    def split(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return samples (N, *S) and integrals (N, k)."""
        return state[:, : self.size].reshape(-1, *self.shape).contiguous(), state[:, self.size :]

    def evaluate(self, x: Tensor, t: Tensor, conditions: Conditions) -> Prediction:
        """Call the network once; the divergence comes from its graph."""
        sample, _ = self.split(x)
        with torch.enable_grad():
            sample = sample if self.gradients and sample.requires_grad else sample.detach().requires_grad_()
            velocity = self.flow.evaluate(sample, t, conditions).velocity
            if not velocity.requires_grad:
                raise InputError(
                    "got a velocity without a graph, so that it cannot be differentiated; let the backbone run without "
                    "no_grad or detach, and write one that does not depend on x as 0 * x + …"
                )
            change = torch.cat((velocity.reshape(len(x), self.size), self._divergence(velocity, sample)), 1)
        return Prediction(change if self.gradients else change.detach(), x, t, self.interpolant)

    def _divergence(self, velocity: Tensor, sample: Tensor) -> Tensor:
        """Return εᵀ·∂v/∂x·ε for each probe, (N, k), or the trace of ∂v/∂x, (N, 1)."""
        rows = velocity.reshape(len(sample), self.size)
        if self.probes is None:
            columns = (self._product(rows[:, i].sum(), sample)[:, i] for i in range(self.size))
            return sum(columns, start=rows.new_zeros(len(rows))).unsqueeze(1)
        return torch.stack([(self._product((rows * e).sum(), sample) * e).sum(1) for e in self.probes], 1)

    def _product(self, projected: Tensor, sample: Tensor) -> Tensor:
        """Return the gradient of a sum over samples, each of which depends on its own x alone, (N, D)."""
        (gradient,) = torch.autograd.grad(
            projected, sample, retain_graph=True, create_graph=self.gradients, materialize_grads=True
        )
        return gradient.reshape(len(sample), self.size)
