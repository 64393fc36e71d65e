"""Checks for those who add components: each compares with mathematics and raises AssertionError, saying what failed.

Use them in tests of your own: ``check_interpolant(MyPath())``. Truths are closed forms (``GaussianMixture``), automatic
derivatives, or the definition; none is the component's own output.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp

from pathline import backbones
from pathline.core.draws import Draws
from pathline.core.errors import InputError, OpenEndError
from pathline.core.flow import BaseFlow
from pathline.interpolants.base import KINDS, Interpolant, broadcast
from pathline.interpolants.bridge import Stochastic, TwoEnded
from pathline.objectives.base import Objective
from pathline.solvers.base import Solver
from pathline.solvers.guidance import Guidance
from pathline.testing.mixtures import GaussianMixture

__all__ = ["check_backbone", "check_guidance", "check_interpolant", "check_objective", "check_solver"]

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SHAPES = ((3,), (3, 3), (3, 2, 5))  # a batch as large as its dimension included: a wrong broadcast passes elsewhere


def check_interpolant(path: Interpolant) -> None:
    """Check a path: rates, ends, precision, clock, velocity, conversions and the ends that it calls open.

    Raises:
        AssertionError: what differs, where, and by how much.
    """
    _check_coefficients(path)
    _check_clock(path)
    for shape in _SHAPES:
        data, noise, latent = torch.randn(3, *shape, dtype=torch.float64, generator=_generator())
        z = latent if path.latent_noise else None
        for t in (torch.tensor([0.2, 0.5, 0.9]).double(), torch.tensor(0.7).double()):
            _check_motion(path, data, noise, z, t)
            if not path.latent_noise:
                _check_conversions(path, data, noise, t)
            else:
                _check_latent_conversions(path, data, noise, latent, t)
    for end in (0.0, 1.0):
        _check_end(path, end)


def check_solver(
    build: Callable[..., Solver],
    *,
    steps: int | None = 40,
    path: Interpolant | None = None,
    tolerance: float = 0.02,
    order_steps: tuple[int, int] = (20, 80),
) -> None:
    """Check a solver on the exact flow of a Gaussian, N(2, 0.5²) in two dimensions.

    Its samples have the data's moments, NFE and recorded times are true, the result keeps the state's float type and
    depends on (seed, sample id) alone, and where it draws no noise its error falls with its ``order``.

    Args:
        build: ``build(steps=…)``, as ``functools.partial(solvers.build, "heun", end=0.1)``.
        steps: enough for moments within ``tolerance``; None for a solver without given steps, whose order is not
            measured.
        path: None takes the linear one, and the trigonometric one for the order.
        tolerance: of mean and standard deviation.
        order_steps: two numbers of steps between which the order is measured.

    Raises:
        AssertionError: what differs.
    """
    from pathline.interpolants import build as build_path

    measured = path or build_path("trigonometric")  # on the linear path some methods gain an order by symmetry
    path = path or build_path("linear")
    truth, count = GaussianMixture([[2.0, 2.0]], 0.5), 4000
    solver = build() if steps is None else build(steps=steps)
    flow, noise = truth.flow(path), Draws(3).normal("check", range(count), (2,))
    (mean, _), (wanted, std) = (_gaussian(path, t) for t in (solver.start, solver.end))
    noise = (mean + _gaussian(path, solver.start)[1] * noise).float()
    solution = solver.solve(flow, noise, seed=5)
    x = solution.x.double()
    margin = tolerance + 4 * float(std) / math.sqrt(count)
    _close(x.mean(), wanted, margin, "mean of the samples")
    _close(x.std(), std, margin, "standard deviation of the samples")
    assert solution.nfe == flow.nfe == len(solution.times), f"NFE {solution.nfe}, {flow.nfe} calls counted by the flow"
    low, high = sorted((solver.start, solver.end))
    assert bool(((solution.times >= low) & (solution.times <= high)).all()), f"evaluated times {solution.times}"
    touched = bool((solution.times == solver.end).any())
    assert touched == solver.evaluates_end, f"evaluates_end is {solver.evaluates_end}, evaluated its end: {touched}"
    some = solver.solve(flow, noise[5:9], seed=5, sample_ids=range(5, 9)).x
    _close(some, solution.x[5:9], 1e-4, "samples in a smaller batch")
    for dtype in (torch.float32, torch.float64):
        assert solver(flow, noise[:3].to(dtype), seed=0).dtype == dtype, f"a {dtype} state changed its type"
    if steps is not None and solver.increments_shape(noise) is None:
        _check_order(build, truth, measured, order_steps)


def check_objective(
    objective: Objective,
    *,
    backbone: nn.Module | None = None,
    exact: nn.Module | None = None,
    data: GaussianMixture | None = None,
    **given: Any,
) -> None:
    """Check an objective: shapes, precision, that it draws from its draws alone, and, given the truth, its minimum.

    Args:
        objective: any.
        backbone: a network of its kind for samples (N, 2) of ``data``; a small one of no parameters if None.
        exact: the minimiser, if there is one in closed form: its loss must be below those around it.
        data: what samples come from; a mixture in two dimensions if None.
        given: further arguments of a call for 600 samples, as ``features``.

    Raises:
        AssertionError: what differs.
    """
    data = data or GaussianMixture([[1.0, -1.0], [-2.0, 0.5]], [0.5, 0.3])
    x, _ = data.sample(600)
    network = backbone or exact or backbones.wrap(lambda x, t, **_: 0.3 * x)
    draws, generator = Draws(7).at(range(600)), torch.get_rng_state()
    loss, again = (objective(network, x, draws, **given) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), generator), "it draws from torch's global generator"
    _close(loss.total, again.total, 0.0, "the loss of the same draws, a second time")
    assert loss.total.ndim == 0 and loss.total.dtype == torch.float32, f"a loss {loss.total.dtype} {loss.total.shape}"
    for name, term in {**loss.terms, **loss.details}.items():
        assert term.shape == (600,), f"term {name} of shape {tuple(term.shape)}, expected one number a sample"
    assert set(loss.terms) <= set(objective.weights), f"terms {sorted(loss.terms)}, weights {sorted(objective.weights)}"
    assert bool(loss.total.isfinite()), "a loss that is not finite"
    if exact is not None:
        _check_minimum(objective, exact, data)


def _check_minimum(objective: Objective, exact: nn.Module, data: GaussianMixture) -> None:
    """The truth's loss is below those around it: more than their difference's standard error, or else within three."""
    count = 40_000
    x, draws = data.sample(count, seed=1)[0], Draws(8).at(range(count))

    def rows(network: nn.Module) -> Tensor:
        terms = objective(network, x, draws).terms
        return torch.stack([objective.weights[name] * term.detach().double() for name, term in terms.items()]).sum(0)

    best, above = rows(exact), 0
    for factor, shift in ((0.5, 0.0), (1.5, 0.0), (1.0, 0.3), (1.0, -0.3)):
        around = backbones.wrap(lambda x, t, f=factor, s=shift, **given: f * exact(x, t, **given) + s)
        gap = rows(around) - best
        error = float(gap.std()) / math.sqrt(count)
        above += float(gap.mean()) > 3 * error
        assert float(gap.mean()) > -3 * error, (
            f"the loss {float(best.mean()):g} of the truth is above that of {factor}·truth + {shift} by "
            f"{-float(gap.mean()):.3g} ± {error:.1g}"
        )
    assert above >= 2, "the loss hardly changes around the truth"


def check_guidance(build: Callable[..., Guidance], *, path: Interpolant | None = None) -> None:
    """Check a guidance ``build(scale=…)`` on the exact flow of two labelled Gaussians.

    Scale 1 is the conditional model, bit for bit; each evaluation is counted; labels bound before and after give the
    same; per-sample results do not depend on the batch, nor a trajectory on another.

    Args:
        build: as ``functools.partial(guidance.build, "classifier-free")``; what acts on another flow beside, as
            ``autoguidance`` does, gets one on ``path`` that differs from these Gaussians'.
        path: None takes the linear one.

    Raises:
        AssertionError: what differs.
    """
    from pathline.interpolants import build as build_path

    path = path or build_path("linear")
    truth = GaussianMixture([[1.0, 0.0], [-1.0, 2.0]], [0.5, 0.3], labels=[0, 1])
    x, label = Draws(2).normal("check", range(7), (2,)), torch.tensor([0, 1, 1, 0, 1, 0, 0])
    t, flow = torch.tensor(0.6), truth.flow(path)
    off, on = build(scale=1.0)(flow), build(scale=2.0)(flow)
    assert isinstance(on, BaseFlow), f"it returns a {type(on).__name__}, expected a flow"
    plain = flow(x, t, label=label).velocity
    _close(off(x, t, label=label).velocity, plain, 0.0, "velocity at scale 1")
    before = on.nfe
    guided = on(x, t, label=label).velocity
    assert on.nfe > before, "a guided evaluation is not counted"
    assert guided.shape == x.shape and bool(guided.isfinite().all()), f"velocity of shape {tuple(guided.shape)}"
    assert not torch.allclose(guided, plain), "scale 2 changes nothing"
    _close(on.given(label=label)(x, t).velocity, guided, 0.0, "velocity with bound labels")
    bound = build(scale=2.0)(flow.given(label=label))
    _close(bound(x, t).velocity, guided, 0.0, "velocity with labels bound before")
    _close(on(x[2:4], t, label=label[2:4]).velocity, guided[2:4], 1e-6, "velocity in a smaller batch")
    alone, beside, other = on.begin(), on.begin(), on.begin()
    for time in (0.9, 0.6, 0.3):
        wanted = alone(x, time, label=label).velocity
        other(x[1:4], time, label=label[1:4])
        _close(beside(x, time, label=label).velocity, wanted, 0.0, "velocity beside another trajectory")


def check_backbone(backbone: nn.Module, *, label: bool | None = None) -> None:
    """Check a backbone: its shape, that it is a pure function of its inputs row by row, and its contract's attributes.

    Args:
        backbone: with ``input_shape``.
        label: whether to pass labels; None passes them if ``num_classes`` is above 0.

    Raises:
        AssertionError: what differs.
    """
    shape, classes = getattr(backbone, "input_shape", None), getattr(backbone, "num_classes", 0)
    assert shape is not None, "no input_shape"
    null = getattr(backbone, "null_label", None)
    assert null is None or null == classes, f"null_label {null}, expected num_classes {classes} or None"
    x, t = Draws(1).normal("check", range(5), shape), torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    given = {"label": torch.arange(5) % classes} if (classes > 0 if label is None else label) else {}
    training = backbone.training
    backbone.eval()
    generator = torch.get_rng_state()
    with torch.no_grad():
        whole, again = backbone(x, t, **given), backbone(x, t, **given)
        part = backbone(x[1:3], t[1:3], **{name: value[1:3] for name, value in given.items()})
        one = backbone(x, torch.tensor(0.3), **given)
        spread = backbone(x, torch.full((5,), 0.3), **given)
    backbone.train(training)
    assert torch.equal(torch.get_rng_state(), generator), "it draws random numbers; dropout belongs to the objective"
    assert whole.shape == x.shape, f"shape {tuple(whole.shape)}, expected {tuple(x.shape)}"
    assert whole.dtype == x.dtype, f"type {whole.dtype}, expected {x.dtype}"
    _close(again, whole, 0.0, "the same inputs, a second time")
    _close(part, whole[1:3], 1e-4, "two rows alone")
    _close(one, spread, 1e-4, "t as a scalar")


def _check_coefficients(path: Interpolant) -> None:
    t = torch.linspace(0.01, 0.99, 23, dtype=torch.float64)
    values, rates, *_ = jvp(lambda t: path.evaluate(t)[:2], (t,), (torch.ones_like(t),))
    for name, ours, truth in zip(
        ("alpha", "sigma", "alpha_rate", "sigma_rate"), path.coefficients(t), (*values, *rates), strict=True
    ):
        _close(ours, truth, 1e-10, name)
    ends = path.evaluate(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert float(ends.sigma[0]) == 0.0 and float(ends.alpha[0]) == 1.0, "x_0 is not the data"
    assert abs(float(ends.alpha[1])) <= 0.3 * float(ends.sigma[1]), "x_1 keeps more than 30 % of the data"
    for dtype in _FLOATS:
        for shape in ((), (5,)):
            for name, c in zip(
                path.evaluate(t)._fields, path.coefficients(torch.full(shape, 0.25, dtype=dtype)), strict=True
            ):
                assert c.shape == shape and c.dtype == dtype, (
                    f"{name}: {c.dtype} {tuple(c.shape)} for t {dtype} {shape}"
                )
                exact = getattr(path.coefficients(torch.tensor(0.25).double()), name)
                _close(c.double(), exact.expand(shape), 40 * torch.finfo(dtype).eps * (1 + abs(float(exact))), name)


def _check_clock(path: Interpolant) -> None:
    t = torch.linspace(0, 1, 41, dtype=torch.float64)
    angle = path.angle(t)
    assert bool((angle.diff() > 0).all()), "the ratio of noise to data does not grow with t"
    _close(path.time_at(angle), t, 1e-9, "time_at(angle(t))")


def _check_motion(path: Interpolant, data: Tensor, noise: Tensor, z: Tensor | None, t: Tensor) -> None:
    """Velocity is the derivative of interpolate."""
    given = (data, noise) if z is None else (data, noise, z)

    def at(t: Tensor) -> Tensor:
        alpha, sigma, _, _ = (broadcast(c, data) for c in path.evaluate(t))
        x = alpha * data + sigma * noise
        if z is None or not isinstance(path, Stochastic):
            return x
        return x + broadcast(path.latent(t).gamma, data) * z

    x, velocity, *_ = jvp(at, (t,), (torch.ones_like(t),))
    _close(path.interpolate(*given[:2], t, *given[2:]), x, 1e-12, "interpolate")
    _close(path.velocity(*given[:2], t, *given[2:]), velocity, 1e-10, "velocity")


def _truths(path: Interpolant, data: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    alpha, sigma, alpha_rate, sigma_rate = (broadcast(c, data) for c in path.evaluate(t))
    velocity = alpha_rate * data + sigma_rate * noise
    kinds = {"data": data, "noise": noise, "velocity": velocity, "score": -noise / sigma}
    return alpha * data + sigma * noise, kinds


def _check_conversions(path: Interpolant, data: Tensor, noise: Tensor, t: Tensor) -> None:
    x, truth = _truths(path, data, noise, t)
    kinds = [kind for kind in KINDS if not (kind == "score" and isinstance(path, TwoEnded))]
    for source in kinds:
        _close(path.target(source, data, noise, t), truth[source], 1e-10, f"target {source}")
        for target in kinds:
            converted = path.convert(truth[source], x, t, source=source, target=target)
            _close(converted, truth[target], 1e-9, f"{target} from {source}")


def _check_latent_conversions(path: Interpolant, data: Tensor, noise: Tensor, z: Tensor, t: Tensor) -> None:
    assert isinstance(path, Stochastic)
    gamma = broadcast(path.latent(t).gamma, z)
    _close(path.target("noise", data, noise, t, z), z, 0.0, "target noise")
    _close(path.target("score", data, noise, t, z), -z / gamma, 1e-10, "target score")
    x = path.interpolate(data, noise, t, z)
    _close(path.convert(z, x, t, source="noise", target="score"), -z / gamma, 1e-10, "score from noise")
    _close(path.convert(-z / gamma, x, t, source="score", target="noise"), z, 1e-10, "noise from score")


def _check_end(path: Interpolant, end: float) -> None:
    """An open end raises; at a closed one the limit of the definition is reached."""
    data, noise = torch.randn(2, 3, 5, dtype=torch.float64, generator=_generator())
    t = torch.tensor(end, dtype=torch.float64)
    for source in KINDS:
        for target in KINDS:
            try:
                ends = path.open_ends(source, target)
            except InputError:
                continue  # impossible anywhere on this path, and refused
            if end in ends:
                _raises(path, noise, data, t, source, target)
                continue
            converted = path.convert(noise, data, t, source=source, target=target)
            assert bool(converted.isfinite().all()), f"{target} from {source} at t = {end:g}, a closed end: not finite"
            if source == "score" or path.latent_noise:
                continue  # the noise of a finite score at data is 0, of this one −σ·score
            near = t + (1e-12 if end == 0 else -1e-12)
            x, truth = _truths(path, data, noise, near)
            converted = path.convert(truth[source], x, t, source=source, target=target)
            _close(converted, truth[target], 1e-4, f"{target} from {source} at t = {end:g}")


def _raises(path: Interpolant, value: Tensor, x: Tensor, t: Tensor, source: Any, target: Any) -> None:
    try:
        path.convert(value, x, t, source=source, target=target)
    except OpenEndError:
        return
    raise AssertionError(f"{target} from {source} at t = {float(t):g}, an open end, does not raise OpenEndError")


def _gaussian(path: Interpolant, t: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of x_t for data N(2, 0.5²)."""
    at = path.evaluate(torch.tensor(t, dtype=torch.float64))
    return at.alpha * 2, torch.sqrt((at.alpha * 0.5) ** 2 + at.sigma**2)


def _check_order(
    build: Callable[..., Solver], truth: GaussianMixture, path: Interpolant, steps: tuple[int, int]
) -> None:
    """The slope of the logarithmic error against the closed solution is the order: 0.25 less at most, or 0.75 more."""
    noise = Draws(4).normal("check", range(64), (2,)).double()
    flow, errors = truth.flow(path), []
    for count in steps:
        solver = build(steps=count)
        (mean, std), (mean_then, std_then) = (_gaussian(path, t) for t in (solver.start, solver.end))
        errors.append(float((solver(flow, mean + std * noise) - mean_then - std_then * noise).abs().max()))
    slope = math.log(errors[0] / errors[1]) / math.log(steps[1] / steps[0])
    order = build(steps=steps[0]).order
    assert order - 0.25 < slope < order + 0.75, f"order {order} is claimed, {slope:.2f} measured (errors {errors})"


def _close(ours: Tensor, truth: Tensor, tolerance: float, what: str) -> None:
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    worst = float((ours.detach().double() - truth.detach().double()).abs().max()) if ours.numel() else 0.0
    assert worst <= tolerance, f"{what}: off by {worst:.3g}, allowed {tolerance:.3g}"


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(20250314)
