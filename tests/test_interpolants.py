from __future__ import annotations

import math

import pytest
import torch
from torch.func import jvp

from pathline import InputError, InputTypeError, OpenEndError, UnknownNameError, interpolants
from pathline.interpolants.base import KINDS, Coefficients, Interpolant

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Trigonometric(Interpolant):
    """A path of a test's own: the base class must carry any."""

    def evaluate(self, t):
        angle = math.pi / 2 * t
        return Coefficients(angle.cos(), angle.sin(), -math.pi / 2 * angle.sin(), math.pi / 2 * angle.cos())


class Polynomial(Interpolant):
    """α = (1 − t)², σ = 1 − α: W vanishes at t = 1."""

    def evaluate(self, t):
        return Coefficients((1 - t) ** 2, 1 - (1 - t) ** 2, -2 * (1 - t), 2 * (1 - t))


class LinearVariancePreserving(Interpolant):
    """α = 1 − t, σ = √(t(2 − t)): σ' is infinite at t = 0."""

    def evaluate(self, t):
        sigma = (t * (2 - t)).sqrt()
        return Coefficients(1 - t, sigma, -torch.ones_like(t), (1 - t) / sigma)


PATHS = [*(interpolants.build(name) for name in interpolants.names()), Trigonometric(), Polynomial()]
PATHS.append(LinearVariancePreserving())
paths = pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)


@paths
def test_rates_are_derivatives(path):
    t = torch.linspace(0.01, 0.99, 23, dtype=torch.float64)
    value, rate = jvp(lambda t: path.evaluate(t)[:2], (t,), (torch.ones_like(t),))
    coefficients = path.coefficients(t)
    for ours, truth in zip(coefficients, (*value, *rate), strict=True):
        assert torch.allclose(ours, truth, atol=1e-12)


@paths
def test_ends_are_data_and_noise(path):
    for t, alpha, sigma in ((0.0, 1.0, 0.0), (1.0, 0.0, 1.0)):
        at = path.evaluate(torch.tensor(t, dtype=torch.float64))
        assert float(at.alpha) == pytest.approx(alpha, abs=1e-15)
        assert float(at.sigma) == pytest.approx(sigma, abs=1e-15)


@paths
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (5,)])
def test_coefficients_keep_shape_and_precision(path, dtype, shape):
    for coefficient in path.coefficients(torch.full(shape, 0.25, dtype=dtype)):
        assert coefficient.shape == shape and coefficient.dtype == dtype


@paths
@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("shape", [(3,), (3, 3), (3, 2, 5, 7)])
def test_conversions_against_the_definition(path, source, target, shape):
    """A batch as large as its dimension included: a wrong broadcast would pass elsewhere."""
    data, noise = torch.randn(2, *shape, dtype=torch.float64)
    for t in (torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)):
        column = t.reshape(-1, *(1,) * (len(shape) - 1)) if t.ndim else t
        alpha, sigma, alpha_rate, sigma_rate = path.evaluate(column)
        x = alpha * data + sigma * noise
        truth = {
            "data": data,
            "noise": noise,
            "velocity": alpha_rate * data + sigma_rate * noise,
            "score": -noise / sigma,
        }
        converted = path.convert(truth[source], x, t, source=source, target=target)
        assert torch.allclose(converted, truth[target], atol=1e-10)
        assert torch.allclose(path.target(target, data, noise, t), truth[target], atol=1e-12)
        assert torch.allclose(path.interpolate(data, noise, t), x)


@paths
@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("end", [0.0, 1.0])
def test_an_open_end_raises_and_a_closed_one_is_finite_and_right(path, source, target, end):
    data, noise = torch.randn(2, 3, 5, dtype=torch.float64)
    t = torch.tensor(end, dtype=torch.float64)
    if end in path.open_ends(source, target):
        with pytest.raises(OpenEndError, match=f"got t = {end:g}.* keep t away"):
            path.convert(noise, data, t, source=source, target=target)
        return
    # the limit: a value of the source that is exact just inside, and continuous up to the end
    near = t + (1e-12 if end == 0 else -1e-12)
    alpha, sigma, alpha_rate, sigma_rate = path.evaluate(near)
    x = alpha * data + sigma * noise
    truth = {"data": data, "noise": noise, "velocity": alpha_rate * data + sigma_rate * noise, "score": -noise / sigma}
    converted = path.convert(truth[source], x, t, source=source, target=target)
    assert bool(converted.isfinite().all())
    if source == "score" and end == 0:  # the noise of a finite score at data is 0, of this one -σ·score
        return
    assert torch.allclose(converted, truth[target], atol=1e-5)


def test_open_ends_by_path():
    linear, trigonometric, polynomial, preserving = PATHS[0], *PATHS[-3:]
    for path in (linear, trigonometric):
        assert {target: path.open_ends("velocity", target) for target in KINDS} == {
            "velocity": (),
            "score": (0.0,),
            "noise": (),
            "data": (),
        }
    assert polynomial.open_ends("velocity", "data") == (1.0,)
    assert preserving.open_ends("velocity", "data") == (0.0,)
    with pytest.raises(OpenEndError, match="got t = 0, where the LinearVariancePreserving path has no coefficients"):
        preserving.coefficients(0.0)
    with pytest.raises(OpenEndError, match="has no velocity"):
        preserving.velocity(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0.5, 0.0]))
    with pytest.raises(OpenEndError, match="has no score"):
        linear.target("score", torch.zeros(2, 3), torch.zeros(2, 3), 0.0)


def test_score_of_data_at_the_noise_end_is_minus_x():
    x = torch.randn(4, 3)
    linear = interpolants.build("linear")
    velocity = x - torch.randn(4, 3)
    assert torch.allclose(linear.convert(velocity, x, 1.0, source="velocity", target="score"), -x)


@paths
def test_batch_of_one_and_python_numbers(path):
    data, noise = torch.randn(2, 1, 4)
    assert torch.equal(path.interpolate(data, noise, 0.5), path.interpolate(data, noise, torch.tensor([0.5])))


linear = interpolants.build("linear")
x = torch.zeros(3, 2)


@pytest.mark.parametrize(
    "t", [-0.1, 1.5, float("nan"), torch.tensor([0.1, 2.0, 0.3]), torch.tensor([0.1, math.nan, 0.2])]
)
def test_times_outside_the_interval(t):
    for call in (lambda: linear.coefficients(t), lambda: linear.interpolate(x, x, t), lambda: linear.convert(x, x, t)):
        with pytest.raises(InputError, match=r"got t = .* expected times in \[0, 1\]"):
            call()


@pytest.mark.parametrize("shape", [(2,), (3, 1), (1,), (1, 3)])
def test_times_of_a_wrong_shape(shape):
    with pytest.raises(InputError, match=r"got t of shape .*, expected \(3,\) or \(\); pass one time a sample"):
        linear.interpolate(x, x, torch.full(shape, 0.5))


def test_other_bad_inputs():
    with pytest.raises(InputTypeError, match="expected a floating-point tensor"):
        linear.coefficients(torch.tensor([1]))
    with pytest.raises(InputTypeError, match="got t of type str"):
        linear.coefficients("half")
    with pytest.raises(InputError, match=r"got t of shape \(2, 2\)"):
        linear.coefficients(torch.full((2, 2), 0.5))
    with pytest.raises(InputError, match="expected equal ones"):
        linear.interpolate(x, torch.zeros(3, 1), 0.5)
    with pytest.raises(UnknownNameError, match="unknown prediction 'speed'.*Known: data, noise, score, velocity"):
        linear.convert(x, x, 0.5, source="speed")
    with pytest.raises(UnknownNameError, match="did you mean 'velocity'"):
        linear.target("veloctiy", x, x, 0.5)
