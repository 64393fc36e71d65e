"""The library ``flow_matching`` (arXiv:2412.06264): its schedulers as paths, our flows in its solver, its models here.

Its clock runs from noise (0) to data (1): its time is 1 − t, its rates and velocities are the negatives of ours.
Importing this module registers the path ``flow-matching``; the library itself is imported when one is built.

N samples; S the shape of one sample.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pathline.backbones.base import Backbone
from pathline.core.checks import as_times, require
from pathline.core.errors import InputError, InputTypeError, OpenEndError, UnknownNameError, suggest
from pathline.core.flow import BaseFlow
from pathline.core.weights import reverse_clock
from pathline.interpolants.base import Coefficients, Interpolant, registry

__all__ = ["FlowMatchingPath", "VelocityModel", "as_velocity_model", "from_velocity_model"]

_DEFAULT = "CondOTScheduler"


def _schedulers() -> tuple[type[Any], dict[str, type[Any]]]:
    """The library's base class, and its schedulers by name."""
    module = require("flow_matching.path.scheduler", "flow-matching")
    found = {
        name: item
        for name, item in vars(module).items()
        if inspect.isclass(item) and issubclass(item, module.Scheduler) and not inspect.isabstract(item)
    }
    return module.Scheduler, found


def _scheduler_class(name: str) -> type[Any]:
    """Find a scheduler by the name of its class, with or without the word Scheduler."""
    known = _schedulers()[1]
    for word in (name, f"{name}Scheduler"):
        if word in known:
            return known[word]
    raise UnknownNameError(f"unknown scheduler {name!r} of flow_matching; {suggest(name, known)}")


def _scheduler_options(given: Mapping[str, Any]) -> dict[str, inspect.Parameter]:
    """Options of the scheduler that is asked for; the default one has none."""
    name = given.get("scheduler", _DEFAULT)
    if name == _DEFAULT or not isinstance(name, str):
        return {}
    return {
        option: parameter
        for option, parameter in inspect.signature(_scheduler_class(name)).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


@registry.register("flow-matching", inherits=_scheduler_options)
class FlowMatchingPath(Interpolant):
    """A path from a scheduler of ``flow_matching``; α and σ are its own at 1 − t, the rates change their sign.

    It is evaluated in float64, whatever t's precision, and handed back in t's. Where its formula gives 0/0 at an end,
    as the rate of ``VP`` with ``beta_min=0`` at data, that end is open.

    Args:
        scheduler: a name, as ``"CosineScheduler"`` or ``"Cosine"``; or an instance of the library's ``Scheduler``.
        options: the scheduler's own: ``n`` of PolynomialConvex, ``beta_min`` and ``beta_max`` of VP.

    Raises:
        MissingPackageError: flow_matching is not installed.
        UnknownNameError: no such scheduler.
        InputTypeError: neither a name nor a scheduler.
        InputError: options that the scheduler refuses, or that leave it NaN or infinite between the ends.
    """

    def __init__(self, scheduler: Any = _DEFAULT, **options: Any) -> None:
        base, known = _schedulers()
        self.scheduler = _built(scheduler, options) if isinstance(scheduler, str) else scheduler
        if not isinstance(self.scheduler, base) or (options and not isinstance(scheduler, str)):
            raise InputTypeError(
                f"got {scheduler!r} with options {sorted(options)}, expected a Scheduler of flow_matching alone or one "
                f"of the names {', '.join(sorted(known))}"
            )
        self.straight = isinstance(self.scheduler, known[_DEFAULT])
        between = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
        if not all(bool(coefficient.isfinite().all()) for coefficient in self.evaluate(between)):
            raise InputError(
                f"got {scheduler!r} with {options}, which is NaN or infinite between the ends; change them"
            )

    def evaluate(self, t: Tensor) -> Coefficients:
        """Return the scheduler's coefficients at 1 − t, with the rates of our clock."""
        at = self.scheduler(1 - t.double())
        values = (at.alpha_t, at.sigma_t, -at.d_alpha_t, -at.d_sigma_t)
        return Coefficients(*(value.to(t.dtype) for value in values))


def _built(name: str, options: Mapping[str, Any]) -> Any:
    factory = _scheduler_class(name)
    try:
        return factory(**options)
    except (AssertionError, TypeError) as error:
        raise InputError(f"{factory.__name__} of flow_matching refuses {dict(options)}: {error}") from error


class VelocityModel(nn.Module):
    """A flow as a velocity model of ``flow_matching``: −velocity at 1 − t. Made by ``as_velocity_model``."""

    def __init__(self, flow: BaseFlow) -> None:
        super().__init__()
        self.flow = flow
        self.backbone = flow.backbone  # so that .to(device), parameters and state_dict reach the network
        self._open = [1 - end for end in flow.open_ends("velocity")]

    def forward(self, x: Tensor, t: Tensor, **extras: Any) -> Tensor:
        """Return the velocity towards data, (N, *S).

        Args:
            x: state, (N, *S).
            t: times of that library, 0 noise and 1 data, shape () or (N,); the network sees (N,). Adaptive methods of
                torchdiffeq ask beyond the last time and interpolate back: times outside [0, 1] are taken for the
                nearer end, which continues the field without a jump.
            extras: conditions, as ``label`` of shape (N,).

        Raises:
            InputError: shapes that do not fit, a state or time that is not finite.
            OpenEndError: a time at which the path has no velocity from what the flow predicts.
        """
        theirs = as_times(t).clamp(0, 1)
        for end in self._open:  # no device is read unless the path has an open end
            if bool((theirs == end).any()):
                raise OpenEndError(
                    f"got t = {end:g} in flow_matching's clock, where the {type(self.flow.interpolant).__name__} path "
                    f"has no velocity from a predicted {self.flow.predicts}; keep time_grid away from {end:g}"
                )
        return -self.flow(x, 1 - theirs, **extras).velocity


def as_velocity_model(flow: BaseFlow) -> VelocityModel:
    """Make a velocity model of a flow, guided or not, for ``flow_matching.solver.ODESolver``.

    As in ``ODESolver(as_velocity_model(flow)).sample(x_init=noise, step_size=0.05, label=labels)``: what follows the
    solver's own options reaches the backbone as conditions. Needs no package by itself.

    Raises:
        InputTypeError: not a flow.
    """
    if not isinstance(flow, BaseFlow):
        raise InputTypeError(f"got a {type(flow).__name__}, expected a flow; use Flow(backbone, interpolant)")
    return VelocityModel(flow)


class _Called(Backbone):
    """Calls a model by the names x and t, as ``ODESolver`` does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.num_classes = getattr(model, "num_classes", 0)
        self.null_label = getattr(model, "null_label", None)
        self.input_shape = getattr(model, "input_shape", None)

    def forward(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        predicted: Tensor = self.model(x=x, t=t, **conditions)
        return predicted


def from_velocity_model(model: nn.Module) -> Backbone:
    """Make a backbone of a velocity model of ``flow_matching``: −model(x=x, t=1 − t, **conditions).

    For ``Flow(from_velocity_model(model), interpolants.build("linear"))``, or the path of its training. Needs no
    package by itself.

    Args:
        model: a ``ModelWrapper`` or any ``model(x=…, t=…, **extras)`` whose t runs from noise (0) to data (1); its
            attributes ``num_classes``, ``null_label`` and ``input_shape`` are handed on where it has them.

    Raises:
        InputTypeError: not callable.
    """
    if not callable(model):
        raise InputTypeError(f"got a {type(model).__name__}, expected a model called as model(x=x, t=t)")
    return reverse_clock(_Called(model))
