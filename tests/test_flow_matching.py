from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import jvp

from pathline import (
    Flow,
    InputError,
    InputTypeError,
    OpenEndError,
    UnknownNameError,
    UnknownOptionError,
    backbones,
    interpolants,
    solvers,
)
from pathline.core.composed import Rescheduled
from pathline.core.errors import MissingPackageError
from pathline.plugins.flow_matching import as_velocity_model, from_velocity_model

pytest.importorskip("flow_matching")
from flow_matching.path import AffineProbPath
from flow_matching.path.scheduler import CondOTScheduler, CosineScheduler, VPScheduler
from flow_matching.solver import ODESolver
from flow_matching.utils import ModelWrapper

TWINS = [
    ("CondOTScheduler", {}, "linear", {}),
    ("Cosine", {}, "trigonometric", {}),
    ("PolynomialConvex", {"n": 3}, "polynomial", {"power": 3}),
    ("PolynomialConvexScheduler", {"n": 0.5}, "polynomial", {"power": 0.5}),
    ("VP", {}, "vp", {}),
    ("VPScheduler", {"beta_min": 0.5, "beta_max": 7.0}, "vp", {"beta_min": 0.5, "beta_max": 7.0}),
    ("LinearVP", {}, "linear-vp", {}),
]
twins = pytest.mark.parametrize(("scheduler", "options", "name", "ours"), TWINS)
inside = st.floats(0.01, 0.99)


def built(scheduler: str, **options):
    return interpolants.build("flow-matching", scheduler=scheduler, **options)


@twins
@given(t=inside)
def test_coefficients_equal_our_own_path_and_rates_their_derivatives(scheduler, options, name, ours, t):
    t = torch.tensor([t, 1 - t / 2], dtype=torch.float64)
    path, twin = built(scheduler, **options), interpolants.build(name, **ours)
    for theirs, wanted in zip(path.coefficients(t), twin.coefficients(t), strict=True):
        assert torch.allclose(theirs, wanted, rtol=1e-12, atol=1e-12)
    value, rate = jvp(lambda t: path.evaluate(t)[:2], (t,), (torch.ones_like(t),))
    for got, truth in zip(path.evaluate(t), (*value, *rate), strict=True):
        assert torch.allclose(got, truth, rtol=1e-12, atol=1e-12)


@twins
def test_open_ends_are_those_of_our_own_path(scheduler, options, name, ours):
    path, twin = built(scheduler, **options), interpolants.build(name, **ours)
    assert path.straight == twin.straight
    for source in ("velocity", "noise", "data"):
        for target in ("velocity", "score", "noise", "data"):
            assert path.open_ends(source, target) == twin.open_ends(source, target), (source, target)
    for kind in ("velocity", "score"):
        assert path.training_interval(kind) == twin.training_interval(kind)
    for end in (0.0, 1.0):
        if end in path.rate_ends():
            with pytest.raises(OpenEndError):
                path.coefficients(end)
        else:
            assert all(bool(c.isfinite()) for c in path.coefficients(end))


@twins
def test_samples_and_velocities_equal_those_of_the_library(scheduler, options, name, ours):
    path = built(scheduler, **options)
    data, noise = torch.randn(2, 5, 3, 7, dtype=torch.float64)
    t = torch.rand(5, dtype=torch.float64) * 0.9 + 0.05
    theirs = AffineProbPath(path.scheduler).sample(x_0=noise, x_1=data, t=1 - t)
    assert torch.allclose(path.interpolate(data, noise, t), theirs.x_t, rtol=0, atol=1e-12)
    assert torch.allclose(path.velocity(data, noise, t), -theirs.dx_t, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 3), (5, 3), (5, 2, 7)])
def test_conversions_broadcast_t_over_the_batch_alone(shape):
    """F1: the library's converters raise on (N, D), and with N = D mix time and feature."""
    path = built("Cosine")
    data, noise = torch.randn(2, *shape, dtype=torch.float64)
    t = torch.rand(len(data), dtype=torch.float64) * 0.8 + 0.1
    x, velocity = path.interpolate(data, noise, t), path.velocity(data, noise, t)
    for kind, truth in (("data", data), ("noise", noise)):
        assert torch.allclose(path.convert(velocity, x, t, target=kind), truth, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (5,)])
def test_shape_and_precision_of_t_are_kept(dtype, shape):
    """S12: half-precision times are evaluated in float64 and rounded once."""
    t = torch.rand(shape).to(dtype) * 0.5 + 0.25
    exact = built("Cosine").evaluate(t.double())
    for coefficient, truth in zip(built("Cosine").evaluate(t), exact, strict=True):
        assert coefficient.shape == shape and coefficient.dtype == dtype
        assert torch.equal(coefficient, truth.to(dtype))


def test_a_scheduler_may_be_given_as_it_is():
    class Squared(CondOTScheduler):
        def __call__(self, t):
            at = super().__call__(t**2)
            at.d_alpha_t, at.d_sigma_t = 2 * t * at.d_alpha_t, 2 * t * at.d_sigma_t
            return at

    path = interpolants.build("flow-matching", scheduler=Squared())
    assert float(path.coefficients(0.5).alpha) == pytest.approx(0.25)
    assert float(path.coefficients(0.5).sigma_rate) == pytest.approx(1.0)


def test_zero_by_zero_is_an_open_end():
    """σ ∝ t near data with beta_min = 0, but the library's formula for its rate is 0/0 there."""
    path = built("VP", beta_min=0.0)
    assert not VPScheduler(beta_min=0.0)(torch.tensor(1.0)).d_sigma_t.isfinite()
    with pytest.raises(OpenEndError, match="t = 0"):
        path.coefficients(0.0)


def test_wrong_schedulers_and_options_are_refused():
    with pytest.raises(UnknownNameError, match="did you mean 'CosineScheduler'"):
        built("CosineSchedular")
    with pytest.raises(UnknownOptionError, match="no option 'n'"):
        built("Cosine", n=2)
    with pytest.raises(UnknownOptionError, match="no option 'n'"):
        interpolants.build("flow-matching", n=2)
    with pytest.raises(UnknownOptionError, match="needs the option 'n'"):
        built("PolynomialConvex")
    for n in (0, -1, math.nan, "two"):
        with pytest.raises(InputError, match="refuses"):
            built("PolynomialConvex", n=n)
    with pytest.raises(InputError, match="NaN or infinite between"):
        built("PolynomialConvex", n=math.inf)
    with pytest.raises(InputError, match="NaN or infinite between"):
        built("VP", beta_max=-5.0)
    with pytest.raises(InputTypeError, match="one of the names"):
        built(7)
    with pytest.raises(UnknownOptionError):
        interpolants.build("flow-matching", scheduler=CosineScheduler(), n=2)


def test_the_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flow_matching.path.scheduler", None)
    for options in ({}, {"scheduler": "Cosine"}):
        with pytest.raises(MissingPackageError, match=r"pathline\[flow-matching\]"):
            interpolants.build("flow-matching", **options)


# ---- flows in its solver


@pytest.mark.parametrize("path", ["linear", "trigonometric", "polynomial"])
@pytest.mark.parametrize(
    ("method", "step_size", "bar"), [("euler", 1 / 512, 1e-2), ("midpoint", 1 / 64, 1e-3), ("dopri5", None, 1e-6)]
)
def test_its_solver_reaches_the_closed_form_transport(gaussian, path, method, step_size, bar):
    truth = gaussian(path, mean=2.0, std=0.5)
    noise = torch.randn(7, 3, 2, dtype=torch.float64)
    grid = torch.tensor([0.0, 1.0], dtype=torch.float64)
    solver = ODESolver(as_velocity_model(truth.flow()))
    got = solver.sample(x_init=noise, step_size=step_size, method=method, time_grid=grid, atol=1e-9, rtol=1e-9)
    assert float((got - truth.transported(noise, 1.0, 0.0)).abs().max()) < bar
    back = solver.sample(x_init=got, step_size=step_size, method=method, time_grid=grid.flip(0), atol=1e-9, rtol=1e-9)
    assert float((back - noise).abs().max()) < 4 * bar


@pytest.mark.parametrize("steps", [1, 7, 61, 109])
def test_its_euler_is_ours_step_by_step(gaussian, steps):
    """F7, F11, F12: one step is legal, a grid of N intervals is N calls, and every call sees t of shape (N,)."""
    flow = gaussian("trigonometric").flow()
    seen = []
    watched = Flow(backbones.wrap(lambda x, t: seen.append(t) or flow.backbone(x, t)), flow.interpolant)
    noise, grid = torch.randn(5, 3, dtype=torch.float64), torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    theirs = ODESolver(as_velocity_model(watched)).sample(x_init=noise, step_size=None, time_grid=grid)
    assert len(seen) == watched.nfe == steps and all(t.shape == (5,) for t in seen)
    assert torch.allclose(theirs, solvers.build("euler", steps=steps)(flow, noise), rtol=0, atol=1e-12)
    single = ODESolver(as_velocity_model(flow)).sample(x_init=noise.float(), step_size=None, time_grid=grid.float())
    assert torch.allclose(single.double(), theirs, rtol=0, atol=1e-5)


def test_its_likelihood_of_a_gaussian(gaussian):
    """F2, F3: one feature a sample and a fixed probe; gradients pass through the adapter."""
    truth = gaussian("linear", mean=2.0, std=0.5)
    data = 2 + 0.5 * torch.randn(7, 1)
    normal = torch.distributions.Normal(0.0, 1.0)
    _, density = ODESolver(as_velocity_model(truth.flow())).compute_likelihood(
        x_1=data, log_p0=lambda x: normal.log_prob(x).sum(1), step_size=1 / 256, method="midpoint"
    )
    assert torch.allclose(density, torch.distributions.Normal(2.0, 0.5).log_prob(data)[:, 0], atol=1e-3)


def test_our_own_change_of_path_runs_in_its_solver(gaussian):
    """F10: sampling one network along another path, with closed limits at both ends."""
    truth = gaussian("linear", mean=2.0, std=0.5)
    flow = Rescheduled(truth.flow(), built("Cosine"))
    noise = torch.randn(5, 3, dtype=torch.float64)
    got = ODESolver(as_velocity_model(flow)).sample(
        x_init=noise, step_size=1 / 32, method="rk4", time_grid=torch.tensor([0.0, 1.0], dtype=torch.float64)
    )
    assert torch.allclose(got, 2 + 0.5 * noise, atol=1e-5)


def test_conditions_reach_the_backbone():
    def velocity(x, t, label, scale):
        return x * label.reshape(-1, 1) * scale

    flow = Flow(backbones.wrap(velocity, num_classes=5), interpolants.build("linear")).given(scale=torch.tensor(2.0))
    x, label = torch.randn(3, 2), torch.tensor([1, 4, 0])
    model = as_velocity_model(flow)
    assert torch.allclose(model(x, torch.tensor(0.25), label=label), -2 * x * label.reshape(-1, 1))
    got = ODESolver(model).sample(x_init=x, step_size=None, label=label)
    assert torch.allclose(got, x - 2 * x * label.reshape(-1, 1))
    with pytest.raises(InputError, match="label 5"):
        model(x, torch.tensor(0.25), label=torch.tensor([1, 5, 0]))


def test_adaptive_methods_may_ask_beyond_the_end(gaussian):
    """B1: torchdiffeq steps past the last time and interpolates back; LinearVP's σ is NaN there."""
    path = built("LinearVP")
    asked = []
    truth = gaussian("linear-vp", mean=2.0, std=0.5)
    flow = Flow(backbones.wrap(lambda x, t: asked.append(t) or truth.velocity(x, t)), path)
    noise = torch.randn(5, 2, dtype=torch.float64)
    grid = torch.tensor([0.0, 0.7], dtype=torch.float64)
    got = ODESolver(as_velocity_model(flow)).sample(
        x_init=noise, step_size=None, method="dopri5", time_grid=grid, atol=1e-9, rtol=1e-9
    )
    assert torch.allclose(got, truth.transported(noise, 1.0, 0.3), atol=1e-6)
    assert all(bool(((t >= 0) & (t <= 1)).all()) for t in asked)
    outside = as_velocity_model(gaussian("linear").flow())
    x = torch.randn(5, 2)
    assert torch.equal(outside(x, torch.tensor(1.3)), outside(x, torch.tensor(1.0)))


def test_what_does_not_fit_is_refused(gaussian):
    model = as_velocity_model(gaussian("linear").flow())
    x = torch.randn(3, 2)
    with pytest.raises(InputError, match="shape"):
        model(x, torch.rand(2))
    with pytest.raises(InputError, match="NaN"):
        model(x * math.nan, torch.tensor(0.5))
    with pytest.raises(InputError, match="nan"):
        model(x, torch.tensor(math.nan))
    with pytest.raises(InputTypeError, match="expected a flow"):
        as_velocity_model(nn.Identity())
    with pytest.raises(InputTypeError, match="expected a model"):
        from_velocity_model(7)
    data = as_velocity_model(Flow(backbones.wrap(lambda x, t: x), interpolants.build("linear"), "data"))
    with pytest.raises(OpenEndError, match="t = 1 in flow_matching's clock"):
        data(x, torch.tensor(1.0))
    assert torch.isfinite(data(x, torch.tensor(0.999))).all()


# ---- its models in ours


class Network(ModelWrapper):
    """A model of theirs: named arguments, their clock, a condition."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 3))

    def forward(self, x, t, scale=1.0):
        return self.model(x) * torch.cos(3 * t).reshape(-1, 1) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trips_are_the_identity(dtype):
    model = Network().to(dtype)
    x, t = torch.randn(5, 3, dtype=dtype), torch.rand(5, dtype=dtype)
    back = as_velocity_model(Flow(from_velocity_model(model), interpolants.build("linear")))
    close = {"rtol": 0, "atol": 4 * torch.finfo(dtype).eps}
    assert torch.allclose(back(x, t, scale=0.5), model(x, t, scale=0.5), **close)
    theirs = from_velocity_model(model)
    again = from_velocity_model(as_velocity_model(Flow(theirs, interpolants.build("linear"))))
    assert torch.allclose(again(x, t), theirs(x, t), **close)
    assert torch.allclose(theirs(x, t), -model(x=x, t=1 - t), **close)


def test_parameters_are_reached_through_the_wrappers():
    model = Network()
    wrapped = as_velocity_model(Flow(from_velocity_model(model), interpolants.build("linear")))
    assert {id(p) for p in wrapped.parameters()} == {id(p) for p in model.parameters()}
    wrapped(torch.randn(5, 3), torch.rand(5)).sum().backward()
    assert model.model.weight.grad is not None


def test_a_model_of_theirs_is_sampled_by_our_solvers(gaussian):
    truth = gaussian("linear", mean=2.0, std=0.5)

    class Exact(nn.Module):
        def forward(self, *, x, t):
            return -truth.velocity(x, 1 - t)

    flow = Flow(from_velocity_model(Exact()), interpolants.build("linear"))
    noise = torch.randn(7, 3, dtype=torch.float64)
    assert torch.allclose(solvers.build("heun", steps=200)(flow, noise), 2 + 0.5 * noise, atol=1e-4)
