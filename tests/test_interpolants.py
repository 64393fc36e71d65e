from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import jvp

from pathline import Flow, InputError, InputTypeError, OpenEndError, UnknownNameError, backbones, interpolants
from pathline.interpolants.base import KINDS
from pathline.interpolants.bridge import TwoEnded
from pathline.testing import check_interpolant

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


OPTIONS = {
    "polynomial": [{}, {"power": 3}, {"power": 0.5}, {"power": 1}],
    "vp": [{}, {"beta_min": 0.5, "beta_max": 7.0}, {"beta_min": 3, "beta_max": 3}],
    "two-ended": [{}, {"path": "trigonometric"}, {"path": {"name": "polynomial", "power": 2}}],
    "stochastic": [{}, {"gamma": "sine-squared", "scale": 0.7, "path": "trigonometric"}, {"path": "vp"}],
    "bridge": [{}, {"scale": 0.3}],
}
ALL = [interpolants.build(name, **o) for name in interpolants.names() for o in OPTIONS.get(name, [{}])]
PATHS = [path for path in ALL if not isinstance(path, TwoEnded)]
paths = pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
every = pytest.mark.parametrize("path", ALL, ids=lambda path: type(path).__name__)


@every
def test_the_contract(path):
    check_interpolant(path)


# --- properties -------------------------------------------------------------------------------------------------------

times = st.floats(1e-3, 1 - 1e-3)
shapes = st.sampled_from([(1,), (3,), (3, 3), (2, 5, 7)])


@given(path=st.sampled_from(ALL), t=st.lists(times, min_size=1, max_size=5))
def test_rates_are_derivatives(path, t):
    t = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = jvp(lambda t: tuple(path.evaluate(t)[:2]), (t,), (torch.ones_like(t),))[1]
    at = path.coefficients(t)
    assert torch.allclose(at.alpha_rate, alpha, rtol=1e-9, atol=1e-9)
    assert torch.allclose(at.sigma_rate, sigma, rtol=1e-9, atol=1e-9)


@given(path=st.sampled_from(ALL), t=times, shape=shapes, batch=st.sampled_from(["scalar", "rows"]))
def test_velocity_is_the_derivative_of_the_path(path, t, shape, batch):
    """Central differences; a batch as large as its dimension included."""
    data, noise, z = torch.randn(3, 3, *shape, dtype=torch.float64)
    latent = (z,) if path.latent_noise else ()
    rows = torch.tensor(t, dtype=torch.float64)
    rows = rows if batch == "scalar" else rows.expand(3) * torch.tensor([1.0, 0.9, 0.8], dtype=torch.float64)
    h = 1e-7
    ahead, behind = (path.interpolate(data, noise, rows + sign * h, *latent) for sign in (1, -1))
    velocity = path.velocity(data, noise, rows, *latent)
    assert torch.allclose((ahead - behind) / (2 * h), velocity, rtol=1e-4, atol=1e-4)


@given(
    path=st.sampled_from(PATHS),
    t=times,
    shape=shapes,
    source=st.sampled_from(KINDS),
    target=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_conversions_against_the_definition(path, t, shape, source, target, dtype):
    data, noise = torch.randn(2, 3, *shape, dtype=torch.float64)
    exact = torch.tensor(t, dtype=torch.float64)
    alpha, sigma, alpha_rate, sigma_rate = path.evaluate(exact)
    x = alpha * data + sigma * noise
    truth = {"data": data, "noise": noise, "velocity": alpha_rate * data + sigma_rate * noise, "score": -noise / sigma}
    converted = path.convert(truth[source].to(dtype), x.to(dtype), exact, source=source, target=target)
    # what rounding of x and of the value is blown up by: the derivatives of the conversion
    wronskian = abs(float(sigma_rate * alpha - alpha_rate * sigma))
    growth = (1 + float(truth[source].abs().max())) * (1 + 1 / float(alpha)) * (1 + 1 / float(sigma))
    growth *= (1 + 1 / wronskian) * (1 + wronskian) * (1 + abs(float(alpha_rate))) * (1 + abs(float(sigma_rate)))
    assert converted.dtype == dtype
    assert float((converted - truth[target]).abs().max()) < 20 * torch.finfo(dtype).eps * growth


@given(path=st.sampled_from(ALL), t=st.floats(0, 1))
def test_the_angle_tells_the_time(path, t):
    exact = torch.tensor(t, dtype=torch.float64)
    angle = path.angle(exact)
    assert float(path.angle(path.time_at(angle)) - angle) == pytest.approx(0, abs=1e-12)
    assert 0 <= float(angle) <= math.pi / 2


@given(
    path=st.sampled_from(ALL), t=st.floats(0.05, 0.95), dtype=st.sampled_from(FLOATS), shape=st.sampled_from([(), (5,)])
)
def test_every_float_type_and_shape_of_t(path, t, dtype, shape):
    rounded = torch.full(shape, t, dtype=dtype)
    for ours, exact in zip(path.coefficients(rounded), path.coefficients(rounded.double()), strict=True):
        assert ours.dtype == dtype and ours.shape == shape
        scale = 1 + exact.abs()  # the polynomial's α is a power of the rounded 1 − t, its rate one less
        assert bool(((ours.double() - exact).abs() <= 60 * torch.finfo(dtype).eps * scale).all())


# --- ends -------------------------------------------------------------------------------------------------------------


def test_open_ends_by_path():
    build = interpolants.build
    table = {  # from a velocity: velocity, score, noise, data
        "linear": [(), (0.0,), (), ()],
        "trigonometric": [(), (0.0,), (), ()],
        "vp": [(0.0,), (0.0,), (0.0,), (0.0,)],
        "linear-vp": [(0.0,), (0.0,), (0.0,), (0.0,)],
        "polynomial": [(), (0.0, 1.0), (1.0,), (1.0,)],
    }
    for name, expected in table.items():
        path = build(name)
        found = [path.rate_ends(), *(path.open_ends("velocity", kind) for kind in ("score", "noise", "data"))]
        assert found == expected, name
    assert build("polynomial", power=0.5).rate_ends() == (1.0,)
    assert build("bridge").open_ends("velocity", "velocity") == (0.0, 1.0)
    assert build("stochastic", gamma="sine-squared").open_ends("velocity", "velocity") == ()
    assert build("bridge").open_ends("noise", "score") == (0.0, 1.0)
    linear, preserving = build("linear"), build("linear-vp")
    with pytest.raises(OpenEndError, match="got t = 0, where the LinearVariancePreserving path has no coefficients"):
        preserving.coefficients(0.0)
    with pytest.raises(OpenEndError, match="has no velocity"):
        preserving.velocity(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0.5, 0.0]))
    with pytest.raises(OpenEndError, match="has no score"):
        linear.target("score", torch.zeros(2, 3), torch.zeros(2, 3), 0.0)
    with pytest.raises(OpenEndError, match="has no velocity"):
        build("bridge").velocity(*torch.zeros(2, 2, 3), torch.tensor([0.5, 1.0]), torch.zeros(2, 3))


def test_the_paths_own_diffusion():
    """g² in closed form: 2t/(1 − t) on the linear path, β on vp, π·tan(πt/2) on the trigonometric one."""
    t = torch.linspace(0.1, 0.9, 7, dtype=torch.float64)
    truths = {
        "linear": 2 * t / (1 - t),
        "trigonometric": math.pi * torch.tan(math.pi * t / 2),
        "vp": 0.1 + 19.9 * t,
    }
    for name, truth in truths.items():
        assert torch.allclose(interpolants.build(name).own_diffusion(t), truth, atol=1e-12)
    linear, vp = interpolants.build("linear"), interpolants.build("vp")
    assert linear.open_ends("velocity", "diffusion") == (1.0,) and float(linear.own_diffusion(0.0)) == 0
    assert vp.open_ends("velocity", "diffusion") == (0.0,)  # its W is infinite there
    with pytest.raises(OpenEndError, match="has no diffusion of its own"):
        linear.own_diffusion(1.0)


def test_training_intervals():
    build = interpolants.build
    assert build("linear").training_interval("velocity") == (0, 1)
    assert build("linear").training_interval("noise") == build("linear").training_interval("data") == (0, 1)
    assert build("linear").training_interval("score") == (1e-3, 1)
    assert build("vp").training_interval("velocity") == (1e-5, 1)
    assert build("polynomial", power=0.5).training_interval("velocity") == (0, 1 - 1e-5)
    assert build("bridge").training_interval("velocity") == build("bridge").training_interval("score") == (1e-3, 0.999)
    assert build("bridge").training_interval("drift") == build("bridge").training_interval("noise") == (0, 1)


def test_score_of_data_at_the_noise_end_is_minus_x():
    x = torch.randn(4, 3)
    linear = interpolants.build("linear")
    velocity = x - torch.randn(4, 3)
    assert torch.allclose(linear.convert(velocity, x, 1.0, source="velocity", target="score"), -x)


@every
def test_batch_of_one_and_python_numbers(path):
    data, noise, z = torch.randn(3, 1, 4)
    latent = (z,) if path.latent_noise else ()
    at = path.interpolate(data, noise, torch.tensor([0.5]), *latent)
    assert torch.equal(path.interpolate(data, noise, 0.5, *latent), at)


def test_polynomial_of_power_one_is_linear_and_linear_vp_keeps_the_variance():
    t = torch.linspace(0, 0.99, 9, dtype=torch.float64)
    for ours, theirs in zip(
        interpolants.build("polynomial", power=1).coefficients(t),
        interpolants.build("linear").coefficients(t),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, atol=1e-15)
    for name in ("vp", "linear-vp", "trigonometric"):
        at = interpolants.build(name).evaluate(t)
        assert torch.allclose(at.alpha**2 + at.sigma**2, torch.ones_like(t), atol=1e-14)


def test_aliases():
    for alias, name in (("gvp", "trigonometric"), ("cosine", "trigonometric"), ("rectified", "linear")):
        assert type(interpolants.build(alias)) is type(interpolants.build(name))


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
    with pytest.raises(UnknownNameError, match="unknown prediction 'drift'"):
        linear.target("drift", x, x, 0.5)


def test_bad_paths():
    build = interpolants.build
    for name, options, message in (
        ("polynomial", dict(power=0), "got power 0"),
        ("polynomial", dict(power=math.nan), "got power nan"),
        ("vp", dict(beta_min=0), "expected 0 < beta_min <= beta_max"),
        ("vp", dict(beta_min=3, beta_max=2), "expected 0 < beta_min <= beta_max"),
        ("vp", dict(beta_max=math.inf), "expected 0 < beta_min <= beta_max"),
        ("stochastic", dict(gamma="white"), "got gamma 'white', expected one of brownian, sine-squared"),
        ("bridge", dict(scale=0), "got scale 0"),
        ("two-ended", dict(path="bridge"), "inside a two-ended one"),
    ):
        with pytest.raises(InputError, match=message):
            build(name, **options)
    with pytest.raises(InputError, match=r"got angles from .* expected \[0, π/2\]"):
        linear.time_at(torch.tensor([-0.1, 0.3]))


def test_what_a_path_between_data_sets_cannot_tell():
    two, bridge, z = interpolants.build("two-ended"), interpolants.build("bridge"), torch.zeros(3, 2)
    with pytest.raises(InputError, match="whose source has no known score; add latent noise"):
        two.convert(x, x, 0.5, source="velocity", target="score")
    with pytest.raises(InputError, match="whose source has no known score"):
        two.target("score", x, x, 0.5)
    with pytest.raises(InputError, match="no known score"):
        two.open_ends("velocity", "diffusion")
    with pytest.raises(InputError, match="one does not tell the other; train 'drift' and 'noise'"):
        bridge.convert(x, x, 0.5, source="velocity", target="score")
    with pytest.raises(InputError, match="got data from a predicted noise on a path with latent noise"):
        bridge.target("data", x, x, 0.5, z)
    with pytest.raises(InputError, match="the kind data on a path with latent noise"):
        Flow(backbones.wrap(lambda x, t: x), bridge, "data")
    with pytest.raises(InputError, match="no diffusion of its own"):
        bridge.open_ends("velocity", "diffusion")
    with pytest.raises(InputError, match="got no latent noise for the Bridge path; draw one"):
        bridge.interpolate(x, x, 0.5)
    with pytest.raises(InputError, match="got latent noise for the Linear path; leave it out"):
        linear.velocity(x, x, 0.5, z)
    with pytest.raises(InputError, match=r"latent noise of shape \(3, 1\), expected \(3, 2\)"):
        bridge.target("drift", x, x, 0.5, torch.zeros(3, 1))


def test_the_bridge_is_a_brownian_one():
    """Mean and variance of 200,000 paths at t, and the drift of its definition."""
    bridge, count = interpolants.build("bridge", scale=0.5), 200_000
    data, source, z = torch.full((count, 1), 2.0), torch.full((count, 1), -1.0), torch.randn(count, 1)
    for t in (0.2, 0.7):
        state = bridge.interpolate(data, source, t, z)
        assert float(state.mean()) == pytest.approx((1 - t) * 2 - t, abs=4 * 0.25 / math.sqrt(count))
        assert float(state.var()) == pytest.approx(0.25 * t * (1 - t), rel=0.02)
    assert torch.allclose(bridge.target("drift", data[:3], source[:3], 0.3, z[:3]), torch.full((3, 1), -3.0))
    assert bridge.coupling == {"name": "sinkhorn", "regularisation": 0.5, "relative": False}
    assert linear.coupling == interpolants.build("two-ended").coupling == "independent"
