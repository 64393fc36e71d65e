"""What every objective shares: draws in, loss out. Everything random comes from the draws.

N samples; S the shape of one sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pathline.core.checks import check_finite, check_labels
from pathline.core.draws import BoundDraws, Draws, send
from pathline.core.errors import InputError, InputTypeError
from pathline.core.registry import Registry
from pathline.interpolants import couplings
from pathline.interpolants.base import Interpolant
from pathline.interpolants.bridge import TwoEnded
from pathline.interpolants.couplings import CouplingSpec
from pathline.objectives import times as time_laws
from pathline.objectives.times import TimeLawSpec

__all__ = ["Loss", "Objective", "backbone_attribute", "registry", "squared_error"]


class Loss(NamedTuple):
    """A loss and what it is made of.

    Attributes:
        total: mean over N of Σ weight·term, 0-dimensional, float32; call ``backward`` on it.
        terms: name -> (N,), before their weights.
        details: name -> (N,), detached, for the log only; the first is the plain error of the prediction used to
            sample, under the name of what is predicted.
        times: (N,), detached: when the first detail was measured, for the log by time; None if there is no one time.
    """

    total: Tensor
    terms: Mapping[str, Tensor]
    details: Mapping[str, Tensor]
    times: Tensor | None = None


class Objective(ABC):
    """A training objective on a path.

    Args:
        interpolant: the path.
        times: law of the training times: a name, ``{"name": …, **options}`` or an instance.
        label_dropout: probability that a label is replaced by the backbone's null label, in [0, 1]; 0.1 as in SiT.
        coupling: how data and noise are paired, see ``interpolants.couplings``; None is the path's own, which is
            ``independent`` but for a bridge. It pairs what one device takes at once.

    Raises:
        InputError: label_dropout out of range.
        InputTypeError: the interpolant is none.
    """

    weights: Mapping[str, float]
    """Weight of each term in the total."""

    predicts: ClassVar[str] = "velocity"
    """What a network trained by this objective predicts: for ``Flow``."""

    differentiates_all: bool = True
    """Whether gradients flow back through all of its network calls, so that a step costs three forward passes."""

    takes_differences: bool = False
    """Whether its loss divides small differences of the network's outputs, which only float32 resolves."""

    def __init__(
        self,
        interpolant: Interpolant,
        *,
        times: TimeLawSpec = "uniform",
        label_dropout: float = 0.1,
        coupling: CouplingSpec | None = None,
    ) -> None:
        if not isinstance(interpolant, Interpolant):
            raise InputTypeError(
                f"got {interpolant!r} for an interpolant, expected an Interpolant; use interpolants.build(name)"
            )
        if not 0 <= label_dropout <= 1:
            raise InputError(f"got label_dropout {label_dropout}, expected a probability in [0, 1]")
        self.interpolant, self.label_dropout = interpolant, label_dropout
        self.times = time_laws.build(times).bind(interpolant)
        self.coupling = couplings.build(interpolant.coupling if coupling is None else coupling)

    def __call__(
        self,
        backbone: nn.Module,
        data: Tensor,
        draws: BoundDraws | None = None,
        *,
        features: Sequence[Tensor] = (),
        source: Tensor | None = None,
        coupling_condition: Tensor | None = None,
        **conditions: Any,
    ) -> Loss:
        """Evaluate the loss of a batch.

        Args:
            backbone: called once, ``backbone(x, t, **conditions)``.
            data: clean samples, (N, *S), any device.
            draws: source of times, noise and label dropout for N sample ids; None takes one seed from torch's
                generator and ids 0 … N − 1.
            features: encoder tokens for alignment, one (N, T, dim) tensor an encoder; not passed to the backbone.
            source: what stands at t = 1 in place of Gaussian noise, (N, *S): the other set of a two-ended path.
            coupling_condition: what a ``conditional`` coupling keeps, (N, …); not passed to the backbone.
            conditions: what the backbone takes, as ``label`` of shape (N,).

        Raises:
            InputError: wrong shapes, values out of range or not finite (values are read on the host only).
            InputTypeError: wrong types.
        """
        draws = draws or Draws.from_torch().at(range(len(data)))
        self._check(backbone, data, draws, conditions)
        noise = self._noise(draws, data) if source is None else self._source(source, data)
        if coupling_condition is not None and _ignores_conditions(self.coupling):
            raise InputError(
                f"got a coupling_condition for the coupling {type(self.coupling).__name__}, which does not use it; "
                "leave it out, or use 'conditional'"
            )
        if not isinstance(self.coupling, couplings.Independent):
            label = conditions.get("label")
            pairing = self.coupling.pair(data, noise, label=label, condition=coupling_condition, draws=draws)
            noise = noise[pairing.indices.to(noise.device)]
        kept = self._drop_labels(backbone, draws, conditions)
        return self.loss(backbone, data, noise, draws, tuple(features), kept)

    @property
    def mixes_samples(self) -> bool:
        """Whether a sample's loss depends on the others taken at once, so that how a batch is cut up matters."""
        return not isinstance(self.coupling, couplings.Independent)

    @abstractmethod
    def loss(
        self,
        backbone: nn.Module,
        data: Tensor,
        noise: Tensor,
        draws: BoundDraws,
        features: tuple[Tensor, ...],
        conditions: Mapping[str, Any],
    ) -> Loss:
        """Evaluate the loss of checked inputs; labels have been dropped."""

    def combine(self, terms: Mapping[str, Tensor], details: Mapping[str, Tensor], times: Tensor | None = None) -> Loss:
        """Return the loss of weighted terms: the mean over samples of Σ weight·term."""
        total = sum((self.weights[name] * term for name, term in terms.items()), start=torch.zeros(()))
        plain = {name: value.detach() for name, value in details.items()}
        return Loss(total.mean(), terms, plain, None if times is None else times.detach())

    @staticmethod
    def _noise(draws: BoundDraws, data: Tensor) -> Tensor:
        return send(draws.normal("noise", data.shape[1:]), data.device).to(data)

    def _source(self, source: Tensor, data: Tensor) -> Tensor:
        if not isinstance(self.interpolant, TwoEnded):
            raise InputError(
                f"got a source on the {type(self.interpolant).__name__} path, whose other end is Gaussian noise; "
                "use interpolant 'two-ended', 'stochastic' or 'bridge'"
            )
        if source.shape != data.shape or not source.is_floating_point():
            came = f"{source.dtype} {tuple(source.shape)}"
            raise InputError(f"got a source {came}, expected floats of the data's shape {tuple(data.shape)}")
        if source.device.type == "cpu":
            check_finite(source, "the source")
        return source.to(data)

    def _check(self, backbone: nn.Module, data: Tensor, draws: BoundDraws, conditions: Mapping[str, Any]) -> None:
        if not isinstance(data, Tensor) or not data.is_floating_point() or data.ndim < 2 or not len(data):
            came = f"{data.dtype} {tuple(data.shape)}" if isinstance(data, Tensor) else type(data).__name__
            raise InputTypeError(f"got data {came}, expected a floating-point tensor (N, *S) with N > 0")
        if len(draws) != len(data):
            raise InputError(f"got draws for {len(draws)} samples beside {len(data)}; bind one sample id a sample")
        if data.device.type == "cpu":
            check_finite(data, "data")
        label, num_classes = conditions.get("label"), backbone_attribute(backbone, "num_classes")
        if label is not None and num_classes is not None:
            check_labels(label, len(data), num_classes, null=backbone_attribute(backbone, "null_label") is not None)

    def _drop_labels(self, backbone: nn.Module, draws: BoundDraws, conditions: Mapping[str, Any]) -> dict[str, Any]:
        """Replace labels by the null label with the probability label_dropout (arXiv:2207.12598)."""
        kept = dict(conditions)
        label = kept.get("label")
        if label is None or not self.label_dropout:
            return kept
        null = backbone_attribute(backbone, "null_label")
        if null is None:
            raise InputError(
                f"got labels and label_dropout {self.label_dropout} for a backbone without a null label; "
                "set label_dropout=0, or give the backbone a null label"
            )
        dropped = draws.uniform("label dropout") < self.label_dropout
        kept["label"] = label.masked_fill(send(dropped, label.device), null)
        return kept


registry: Registry[Objective] = Registry("objective", "objectives", Objective)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each sample, (N,), in float32 or wider whatever the network's precision."""
    if prediction.shape != target.shape:
        raise InputError(
            f"got a prediction of shape {tuple(prediction.shape)} from the backbone, expected {tuple(target.shape)}"
        )
    precision = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(precision) - target).square().flatten(1).mean(1)


def _ignores_conditions(coupling: couplings.Coupling) -> bool:
    """Whether a coupling of the core pairs without a look at conditions; of others nothing is known."""
    if isinstance(coupling, couplings.ClassConditional):
        return _ignores_conditions(coupling.within)
    return type(coupling) in (couplings.Independent, couplings.Exact, couplings.Partial, couplings.Sinkhorn)


def backbone_attribute(backbone: nn.Module, name: str) -> Any:
    """Read a backbone's attribute, through a data-parallel wrapper if there is one."""
    return getattr(backbone, name, getattr(getattr(backbone, "module", None), name, None))
