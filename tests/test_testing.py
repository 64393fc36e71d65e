"""The exact flows against autograd, torch and the continuity equation; the checks on faults that they must find."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pathline import Flow, InputError, backbones, interpolants, objectives, solvers
from pathline.core.draws import Draws
from pathline.interpolants import Coefficients, Interpolant
from pathline.solvers import guidance
from pathline.solvers.fixed import Euler
from pathline.testing import (
    GaussianMixture,
    check_backbone,
    check_guidance,
    check_interpolant,
    check_objective,
    check_solver,
)

LINEAR = interpolants.build("linear")
PATHS = [interpolants.build(name) for name in ("linear", "trigonometric", "vp", "polynomial", "linear-vp")]
PATHS += [interpolants.build("two-ended"), interpolants.build("bridge", scale=0.8), interpolants.build("stochastic")]
MIXTURE = GaussianMixture(
    [[1.0, -2.0, 0.5], [-1.5, 0.0, 2.0], [0.5, 3.0, -1.0]], [0.3, 0.8, 0.5], weights=[0.2, 0.5, 0.3], labels=[0, 1, 1]
)
SOURCE = GaussianMixture([[2.0, 2.0, 1.0], [-3.0, 0.0, 0.0]], [0.4, 0.9])
sources = [None, SOURCE]


@given(
    path=st.sampled_from(PATHS),
    t=st.floats(0.05, 0.95),
    label=st.sampled_from([None, 0, 1, 2]),
    i=st.sampled_from([0, 1]),
)
def test_the_score_is_the_gradient_and_mass_is_conserved(path, t, label, i):
    """∇ log p by autograd; d log p/dt = −div v − v·∇ log p, the continuity equation, by differences and autograd."""
    x, t = (2 * torch.randn(5, 3, dtype=torch.float64)).requires_grad_(), torch.tensor(t, dtype=torch.float64)
    given_label = None if label is None else torch.full((5,), label)
    options = dict(label=given_label, source=sources[i])
    exact = MIXTURE.predict(x, t, path, **options)
    (gradient,) = torch.autograd.grad(exact.log_density.sum(), x, retain_graph=True)
    assert torch.allclose(exact.score, gradient, atol=1e-9)
    velocity, h = MIXTURE.value("velocity", x, t, path, **options), 1e-6
    divergence = sum(torch.autograd.grad(velocity[:, k].sum(), x, retain_graph=True)[0][:, k] for k in range(3))
    later, earlier = (MIXTURE.predict(x, t + sign * h, path, **options).log_density for sign in (1, -1))
    change = (later - earlier) / (2 * h)
    assert torch.allclose(change, -divergence - (velocity * gradient).sum(1), rtol=1e-4, atol=1e-3)


def test_density_at_data_against_torch():
    x = torch.randn(7, 3, dtype=torch.float64) * 2
    components = torch.distributions.MultivariateNormal(
        MIXTURE.means, scale_tril=MIXTURE.stds[:, None, None] * torch.eye(3, dtype=torch.float64)
    )
    truth = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(MIXTURE.weights), components)
    assert torch.allclose(MIXTURE.log_density(x, 0.0, LINEAR), truth.log_prob(x), atol=1e-10)
    standard = torch.distributions.MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())
    assert torch.allclose(MIXTURE.log_density(x, 1.0, LINEAR), standard.log_prob(x), atol=1e-10)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_expectations_are_regressions(path):
    """E[f·target] = E[f·prediction] for any f of x: by a million draws, with error bars."""
    count = 400_000
    data, component = MIXTURE.sample(count, seed=1)
    source, _ = SOURCE.sample(count, seed=2)
    z, t = torch.randn(count, 3), 0.4
    latent = (z,) if path.latent_noise else ()
    x = path.interpolate(data, source, t, *latent)
    kinds = ["velocity", "noise"] + (["drift"] if path.latent_noise else ["data"])
    for kind in kinds:
        target = path.target(kind, data, source, t, *latent)
        error = target - MIXTURE.value(kind, x, t, path, source=SOURCE)
        for f in (torch.ones_like(x), torch.sin(x), torch.tanh(x.flip(1))):
            sample = error * f
            margin = 5 * sample.std() / math.sqrt(3 * count)
            assert abs(float(sample.mean())) < margin, kind
    assert set(component.tolist()) == {0, 1, 2}


def test_samples_have_the_moments_and_labels_asked_for():
    x, component = MIXTURE.sample(200_000)
    for k in range(3):
        mine = x[component == k]
        assert len(mine) / 200_000 == pytest.approx(float(MIXTURE.weights[k]), abs=0.005)
        assert torch.allclose(mine.mean(0).double(), MIXTURE.means[k], atol=0.02)
        assert float((mine - mine.mean(0)).std()) == pytest.approx(float(MIXTURE.stds[k]), rel=0.02)
    x = torch.randn(4, 3, dtype=torch.float64)
    only = GaussianMixture(MIXTURE.means[:1], MIXTURE.stds[:1])
    assert torch.allclose(
        MIXTURE.value("velocity", x, 0.3, LINEAR, label=torch.zeros(4, dtype=torch.long)),
        only.value("velocity", x, 0.3, LINEAR),
    )
    unlabelled = MIXTURE.value("velocity", x, 0.3, LINEAR)
    assert torch.equal(MIXTURE.value("velocity", x, 0.3, LINEAR, label=torch.full((4,), 2)), unlabelled)


def test_the_backbone_runs_in_any_solver_and_precision():
    flow = MIXTURE.flow(LINEAR)
    x = solvers.build("heun", steps=50)(flow, torch.randn(3000, 3), label=torch.zeros(3000, dtype=torch.long))
    assert torch.allclose(x.mean(0).double(), MIXTURE.means[0], atol=0.05)
    assert float((x - x.mean(0)).std()) == pytest.approx(0.3, rel=0.05)
    for kind in ("score", "noise", "data"):
        other = MIXTURE.flow(LINEAR, kind)
        state, t = torch.randn(4, 3), torch.tensor([0.2, 0.4, 0.6, 0.8])
        label = torch.tensor([0, 1, 1, 2])
        assert torch.allclose(other(state, t, label=label).velocity, flow(state, t, label=label).velocity, atol=1e-4)


def test_bad_mixtures():
    for options in (
        dict(means=[1.0, 2.0], stds=1.0),
        dict(means=[[1.0]], stds=0.0),
        dict(means=[[1.0], [2.0]], stds=1.0, weights=[0.5, 0.6]),
        dict(means=[[1.0], [2.0]], stds=1.0, labels=[0]),
    ):
        with pytest.raises(InputError, match="got"):
            GaussianMixture(**options)
    with pytest.raises(InputError, match="got labels for a mixture without"):
        SOURCE.value("velocity", torch.zeros(2, 3), 0.5, LINEAR, label=torch.zeros(2))


# --- the checks find what is wrong -----------------------------------------------------------------------------------


class Wrong(Interpolant):
    """The trigonometric path with one fault."""

    def __init__(self, fault):
        self.fault = fault

    def evaluate(self, t):
        angle = math.pi / 2 * t
        alpha, sigma, rate = angle.cos(), angle.sin(), math.pi / 2
        faults = {
            "sign": Coefficients(alpha, sigma, rate * sigma, rate * alpha),
            "rate": Coefficients(alpha, sigma, -rate * sigma, alpha),
            "reversed": Coefficients(sigma, alpha, rate * alpha, -rate * sigma),
            "precision": Coefficients(alpha.float(), sigma.float(), -rate * sigma.float(), rate * alpha.float()),
            "shape": Coefficients(*(c.reshape(-1) for c in (alpha, sigma, -rate * sigma, rate * alpha))),
            "standing": Coefficients(alpha, 0 * sigma, -rate * sigma, 0 * alpha),
        }
        return faults[self.fault]

    def _time_at(self, angle):
        return angle * (2 / math.pi)


@pytest.mark.parametrize("fault", ["sign", "rate", "reversed", "precision", "shape", "standing"])
def test_a_wrong_path_is_found(fault):
    with pytest.raises((AssertionError, InputError, RuntimeError)):
        check_interpolant(Wrong(fault))


@pytest.mark.parametrize("method", ["interpolate", "velocity", "convert", "_time_at"])
def test_a_wrong_method_is_found(method, monkeypatch):
    class Mine(type(LINEAR)):
        pass

    original = getattr(Mine, method)
    monkeypatch.setattr(Mine, method, lambda *given, **options: 1.01 * original(*given, **options))
    check_interpolant(LINEAR)
    with pytest.raises((AssertionError, InputError)):
        check_interpolant(Mine())


class Slow(Euler):
    """Moves nine tenths as far as it should."""

    def step(self, run, x, number, t, t_next):
        return super().step(run, x, number, t, 0.1 * t + 0.9 * t_next)


class Boastful(Euler):
    order = 2


class TwoCalls(Euler):
    """Calls the network at its end, against what it says."""

    def step(self, run, x, number, t, t_next):
        run.predict(x, t_next)
        return super().step(run, x, number, t, t_next)


@pytest.mark.parametrize("solver", [Slow, Boastful, TwoCalls])
def test_a_wrong_solver_is_found(solver):
    check_solver(Euler, steps=100)
    with pytest.raises(AssertionError):
        check_solver(solver, steps=100)


@pytest.mark.parametrize("name", solvers.names())
def test_solvers_of_the_registry(name):
    if name == "mean-flow":
        pytest.skip("needs a network of average velocities; see test_mean_flow.py")
    if name == "taylor":
        pytest.skip("needs a network with accelerations; see test_deepflow_inference.py")
    entry = solvers.registry.entry(name)
    extra = {"ode": {"method": "heun3"}, "exponential": {"eta": 0.0}}.get(name, {})
    stepped = "grid" in entry.options()
    inside = {"start": 0.9, "end": 0.2} if name in ("dpm++", "unipc") else {}  # where their orders are reached
    build = partial(solvers.build, name, **extra, **inside)
    check_solver(build, steps=200 if stepped else None, order_steps=(80, 240) if inside else (20, 80))


GUIDED = {"apg": dict(momentum=-0.5, norm=2.0), "cfg-zero": dict(rescale=0.7)}


@pytest.mark.parametrize("path", ["linear", "trigonometric"])
@pytest.mark.parametrize("name", guidance.names())
def test_guidance_of_the_registry(name, path):
    if name in ("branch", "internal", "look-ahead"):
        pytest.skip("needs a network with branches; see test_deepflow_inference.py")
    path = interpolants.build(path)
    weak = GaussianMixture([[0.5, 0.5], [-0.5, 1.0]], [0.9, 0.7], labels=[0, 1]).flow(path)
    options = dict(weak=weak) if name == "autoguidance" else {}
    check_guidance(partial(guidance.build, name, **options), path=path)
    check_guidance(partial(guidance.build, name, interval=(0.2, 0.8), **options, **GUIDED.get(name, {})), path=path)


def test_a_wrong_guidance_is_found(monkeypatch):
    build = guidance.registry.entry("classifier-free").factory
    with pytest.raises(AssertionError, match="velocity at scale 1"):
        check_guidance(lambda scale: build(scale=scale + 0.1))
    with pytest.raises(AssertionError, match="scale 2 changes nothing"):
        check_guidance(lambda scale: build(scale=1.0))
    momentum = partial(guidance.build, "apg", momentum=-0.5)
    check_guidance(momentum)
    past = guidance.base.Past()
    monkeypatch.setattr(guidance.flows, "Past", lambda: past)  # one memory for all trajectories
    with pytest.raises((AssertionError, RuntimeError), match="beside another trajectory"):
        check_guidance(momentum)


def test_a_wrong_backbone_is_found():
    check_backbone(backbones.build("mlp", num_classes=3))
    check_backbone(backbones.build("mlp", dim=5))
    wrap = partial(backbones.wrap, input_shape=(3,))
    for function, message in (
        (lambda x, t: torch.randn_like(x), "draws random numbers"),
        (lambda x, t: x[:, :1], "shape"),
        (lambda x, t: x.double(), "type"),
        (lambda x, t: x - x.mean(0), "two rows alone"),
        (lambda x, t: x * (t if t.ndim else t + 1).reshape(-1, 1), "t as a scalar"),
    ):
        with pytest.raises(AssertionError, match=message):
            check_backbone(wrap(function))


IMAGES = GaussianMixture(torch.tensor([-0.5, 0.5]).reshape(2, 1, 1, 1).expand(2, 1, 4, 4), 0.3)
NETWORK = dict(input_size=4, patch_size=2, in_channels=1, hidden_size=16, num_heads=2, depth=2, num_classes=0)
SPECIAL = {  # what an objective needs beside its path: options, network, further arguments
    "drift": lambda: (dict(coupling="independent"), None, {}),
    "deepflow": lambda: ({}, backbones.build("deepflow", **NETWORK, acceleration_width=8), {}),
    "mean-flow": lambda: ({}, backbones.build("sit", **NETWORK, takes_gap=True), {}),
    "alignment": lambda: (
        {},
        backbones.build("sit", **NETWORK, align_layer=1, align_dims=(5,)),
        {"features": (torch.randn(600, 4, 5),)},
    ),
}


@pytest.mark.parametrize("name", objectives.names())
def test_objectives_of_the_registry(name):
    path = interpolants.build("bridge" if name == "drift" else "linear")
    options, network, given = SPECIAL.get(name, lambda: ({}, None, {}))()
    objective = objectives.build(name, interpolant=path, **options)
    check_objective(objective, backbone=network, data=IMAGES if network else None, **given)


def test_a_wrong_objective_is_found():
    truth = GaussianMixture([[1.0, -1.0], [-2.0, 0.5]], [0.5, 0.3])
    velocity = objectives.build("velocity", interpolant=LINEAR)
    check_objective(velocity, exact=truth.backbone(LINEAR))
    biased = backbones.wrap(lambda x, t: 1.8 * truth.value("velocity", x, t, LINEAR))
    with pytest.raises(AssertionError, match="the loss .* of the truth is above"):
        check_objective(velocity, exact=biased)

    class Noisy(type(velocity)):
        def loss(self, backbone, data, *given):
            return super().loss(backbone, data + 0.1 * torch.randn_like(data), *given)

    with pytest.raises(AssertionError, match="torch's global generator"):
        check_objective(Noisy(LINEAR))


# --- flows made of others --------------------------------------------------------------------------------------------


def test_exact_flows_of_noise_keep_labels():
    flow = Flow(MIXTURE.backbone(LINEAR), LINEAR)
    assert flow.backbone.null_label == 2 and flow.backbone.input_shape == (3,)
    assert Draws(0).normal("x", range(2), (3,)).shape == (2, 3)
