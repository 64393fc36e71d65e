"""The methods of torchsde for our SDE, with the library's edges hidden; the package is optional.

The library integrates in the number of the step: with s = n + part from 0 to the number of steps, dt = 1 and Brownian
increments of unit variance, the drift is h·F and the diffusion g·√h, with F the drift in the direction of the solve and
h the length of step n. So grids are exact, uneven ones and either direction included, and N steps are N steps.
N samples; S the shape of one sample; d its number of values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from pathline.core.checks import require
from pathline.core.errors import InputError
from pathline.solvers.base import registry
from pathline.solvers.diffusions import DiffusionSpec
from pathline.solvers.grids import GridSpec, part_way
from pathline.solvers.run import Run
from pathline.solvers.stochastic import LastStep, StochasticStep

__all__ = ["Convention", "Method", "TorchSDE", "sde_solver"]

Method = Literal["euler", "milstein", "srk", "heun", "midpoint", "euler_heun"]
Convention = Literal["ito", "stratonovich"]


@registry.register("sde")
def sde_solver(
    steps: int,
    *,
    method: Method = "euler",
    convention: Convention = "ito",
    grid: GridSpec = "uniform",
    diffusion: DiffusionSpec = "sigma",
    last_step: LastStep = "tweedie",
    start: float = 1.0,
    end: float = 0.0,
) -> TorchSDE:
    """Build a solver that runs torchsde (``pip install 'pathline[solvers]'``).

    Args:
        steps: number of steps N ≥ 1.
        method: of Itô's reading: ``euler``, ``milstein`` (the same where g depends on t alone), ``srk``; of
            Stratonovich's: ``heun``, ``midpoint``, ``euler_heun``, ``milstein``.
        convention: the reading of the SDE, ``ito`` or ``stratonovich``. With g a function of t alone they agree; a
            method of the other reading is refused all the same.
        grid: see ``FixedStep``.
        diffusion: see ``StochasticStep``.
        last_step: see ``StochasticStep``.
        start: see ``Solver``.
        end: see ``Solver``.

    Raises:
        InputError: an unknown method or convention, or two that do not fit.
        MissingPackageError: torchsde is not installed.
    """
    for name, value, choices in (
        ("method", method, get_args(Method)),
        ("convention", convention, get_args(Convention)),
    ):
        if value not in choices:
            raise InputError(f"got {name} {value!r}, expected one of {', '.join(choices)}")
    kind = _METHODS[method]
    if convention not in kind.conventions:
        fitting = (name for name, other in _METHODS.items() if convention in other.conventions)
        raise InputError(
            f"got the method {method!r} with convention {convention!r}, but it solves SDEs read as "
            f"{' or '.join(kind.conventions)}; give convention={kind.conventions[0]!r}, or one of {', '.join(fitting)}"
        )
    return kind(steps, convention=convention, grid=grid, diffusion=diffusion, last_step=last_step, start=start, end=end)


class TorchSDE(StochasticStep):
    """A method of torchsde; a last step of its own, as ``StochasticStep`` has it, is ours.

    Args:
        steps: number of steps N ≥ 1.
        convention: see ``sde_solver``.
        options: see ``StochasticStep``.

    Attributes:
        method: the library's name.
        conventions: the readings that the library has the method for.
        parts: the parts of a step, 1 its end, at which the drift or g is evaluated.
        levy_area: what the library asks of the Brownian motion.
    """

    method: ClassVar[str]
    conventions: ClassVar[tuple[str, ...]]
    parts: ClassVar[tuple[float, ...]]
    levy_area: ClassVar[str] = "none"

    def __init__(self, steps: int, *, convention: Convention = "ito", **options: Any) -> None:
        super().__init__(steps, **options)
        self._sdeint = require("torchsde", "solvers").sdeint
        self.convention = convention

    def nodes(self) -> list[float]:
        """Return the grid, and the times inside of steps."""
        inner = [part for part in self.parts if 0 < part < 1]
        return [*self.times, *(part_way(t, t_next, part) for t, t_next in pairwise(self.times) for part in inner)]

    def integrate(self, run: Run, x: Tensor) -> Tensor:
        """Hand the noisy steps to the library at once, and take a last step of its own after them."""
        self.plan(run)
        run.prepare(self.nodes())
        run.visit(x, self.times[0], 0)
        steps = run.steps(self.times)
        if self.noisy_steps:
            x = self._noisy(run, x, steps)
            run.visit(x, self.times[self.noisy_steps], self.noisy_steps - 1)
        for number, t, t_next in steps:
            x = self.finish(run, x, number, t, t_next)
            run.visit(x, t_next, number)
        return x

    def _noisy(self, run: Run, x: Tensor, steps: Iterator[tuple[int, float, float]]) -> Tensor:
        system = _System(run, x, self.convention)
        brownian = _Brownian(system, steps, self.draws_per_step, self.levy_area)
        ends = torch.tensor([0.0, self.noisy_steps], dtype=torch.float64)
        devices, kind = ([], "cuda") if x.device.type == "cpu" else ([x.device], x.device.type)
        with ExitStack() as stack:  # the library's check of shapes draws from torch's generator
            stack.enter_context(torch.random.fork_rng(devices, device_type=kind))
            system.checked = stack.close
            state = x.reshape(len(x), system.size)
            states = self._sdeint(system, state, ends, bm=brownian, method=self.method, dt=1.0)
        return torch.clone(states[-1].view(x.shape))

    def advance(self, run: Run, x: Tensor, number: int, t: float, t_next: float) -> Tensor:
        """Not there: the library walks over the grid by itself."""
        raise NotImplementedError("a method of torchsde takes no single steps; call solve")


class _System:
    """The SDE as the library wants it, for states (N, d): drift and diffusion of the step under way.

    The library begins with a call of each to check shapes; these are answered without the network.
    """

    noise_type = "additive"

    def __init__(self, run: Run, x: Tensor, convention: str) -> None:
        self.run, self.x, self.sde_type = run, x, convention
        self.size = math.prod(x.shape[1:])
        self.checked: Callable[[], None] | None = None
        self._number, self._t, self._t_next = 0, 0.0, 0.0
        self._state: Tensor | None = None
        self._slope = x

    def begin(self, number: int, t: float, t_next: float) -> None:
        """Begin a step."""
        self._number, self._t, self._t_next, self._state = number, t, t_next, None

    def f(self, s: Tensor, state: Tensor) -> Tensor:
        """Drift of a whole step; ``srk`` asks twice at the step's beginning, the network once."""
        if self.checked:
            return state
        if state is self._state:
            return self._slope
        t = part_way(self._t, self._t_next, float(s) - self._number)
        x = state.view(self.x.shape)
        if self._state is None and self._number:
            self.run.visit(x, t, self._number - 1)
        length = self._t_next - self._t
        score = 0.5 * self.run.plan[t] * abs(length)
        slope = self.run.weighted(self.run.predict(x, t), t, velocity=length, score=score).view(state.shape)
        if self._state is None:
            self._state, self._slope = state, slope
        return slope

    def g_prod(self, s: Tensor, state: Tensor, noise: Tensor) -> Tensor:
        """Diffusion of a whole step times its noise."""
        if self.checked:
            self.checked()
            self.checked = None
            return noise
        t = part_way(self._t, self._t_next, float(s) - self._number)
        return noise * math.sqrt(self.run.plan[t] * abs(self._t_next - self._t))


class _Brownian:
    """The noise of one step after the other, by (seed, sample id, step); the library begins each step by asking for it.

    W is draw n of the solve. Where the library wants U = ∫(W − W₀)ds = ½W + H too, with H of variance 1/12, draws 2n
    and 2n + 1 are W and √12·H.
    """

    def __init__(
        self, system: _System, steps: Iterator[tuple[int, float, float]], draws: int, levy_area_approximation: str
    ) -> None:
        self._system, self._steps, self._draws = system, steps, draws
        self.shape = (len(system.x), system.size)
        self.levy_area_approximation = levy_area_approximation

    def __call__(self, s: Tensor, s_next: Tensor, *, return_U: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return the increment of a step, or that and its integral."""
        number, t, t_next = next(self._steps)
        self._system.begin(number, t, t_next)
        increment = self._draw(self._draws * number)
        if not return_U:
            return increment
        return increment, (self._draw(self._draws * number + 1) / math.sqrt(12)).add_(increment, alpha=0.5)

    def _draw(self, number: int) -> Tensor:
        return self._system.run.normal(self._system.x, number).reshape(self.shape)


class _Euler(TorchSDE):
    method, conventions, parts = "euler", ("ito",), (0.0,)
    order, calls_per_step, evaluates_end = 1, 1, False


class _Milstein(TorchSDE):
    method, conventions, parts = "milstein", ("ito", "stratonovich"), (0.0,)
    order, calls_per_step, evaluates_end = 1, 1, False


class _StochasticRungeKutta(TorchSDE):
    method, conventions, parts, levy_area = "srk", ("ito",), (0.0, 0.75, 1.0), "space-time"
    order, calls_per_step, evaluates_end = 1.5, 2, False
    draws_per_step, diffusion_at_end = 2, True


class _Heun(TorchSDE):
    method, conventions, parts = "heun", ("stratonovich",), (0.0, 1.0)
    order, calls_per_step, evaluates_end = 1, 2, True
    diffusion_at_end = True


class _Midpoint(TorchSDE):
    method, conventions, parts = "midpoint", ("stratonovich",), (0.0, 0.5)
    order, calls_per_step, evaluates_end = 1, 2, False


class _EulerHeun(TorchSDE):
    method, conventions, parts = "euler_heun", ("stratonovich",), (0.0, 1.0)
    order, calls_per_step, evaluates_end = 1, 1, False
    diffusion_at_end = True


_METHODS = {kind.method: kind for kind in (_Euler, _Milstein, _StochasticRungeKutta, _Heun, _Midpoint, _EulerHeun)}
