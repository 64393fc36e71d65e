"""Our solvers as a scheduler that the pipelines of ``diffusers`` can call.

A pipeline calls its network itself and hands the output to ``scheduler.step``; our solvers call the network. The two
meet in a thread: the solver runs there, stops at every network call, and goes on with what the pipeline hands in. Any
solver with a number of steps works so, whatever it calls and draws in a step.

The clock is diffusers' own for flow models: a timestep is ``num_train_timesteps``·t, data at 0, noise at 1000.

N samples; S the shape of one sample.
"""

from __future__ import annotations

import json
import math
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from copy import deepcopy
from functools import cache
from queue import SimpleQueue
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from pathline import backbones, interpolants, solvers
from pathline.core.checks import require
from pathline.core.errors import InputError, InputTypeError, SolverError
from pathline.core.flow import Flow
from pathline.interpolants.base import Interpolant, Kind, check_kinds
from pathline.solvers.base import FixedStep, Solver

__all__ = ["SolverScheduler", "scheduler"]

_PROBE_STEPS = 2  # to check a solver's options before a number of steps is known


def scheduler(
    solver: str | Mapping[str, Any] = "euler",
    *,
    interpolant: str | Mapping[str, Any] = "linear",
    predicts: Kind = "velocity",
    num_train_timesteps: int = 1000,
    **options: Any,
) -> Any:
    """Make a diffusers scheduler of a solver, as ``DDPMPipeline(unet, scheduler("heun"))``.

    Args:
        solver: a solver with a number of steps, by name or as ``{"name": …, **options}``; without ``steps``, which
            ``set_timesteps`` gives.
        interpolant: the path that the network was trained on, by name or mapping.
        predicts: what the network predicts: ``velocity`` (noise − data, as diffusers' flow models), ``score``,
            ``noise`` or ``data``.
        num_train_timesteps: the timestep of pure noise, above 0; 1000 in diffusers.
        options: further options of the solver, as ``grid``, ``start`` and ``end``. A solve from partly noised data
            (image to image) is one with ``start`` below 1.

    Returns:
        A ``FlowScheduler``: a ``SolverScheduler`` that is also a ``SchedulerMixin`` and a ``ConfigMixin``.

    Raises:
        MissingPackageError: diffusers is not installed.
        UnknownNameError, UnknownOptionError: of solver, path or prediction.
        InputError, InputTypeError: options that do not fit, or that a configuration file cannot hold.
    """
    named = _named(solver) if isinstance(solver, str | Mapping) else {"name": solver}
    return _scheduler_class()({**named, **options}, interpolant, predicts, num_train_timesteps)


class _Stopped(Exception):
    """Raised in the solver's thread when nobody waits for its result any more."""


class _Handed(NamedTuple):
    """What the solver's thread hands out: a state, and whether it is the result."""

    x: Tensor
    last: bool


class _Solve:
    """A solve in its own thread that stops at every network call until ``answer`` gives the network's output."""

    def __init__(self, solver: Solver, interpolant: Interpolant, predicts: Kind, x: Tensor, seed: int | None) -> None:
        self._handed: SimpleQueue[_Handed | Exception] = SimpleQueue()  # reentrant, as finalizers need
        self._answers: SimpleQueue[Tensor | None] = SimpleQueue()
        self._finalizer: weakref.finalize[Any, Any] | None = None
        flow = Flow(backbones.wrap(self._ask), interpolant, predicts)
        stream = torch.cuda.current_stream(x.device) if x.is_cuda else None  # threads do not inherit it
        self._thread = threading.Thread(
            target=self._work, args=(solver, flow, x, seed, stream), name="pathline-scheduler", daemon=True
        )
        self._thread.start()

    def _work(self, solver: Solver, flow: Flow, x: Tensor, seed: int | None, stream: Any) -> None:
        try:
            with torch.cuda.stream(stream) if stream is not None else nullcontext():
                self._handed.put(_Handed(solver.solve(flow, x, seed=seed).x, last=True))
        except _Stopped:
            pass
        except Exception as error:  # raised again in the caller's thread
            self._handed.put(error)

    def _ask(self, x: Tensor, t: Tensor) -> Tensor:
        self._handed.put(_Handed(x, last=False))
        answer = self._answers.get()
        if answer is None:
            raise _Stopped
        return answer

    def end_with(self, owner: object) -> None:
        """Close when ``owner`` is dropped."""
        self._finalizer = weakref.finalize(owner, self.close)

    def answer(self, output: Tensor) -> None:
        """Give the network's output for the state handed out last."""
        self._answers.put(output)

    def receive(self) -> _Handed:
        """Wait for the next network call or the result; what the solver raises is raised here."""
        handed = self._handed.get()
        if isinstance(handed, Exception):
            self.close()
            raise handed
        return handed

    def close(self) -> None:
        """End the thread, wherever it stands."""
        if self._finalizer is not None:
            self._finalizer.detach()
        self._answers.put(None)
        if threading.current_thread() is not self._thread:  # where a collection of garbage may happen
            self._thread.join()


class SolverScheduler:
    """What a diffusers pipeline calls: ``set_timesteps`` once, then ``step`` for each of ``timesteps``.

    Built by ``scheduler``. The state lies in the solver's thread, in float32 or wider whatever the sample's precision;
    a ``step`` takes the sample that the last one returned, and refuses another.

    Attributes:
        timesteps: the timesteps at which the solver calls the network, float32; (0,) before ``set_timesteps``. A
            solver with two calls a step has two for each.
        order: network calls a step, as diffusers counts them.
        init_noise_sigma: 1: a solve starts from standard normal noise.
        num_inference_steps: steps of the solver; None before ``set_timesteps``.
    """

    init_noise_sigma: ClassVar[float] = 1.0
    config: Any
    register_to_config: Callable[..., None]
    _output: ClassVar[Any]

    def __init__(
        self,
        solver: str | Mapping[str, Any] = "euler",
        interpolant: str | Mapping[str, Any] = "linear",
        predicts: Kind = "velocity",
        num_train_timesteps: int = 1000,
    ) -> None:
        solver, interpolant = _plain(solver, "solver"), _plain(interpolant, "interpolant")
        if "steps" in solver:
            raise InputError("got steps for a scheduler; leave it out and call set_timesteps(num_inference_steps)")
        if isinstance(num_train_timesteps, bool) or not 0 < num_train_timesteps < math.inf:
            raise InputError(f"got num_train_timesteps {num_train_timesteps}, expected a finite number above 0")
        check_kinds(predicts)
        self.register_to_config(
            solver=solver, interpolant=interpolant, predicts=predicts, num_train_timesteps=num_train_timesteps
        )
        self._spec, self._predicts, self._scale = deepcopy(solver), predicts, num_train_timesteps
        self._interpolant = interpolants.build(interpolant)
        self._solver: FixedStep = self._build(_PROBE_STEPS)
        self.order = self._solver.calls_per_step
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0)
        self._times: list[float] = []
        self._solve: _Solve | None = None
        self._position = 0
        self._returned: Tensor | None = None
        self._finite: list[Tensor] = []

    def __len__(self) -> int:
        return int(self._scale)

    def _build(self, steps: int) -> FixedStep:
        built = solvers.build({**self._spec, "steps": steps})
        if not isinstance(built, FixedStep):
            raise InputTypeError(
                f"got solver {self._spec['name']!r}, which chooses its times itself; use one with steps"
            )
        return built

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Start anew with a number of steps N ≥ 1; an unfinished solve is given up.

        Raises:
            InputError: a number of steps that the solver cannot take.
            OpenEndError: the path lacks what the solver needs at a time it evaluates.
        """
        self._end()
        self._solver = self._build(num_inference_steps)
        still = Flow(backbones.wrap(lambda x, t: torch.zeros_like(x)), self._interpolant, self._predicts)
        times = self._solver.solve(still, torch.zeros(1, 1, dtype=torch.float64), seed=0).times
        self.num_inference_steps, self._position = num_inference_steps, 0
        timesteps = (times * self._scale).float()
        self._times, self.timesteps = timesteps.tolist(), timesteps.to(device)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """Return the sample as it is: flow models take x_t itself."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Hand the network's output in and return the sample for its next call, or the result.

        Args:
            model_output: the network's output for ``sample`` at ``timestep``, (N, *S).
            timestep: the next of ``timesteps``.
            sample: the initial noise, then what the last call returned, (N, *S), any float type.
            generator: seeds the noise that an SDE solver draws, at the first step; None takes torch's own. A solver
                without noise leaves it untouched.
            return_dict: whether to return an output with ``prev_sample``, or a tuple of it alone.

        Raises:
            InputError: another timestep, sample or shape than expected; no timesteps left or set.
            InputTypeError: tensors that are not floating point; a list of generators for a solver that draws noise.
            SolverError: the solve became NaN or infinite; noticed at the last step.
        """
        self._check_step(model_output, timestep, sample)
        if self._solve is None:
            self._begin(sample, generator)
        elif not self._is_returned(sample):
            raise InputError(
                f"got a sample at timestep {self._times[self._position]:g} that the last step did not return, which "
                "the solver cannot take up; pass prev_sample on unchanged, or call set_timesteps to start anew"
            )
        handed = self._advance(model_output)
        previous = self._returned = handed.x.to(sample.dtype, copy=True)  # the solver goes on in its own tensor
        return self._output(prev_sample=previous) if return_dict else (previous,)

    def _check_step(self, output: Tensor, timestep: Tensor | float, sample: Tensor) -> None:
        if self._position >= len(self._times):
            came = f"after the last of {len(self._times)} timesteps" if self._times else "before set_timesteps"
            raise InputError(f"got a step {came}, expected set_timesteps first; call set_timesteps(steps)")
        expected = self._times[self._position]
        if isinstance(timestep, Tensor) and timestep.numel() != 1:
            raise InputError(
                f"got timesteps of shape {tuple(timestep.shape)}, expected one for all samples: {expected:g}"
            )
        if not abs(float(timestep) - expected) <= 1e-6 * self._scale:
            raise InputError(
                f"got timestep {float(timestep):g}, expected {expected:g}, number {self._position} of timesteps; pass "
                "them in order, or call set_timesteps to start anew"
            )
        for tensor, name in ((output, "a model output"), (sample, "a sample")):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                came = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise InputTypeError(f"got {name} of type {came}, expected a floating-point tensor")
        if output.shape != sample.shape:
            raise InputError(
                f"got a model output of shape {tuple(output.shape)}, expected the sample's {tuple(sample.shape)}"
            )

    def _is_returned(self, sample: Tensor) -> bool:
        return sample is self._returned or (self._returned is not None and torch.equal(sample, self._returned))

    def _begin(self, sample: Tensor, generator: Any) -> None:
        seed = self._seed(sample, generator)
        state = sample.to(torch.promote_types(sample.dtype, torch.float32))
        solve = _Solve(self._solver, self._interpolant, self._predicts, state, seed)
        solve.receive()  # the state as it came
        solve.end_with(self)
        self._solve = solve
        self._finite = []

    def _seed(self, sample: Tensor, generator: Any) -> int | None:
        if generator is None or self._solver.increments_shape(sample) is None:
            return None
        if not isinstance(generator, torch.Generator):
            raise InputTypeError(
                f"got a {type(generator).__name__} for a generator of a solver that draws noise, expected one "
                "torch.Generator: the noise of a sample depends on the seed and its position alone"
            )
        return int(torch.randint(2**62, (), generator=generator, device=generator.device).item())

    def _advance(self, output: Tensor) -> _Handed:
        assert self._solve is not None
        self._finite.append(torch.isfinite(output).all())  # read only where a solve fails: no device is waited for
        self._solve.answer(output)
        self._position += 1
        try:
            handed = self._solve.receive()
        except Exception:  # whatever the solve raised goes on to the caller, once its thread has ended
            self._give_up()
            raise
        last = self._position == len(self._times)
        if handed.last != last:  # a solve whose result is not finite is run again by the solver
            self._give_up()
            raise self._failure()
        if last:
            self._end()
        return handed

    def _failure(self) -> SolverError:
        bad = next((number for number, finite in enumerate(self._finite) if not bool(finite)), self._position - 1)
        return SolverError(
            "the result is NaN or infinite, or the solver does not call the network at the times announced",
            t=self._times[bad] / self._scale,
            step=bad // self.order,
            nfe=bad + 1,
        )

    def _give_up(self) -> None:
        self._end()
        self._position = len(self._times)

    def _end(self) -> None:
        if self._solve is not None:
            self._solve.close()
        self._solve = None

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | float) -> Tensor:
        """Return x_t = α(t)·data + σ(t)·noise at t = timestep/num_train_timesteps, (N, *S) in the data's precision.

        Args:
            original_samples: data, (N, *S).
            noise: (N, *S).
            timesteps: any in [0, num_train_timesteps], whole or not, listed in ``timesteps`` or not; shape (N,), (1,)
                or ().

        Raises:
            InputError: shapes that do not fit, or timesteps out of range.
        """
        wide = torch.promote_types(original_samples.dtype, torch.float32)
        t = torch.as_tensor(timesteps, device=original_samples.device).to(wide) / self._scale
        if t.shape == (1,):
            t = t.reshape(())
        return self._interpolant.interpolate(original_samples.to(wide), noise.to(wide), t).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor | float, noise: Tensor) -> Tensor:
        """Return ``add_noise(sample, noise, timestep)``, as image-to-image pipelines call it."""
        return self.add_noise(sample, noise, timestep)


def _named(spec: str | Mapping[str, Any]) -> dict[str, Any]:
    return {"name": spec} if isinstance(spec, str) else dict(spec)


def _plain(spec: Any, what: str) -> dict[str, Any]:
    """Return a name or mapping as a mapping that a configuration file can hold.

    Raises:
        InputTypeError: an instance, or a mapping with one in it.
    """
    try:
        found: dict[str, Any] = json.loads(json.dumps(_named(spec)))
    except (TypeError, ValueError) as error:
        raise InputTypeError(
            f"got {spec!r} for {what}, expected a name or a mapping of names and numbers, as a file holds them: {error}"
        ) from error
    return found


@cache
def _scheduler_class() -> type[Any]:
    utils, configuration = (
        require(f"diffusers.{module}", "diffusers") for module in ("schedulers.scheduling_utils", "configuration_utils")
    )
    body = {"__module__": __name__, "__doc__": SolverScheduler.__doc__, "_output": utils.SchedulerOutput}
    return type("FlowScheduler", (SolverScheduler, utils.SchedulerMixin, configuration.ConfigMixin), body)


def __getattr__(name: str) -> Any:
    """Give ``FlowScheduler`` and its base when first asked for, as diffusers asks to load a saved pipeline."""
    if name == "FlowScheduler":
        return _scheduler_class()
    if name == "SchedulerMixin":
        return require("diffusers.schedulers.scheduling_utils", "diffusers").SchedulerMixin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
