"""What every coupling shares: checks, costs, and the pairing that comes out.

A coupling returns indices; ``noise[indices]`` goes with ``data``, whose order, labels and ids stay. It is solved in
float64 on the host, on copies. All but ``independent`` depend on the batch: on what one device takes at once.

N samples; S the shape of one sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from pathline.core.checks import check_finite, require
from pathline.core.draws import BoundDraws
from pathline.core.errors import InputError, InputTypeError
from pathline.core.registry import Registry

__all__ = [
    "Batch",
    "Coupling",
    "CouplingSpec",
    "Pairing",
    "Randomness",
    "Report",
    "assign",
    "registry",
    "squared_distances",
]

Randomness = BoundDraws | torch.Generator | None


@dataclass(frozen=True)
class Batch:
    """What a coupling pairs, checked; the fields are those of ``Coupling.pair``."""

    data: Tensor
    noise: Tensor
    label: Tensor | None = None
    condition: Tensor | None = None
    draws: Randomness = None

    def __len__(self) -> int:
        return len(self.data)


class Report(NamedTuple):
    """How an iterative solve ended.

    Attributes:
        iterations: made.
        marginal_error: largest difference of a row or column sum of the plan from 1/N, times N.
    """

    iterations: int
    marginal_error: float


@dataclass(frozen=True)
class Pairing:
    """A pairing of a batch.

    Attributes:
        indices: (N,) int64 on the host; ``noise[indices]`` goes with ``data``.
        cost: mean squared distance of the pairs.
        report: of Sinkhorn's iteration; None elsewhere.
    """

    indices: Tensor
    cost: float
    report: Report | None = None


class Coupling(ABC):
    """A rule that pairs data and noise. A subclass implements ``solve``."""

    def pair(
        self,
        data: Tensor,
        noise: Tensor,
        *,
        label: Tensor | None = None,
        condition: Tensor | None = None,
        draws: Randomness = None,
    ) -> Pairing:
        """Pair a batch.

        Args:
            data: (N, *S), any float type and device; untouched.
            noise: (N, *S), or a source of that shape; untouched.
            label: (N,) integers, for couplings that keep classes apart; the others need none.
            condition: (N, …) floats that belong to the data, for couplings that keep conditions.
            draws: what a random coupling draws from: bound draws (keyed by sample ids), a torch generator, or None for
                a seed from torch's global generator.

        Raises:
            InputError: shapes that differ, values that are not finite, labels or conditions missing.
            InputTypeError: not tensors of the type above.
            ConvergenceError: an iteration that did not converge.
            MissingPackageError: scipy or POT is not installed.
        """
        for value, what in ((data, "data"), (noise, "noise")):
            _check_floats(value, what)
        if data.shape != noise.shape or not data.numel():
            raise InputError(
                f"got data {tuple(data.shape)} and noise {tuple(noise.shape)}, expected one shape (N, *S) with N > 0"
            )
        if isinstance(draws, BoundDraws) and len(draws) != len(data):
            raise InputError(f"got draws for {len(draws)} samples beside {len(data)}; bind one sample id a sample")
        _check_labels(label, len(data))
        _check_condition(condition, len(data))
        solved = self.solve(Batch(data, noise, label, condition, draws))
        indices, report = solved if isinstance(solved, tuple) else (solved, None)
        indices = indices.cpu()
        distances = (_flat(data) - _flat(noise)[indices]).square().sum(1)
        return Pairing(indices, float(distances.mean()), report)

    @abstractmethod
    def solve(self, batch: Batch) -> Tensor | tuple[Tensor, Report]:
        """Return (N,) int64 indices, and a report if the solve is iterative."""


registry: Registry[Coupling] = Registry("coupling", "interpolants.couplings", Coupling)

CouplingSpec = Annotated[Coupling | str | Mapping[str, Any], registry]


def squared_distances(data: Tensor, noise: Tensor) -> Tensor:
    """Return ‖data_i − noise_j‖², (N, N) float64 on the host; rounded at 1e-16 of the largest.

    Raises:
        InputError: distances too large for float64.
    """
    first, second = _flat(data), _flat(noise)
    center = second.mean(0)  # a common offset would cancel in the differences below
    first, second = first - center, second - center
    norms = first.square().sum(1)[:, None] + second.square().sum(1)[None]
    cost = (norms - 2 * first @ second.T).clamp(min=0)
    check_finite(cost, "the squared distances")
    return cost


def assign(cost: Tensor) -> Tensor:
    """Return the column of each row, (N,) int64, in the assignment of least total cost.

    Args:
        cost: (N, N) float64 on the host, finite.

    Raises:
        MissingPackageError: scipy is not installed.
    """
    columns = require("scipy.optimize", "transport").linear_sum_assignment(cost.numpy())[1]
    return torch.as_tensor(columns, dtype=torch.int64)


def _flat(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float64).reshape(len(x), -1)


def _check_floats(value: Any, what: str) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.ndim:
        came = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputTypeError(f"got {what} {came}, expected a floating-point tensor (N, …); call .float()")
    check_finite(value, what)


def _check_labels(label: Any, count: int) -> None:
    if label is None:
        return
    if not isinstance(label, Tensor) or label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
        came = label.dtype if isinstance(label, Tensor) else type(label).__name__
        raise InputTypeError(f"got labels of type {came}, expected an integer tensor; call label.long()")
    if label.shape != (count,):
        raise InputError(f"got labels of shape {tuple(label.shape)}, expected ({count},): one label a sample")


def _check_condition(condition: Any, count: int) -> None:
    if condition is None:
        return
    _check_floats(condition, "the condition")
    if len(condition) != count:
        raise InputError(f"got {len(condition)} conditions for {count} samples; pass condition=… of shape (N, …)")
