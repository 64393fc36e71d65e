"""A flow: a backbone on a path, as samplers see it. One call is one network evaluation.

N samples; S the shape of one sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from pathline.core.checks import check_finite, check_labels, check_times
from pathline.core.errors import InputError, InputTypeError
from pathline.interpolants.base import Coefficients, Interpolant, Kind, broadcast, check_kinds

__all__ = ["BaseFlow", "Flow", "Prediction", "Spent", "check_path"]

Conditions = Mapping[str, Any]
Mix = Callable[[Tensor], Tensor]


@dataclass
class Spent:
    """What was spent on a network so far: its calls, and the transformer blocks that they ran."""

    calls: int = 0
    blocks: int = 0


class Prediction:
    """What a network says at (x, t), as velocity, score, noise or data, each of shape (N, *S).

    Each is computed when first asked for, in x's precision.

    Attributes:
        single: whether ``value`` is all there is, so that any other kind is affine in it and x.
    """

    single: ClassVar[bool] = True

    def __init__(self, value: Tensor, x: Tensor, t: Tensor, interpolant: Interpolant, kind: Kind = "velocity") -> None:
        self.value, self.x, self.t, self.interpolant, self.kind = value, x, t, interpolant, kind

    @cached_property
    def coefficients(self) -> Coefficients:
        """The path's coefficients at t, shaped to multiply x."""
        return Coefficients(*(broadcast(c, self.x) for c in self.interpolant.evaluate(self.t)))

    def _as(self, target: Kind) -> Tensor:
        if target == self.kind:
            return self.value
        return self.interpolant.derive(self.value, self.x, self.coefficients, self.kind, target)

    def mixed(self, mix: Mix, x: Tensor, t: Tensor) -> Prediction:
        """Return the prediction at (x, t) whose raw values are ``mix`` of these; for guidance, which is affine."""
        return Prediction(mix(self.value), x, t, self.interpolant, self.kind)

    def affine(self, weights: Mapping[Kind, float], at: Callable[[], Coefficients]) -> tuple[float, float] | None:
        """Return (p, q) such that Σ weight·quantity = p·x + q·value, for solvers that update a state at once.

        Args:
            weights: quantity -> its weight in the sum.
            at: gives the path's coefficients at t as numbers; called where they are needed.

        Returns:
            None for a prediction that is not ``single``.
        """
        if not self.single:
            return None
        p = q = 0.0
        for target, weight in weights.items():
            if target == self.kind:
                q += weight
            else:
                zero, one = cast(Tensor, 0.0), cast(Tensor, 1.0)
                p += weight * float(self.interpolant.derive(zero, one, at(), self.kind, target))
                q += weight * float(self.interpolant.derive(one, zero, at(), self.kind, target))
        return p, q

    @cached_property
    def velocity(self) -> Tensor:
        """Expected dx/dt given x."""
        return self._as("velocity")

    @cached_property
    def score(self) -> Tensor:
        """∇ log p_t(x)."""
        return self._as("score")

    @cached_property
    def noise(self) -> Tensor:
        """Expected noise given x."""
        return self._as("noise")

    @cached_property
    def data(self) -> Tensor:
        """Expected data given x."""
        return self._as("data")


class BaseFlow(ABC):
    """What a solver needs of a flow; guidance gives flows of this form back."""

    interpolant: Interpolant
    backbone: nn.Module
    predicts: Kind

    @property
    @abstractmethod
    def nfe(self) -> int:
        """Network calls made so far; a guided call on a doubled batch is one."""

    @property
    def block_evaluations(self) -> int | None:
        """Transformer blocks run so far, or None if the network does not tell its ``depth``.

        A block of a call on a doubled batch counts once. Only the trunk's blocks count: not embeddings and heads, nor
        what stands between blocks, as DeepFlow's VeRA.
        """
        return None

    @abstractmethod
    def evaluate(self, x: Tensor, t: Tensor, conditions: Conditions) -> Prediction:
        """Evaluate without checks: t (N,) on x's device, or () on the host. For loops; others call the flow."""

    @abstractmethod
    def check(self, x: Tensor, conditions: Conditions) -> None:
        """Check state and conditions once, before a solve. Raises InputError or InputTypeError."""

    @abstractmethod
    def given(self, **conditions: Any) -> BaseFlow:
        """Return this flow with conditions bound, as ``flow.given(label=labels)``."""

    @property
    def bound(self) -> Conditions:
        """Conditions bound by ``given``, to this flow or one inside it."""
        return {}

    def begin(self) -> BaseFlow:
        """Return this flow at the start of a trajectory: itself, but for one that remembers earlier calls."""
        return self

    @property
    def remembers(self) -> bool:
        """Whether an evaluation depends on earlier ones of the trajectory, as guidance with momentum does."""
        return False

    def open_ends(self, target: str) -> tuple[float, ...]:
        """List the ends of [0, 1] at which ``target`` cannot be had from what this flow predicts.

        Raises:
            InputError: it can be had nowhere.
        """
        return self.interpolant.open_ends(self.predicts, target)

    def __call__(self, x: Tensor, t: Tensor | float, **conditions: Any) -> Prediction:
        """Evaluate the network once.

        Args:
            x: state x_t, shape (N, *S).
            t: times in [0, 1], shape (N,) or ().
            conditions: named tensors for the backbone, as ``label`` of shape (N,).

        Raises:
            InputError: wrong shapes, values out of range, or not finite.
        """
        self.check(x, conditions)
        times = check_times(t, len(x))
        return self.evaluate(x, times.to(x.device) if times.ndim else times, conditions)


class Flow(BaseFlow):
    """A backbone on a path.

    Args:
        backbone: ``backbone(x, t, **conditions)`` of x's shape; see ``pathline.backbones``.
        interpolant: the path it was trained on.
        predicts: what it predicts: ``velocity``, ``score``, ``noise`` or ``data``.

    Attributes:
        depth: transformer blocks that one call of the network runs; None if it does not tell.
    """

    def __init__(self, backbone: nn.Module, interpolant: Interpolant, predicts: Kind = "velocity") -> None:
        if not callable(backbone):
            raise InputTypeError(f"got a {type(backbone).__name__} for a backbone, expected a module")
        check_kinds(predicts)
        check_path(interpolant).check_conversion(predicts, predicts)
        self.backbone, self.interpolant, self.predicts = backbone, interpolant, predicts
        depth = getattr(backbone, "depth", None)
        self.depth: int | None = depth if isinstance(depth, int) else None
        self._bound: dict[str, Any] = {}
        self._spent = Spent()

    @property
    def nfe(self) -> int:
        """Network calls made so far, those of bound copies included."""
        return self._spent.calls

    @property
    def block_evaluations(self) -> int | None:
        """See ``BaseFlow``; those of bound copies included."""
        return None if self.depth is None else self._spent.blocks

    @property
    def bound(self) -> Conditions:
        """See ``BaseFlow``."""
        return self._bound

    def given(self, **conditions: Any) -> Flow:
        """Return this flow with conditions bound; those given later at a call go first."""
        bound = Flow(self.backbone, self.interpolant, self.predicts)
        bound._bound, bound._spent = {**self._bound, **conditions}, self._spent
        return bound

    def check(self, x: Tensor, conditions: Conditions) -> None:
        """Check that x is finite and of the backbone's shape and that labels are in range."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            came = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise InputTypeError(f"got a state of type {came}, expected a floating-point tensor of shape (N, *S)")
        shape = getattr(self.backbone, "input_shape", None)
        if x.ndim < 1 or (shape is not None and tuple(x.shape[1:]) != tuple(shape)):
            wanted = "(N, *S)" if shape is None else f"(N, {', '.join(map(str, shape))})"
            raise InputError(f"got a state of shape {tuple(x.shape)}, expected {wanted}")
        check_finite(x, "the state")
        label = {**self._bound, **conditions}.get("label")
        num_classes = getattr(self.backbone, "num_classes", None)
        if label is not None and num_classes is not None:
            null = getattr(self.backbone, "null_label", None) is not None
            check_labels(label, len(x), num_classes, null=null)

    def evaluate(self, x: Tensor, t: Tensor, conditions: Conditions) -> Prediction:
        """Call the network in its own precision; the prediction comes back in x's."""
        given, times = self._given(x, t)
        value = self._taken(self.backbone(given, times, **{**self._bound, **conditions}), given, x)
        self._spent.calls += 1
        self._spent.blocks += self.depth or 0
        return Prediction(value, x, t, self.interpolant, self.predicts)

    def call(
        self, network: Callable[[Tensor, Tensor], tuple[Tensor, ...]], x: Tensor, t: Tensor, blocks: int
    ) -> tuple[Tensor, ...]:
        """Make and count one network call as ``evaluate`` does, for flows that ask their backbone for something else.

        Args:
            network: (x, t) -> values of x's shape; called in the network's precision, t of shape (N,) on x's device.
            x: state, (N, *S).
            t: times, (N,) or ().
            blocks: transformer blocks that the call runs.

        Raises:
            InputError: a value of another shape than x.
        """
        given, times = self._given(x, t)
        values = tuple(self._taken(value, given, x) for value in network(given, times))
        self._spent.calls += 1
        self._spent.blocks += blocks
        return values

    def _given(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the state, and the times of its samples, in the network's precision."""
        dtype, precision = self._network_types
        precision = precision or x.dtype
        if t.ndim == 0 and t.device.type == "cpu":
            times = torch.full(x.shape[:1], float(t), dtype=precision, device=x.device)
        else:
            times = t.to(x.device, precision).expand(x.shape[0])
        return (x if dtype in (None, x.dtype) else x.to(dtype)), times

    def _taken(self, value: Tensor, given: Tensor, x: Tensor) -> Tensor:
        """Return what the network said of ``given``, in x's precision."""
        if value.shape != given.shape:
            raise InputError(
                f"got a prediction of shape {tuple(value.shape)} from the backbone, expected {tuple(x.shape)}"
            )
        return value if value.dtype == x.dtype else value.to(x.dtype)

    @cached_property
    def _network_types(self) -> tuple[torch.dtype | None, torch.dtype | None]:
        """Precision of the backbone's parameters and of its times; None without parameters: the state's own."""
        parameters = getattr(self.backbone, "parameters", None)
        floats = (p.dtype for p in parameters() if p.is_floating_point()) if parameters else iter(())
        dtype = next(floats, None)
        return dtype, torch.promote_types(dtype, torch.float32) if dtype else None


def check_path(interpolant: Any) -> Interpolant:
    """Return ``interpolant``; raise InputTypeError if it is none."""
    if not isinstance(interpolant, Interpolant):
        raise InputTypeError(
            f"got {interpolant!r} for an interpolant, expected an Interpolant; use interpolants.build(name)"
        )
    return interpolant
