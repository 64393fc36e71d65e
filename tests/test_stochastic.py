"""The stochastic samplers against closed forms: moments without Monte Carlo, strong orders, formulas by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pathline import Draws, InputError, OpenEndError, interpolants, solvers
from pathline.testing import GaussianMixture

LINEAR = interpolants.build("linear")
LOOPS = ("euler-maruyama", "stochastic-heun", "srk")


def moments(solver, exact):
    """Mean and standard deviation of a solver's result on the flow of a Gaussian, exactly.

    The result is affine in the start and in every draw: a sample for the mean, one for the start's spread, one a draw.
    """
    t = torch.tensor(solver.start, dtype=torch.float64)
    mean, std = exact.path.evaluate(t).alpha * exact.mean, exact.variance(t).sqrt()
    probe = torch.zeros(1, 1, dtype=torch.float64)
    draws = (solver.increments_shape(probe) or (0,))[0]
    x = mean.repeat(draws + 2, 1)
    x[1] += std
    increments = torch.zeros(draws, draws + 2, 1, dtype=torch.float64)
    increments[:, 2:, 0] = torch.eye(draws, dtype=torch.float64)
    out = solver.solve(exact.flow(), x, increments=increments if draws else None).x[:, 0]
    return float(out[0]), float((out[1:] - out[0]).square().sum().sqrt())


def truth(exact, end):
    t = torch.tensor(end, dtype=torch.float64)
    return float(exact.path.evaluate(t).alpha) * exact.mean, float(exact.variance(t).sqrt())


def test_the_papers_sampler_is_the_default():
    solver = solvers.build("euler-maruyama")
    assert solver.steps == 250 and solver.last_step == "mean"
    assert solver.times[0] == 1.0 and solver.times[-2] == pytest.approx(0.04) and solver.times[-1] == 0.0
    assert np.allclose(np.diff(solver.times[:-1]), -0.96 / 249)
    t = torch.tensor(0.3, dtype=torch.float64)
    assert float(solver.diffusion.squared(t, LINEAR)) == pytest.approx(0.6)


@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (1.0, 0.3), (0.3, 1.0)])
@pytest.mark.parametrize("norm", [1.0, 0.5])
def test_the_sde_has_the_paths_marginal(start, end, norm, gaussian):
    """Either direction, two diffusions: mean and spread are those of N(α·mean, α²·std² + σ²)."""
    exact, count = gaussian(), 40_000
    alpha0, alpha1 = 1 - start, 1 - end
    std0, std1 = ((a**2 * 0.25 + (1 - a) ** 2) ** 0.5 for a in (alpha0, alpha1))
    x = 2.0 * alpha0 + std0 * Draws(1).normal("start", range(count), (1,)).double()
    solver = solvers.build(
        "euler-maruyama", steps=400, grid="uniform", diffusion={"name": "linear", "norm": norm}, start=start, end=end
    )
    out = solver(exact.flow(), x, seed=2)
    # four standard errors, and a discretisation error of first order in 1/400
    assert abs(float(out.mean()) - 2.0 * alpha1) < 4 * std1 / math.sqrt(count) + 0.005
    assert abs(float(out.std()) - std1) < 4 * std1 / math.sqrt(2 * count) + 0.01


@pytest.mark.parametrize("last_step", ["mean", "tweedie", "euler", "none"])
def test_last_steps_by_their_formula(last_step, gaussian):
    exact = gaussian()
    x, z = torch.randn(2, 5, 3, dtype=torch.float64)
    increments = z[None] if last_step == "none" else None
    for end in (0.0, 0.1):
        solver = solvers.build(
            "euler-maruyama", steps=1, grid="uniform", diffusion="linear", last_step=last_step, start=0.3, end=end
        )
        out = solver.solve(exact.flow(), x, increments=increments).x
        t, dt = torch.tensor(0.3, dtype=torch.float64), end - 0.3
        velocity, score = exact.velocity(x, t), exact.score(x, t)
        data, noise = (x + 0.09 * score) / 0.7, -0.3 * score
        drift = velocity - 0.3 * score
        expected = {
            "mean": x + dt * drift,
            "tweedie": (1 - end) * data + end * noise,
            "euler": x + dt * velocity,
            "none": x + dt * drift + (0.6 * -dt) ** 0.5 * z,
        }
        assert torch.allclose(out, expected[last_step])


def test_mean_last_step_is_an_euler_maruyama_loop_without_its_noise(gaussian):
    """The whole default sampler, written out again from the published formulas."""
    exact, steps = gaussian(), 12
    x = torch.randn(3, 2, dtype=torch.float64)
    w = torch.randn(steps - 1, 3, 2, dtype=torch.float64)
    grid = [*np.linspace(1, 0.04, steps), 0.0]
    y = x.clone()
    for i in range(steps):
        t, dt = grid[i], grid[i + 1] - grid[i]
        v = exact.velocity(y, torch.tensor(t, dtype=torch.float64))
        score = -(y + (1 - t) * v) / t
        y = y + (v - t * score) * dt
        if i < steps - 1:
            y = y + math.sqrt(2 * t * -dt) * w[i]
    solution = solvers.build("euler-maruyama", steps=steps).solve(exact.flow(), x, increments=w)
    assert torch.allclose(solution.x, y, atol=1e-12)


# --- distributions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["linear", "trigonometric", "polynomial", "vp", "linear-vp"])
@pytest.mark.parametrize("diffusion", [*solvers.diffusions.names(), lambda t: 0.4 + t])
@pytest.mark.parametrize("loop", LOOPS)
def test_every_diffusion_path_and_last_step_has_the_paths_moments(loop, diffusion, path, gaussian):
    """Exact moments of the discrete chain: no Monte-Carlo error, a discretisation error of first order.

    ``mean`` loses the noise of its last step, a variance of g²Δt, and ``tweedie`` at data the variance of the data
    given its last state, s²σ²/(α²s² + σ²): both are taken into account.
    """
    exact, steps = gaussian(path), 200
    for last_step in ("mean", "tweedie", "euler", "none"):
        end = 0.02 if last_step == "none" else 0.0
        if loop == "srk" and path == "vp" and diffusion == "sbdm":
            end = 0.02  # it evaluates g at the end, where vp's own is infinite
        options = {"steps": steps, "grid": "uniform", "diffusion": diffusion, "last_step": last_step}
        solver = solvers.build(loop, **options, start=0.95, end=end)
        mean, std = moments(solver, exact)
        expected_mean, expected_std = truth(exact, end)
        t = torch.tensor(solver.times[-2], dtype=torch.float64)
        posterior = exact.std**2 * exact.path.evaluate(t).sigma ** 2 / exact.variance(t)
        noise = solver.diffusion.squared(t, exact.path) * (solver.times[-2] - end)
        lost = float({"mean": noise, "tweedie": posterior if end == 0 else 0.0}.get(last_step, 0.0))
        assert abs(mean - expected_mean) < 0.02, last_step
        assert abs(std**2 - expected_std**2 + lost) < 0.03 * expected_std**2, last_step


@pytest.mark.parametrize("name", ["euler-maruyama", "stochastic-heun", "srk", "exponential", "churn"])
def test_the_error_of_the_distribution_falls_with_the_steps(name, gaussian):
    """Weak order: at least 1, and the sizes relative to Euler–Maruyama that the field measured."""
    exact = gaussian("trigonometric")
    counts, errors = (20, 40, 80), []
    loop = {"grid": "uniform", "diffusion": "linear", "last_step": "none"} if name in LOOPS else {}
    loop |= {"churn": 5.0} if name == "churn" else {}  # below √2 − 1 a step, where γ falls with the steps
    for steps in counts:
        mean, std = moments(solvers.build(name, steps=steps, start=0.95, end=0.05, **loop), exact)
        expected_mean, expected_std = truth(exact, 0.05)
        errors.append(abs(mean - expected_mean) + abs(std - expected_std))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope > {"churn": 1.7, "srk": 1.7}.get(name, 0.85)


def test_mean_is_biased_unless_g_vanishes_at_data(gaussian):
    """Row R4 and the published figures: w = 1 and a last step of 0.04 give 0.417, SiT's sigma 0.494, Tweedie 0.500."""
    options = {"steps": 1000, "grid": "paper", "start": 0.999}
    stds = {
        (diffusion, last_step): moments(
            solvers.build("euler-maruyama", diffusion=diffusion, last_step=last_step, **options), gaussian()
        )[1]
        for diffusion in ("constant", "sigma")
        for last_step in ("mean", "tweedie", "euler")
    }
    assert stds["constant", "mean"] == pytest.approx(0.417, abs=0.003)
    assert stds["sigma", "mean"] == pytest.approx(0.494, abs=0.002)
    for diffusion in ("constant", "sigma"):
        assert stds[diffusion, "tweedie"] == pytest.approx(0.5, abs=0.002)
        assert stds[diffusion, "euler"] == pytest.approx(stds[diffusion, "tweedie"])  # on the linear path, to t = 0


def test_heuns_variance_is_many_times_nearer_than_eulers(gaussian):
    """Both of weak order 1, the constant of SiT's Heun far smaller."""
    for steps in (20, 40, 80):
        options = {"steps": steps, "grid": "uniform", "diffusion": "sigma", "last_step": "none", "end": 0.05}
        exact = truth(gaussian(), 0.05)[1] ** 2
        euler, heun = (
            abs(moments(solvers.build(loop, **options), gaussian())[1] ** 2 / exact - 1) for loop in LOOPS[:2]
        )
        assert 0.2 / steps < euler < 1.2 / steps and heun < euler / 5


@pytest.mark.parametrize("name", [*LOOPS, "exponential", "predictor-corrector", "churn"])
def test_the_noise_that_is_drawn_gives_the_distribution(name, gaussian):
    """With the solvers' own draws: mean and spread within four standard errors and 1 %."""
    exact, count = gaussian(), 40_000
    x = Draws(1).normal("start", range(count), (1,))
    out = solvers.build(name, steps=100)(exact.flow(), x, seed=2).double()
    assert abs(float(out.mean()) - 2.0) < 4 * 0.5 / math.sqrt(count) + 0.01
    assert abs(float(out.std()) - 0.5) < 4 * 0.5 / math.sqrt(2 * count) + 0.006


@pytest.mark.parametrize("name", [*LOOPS, "exponential", "predictor-corrector", "churn"])
def test_a_mixture_keeps_its_weights(name):
    """Two modes of weight 0.3 and 0.7, off the Gaussian case in which everything is affine."""
    mixture = GaussianMixture([[-2.0], [1.5]], [0.3, 0.5], weights=[0.3, 0.7])
    count = 20_000
    out = solvers.build(name, steps=120)(mixture.flow(LINEAR), Draws(5).normal("x", range(count), (1,)), seed=3)
    left = float((out < -0.5).double().mean())
    assert abs(left - 0.3) < 4 * math.sqrt(0.21 / count) + 0.01
    assert abs(float(out[out < -0.5].std()) - 0.3) < 0.02


# --- paths of one Brownian motion -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loop", "order"), [("euler-maruyama", 1), ("stochastic-heun", 1), ("srk", 1.5)])
def test_strong_orders_for_additive_noise(loop, order, gaussian):
    """Errors on one Brownian path against a solve of 1,024 steps; srk's second draws are the same path's ∫W dt."""
    exact, finest, count = gaussian(), 1024, 300
    start, end = 0.9, 0.1
    h = (start - end) / finest
    x, *_ = z = torch.randn(2 * finest + 1, count, 1, dtype=torch.float64)
    increment = z[1 : finest + 1] * math.sqrt(h)
    area = 0.5 * h * (increment + math.sqrt(h) * z[finest + 1 :] / math.sqrt(3))

    def solve(name, steps):
        many, wide = finest // steps, h * (finest // steps)
        parts, areas = (v.reshape(steps, many, count, 1) for v in (increment, area))
        total = parts.sum(1)
        integral = (areas + (parts.cumsum(1) - parts) * h).sum(1)
        first = total / math.sqrt(wide)
        second = math.sqrt(3) * (2 * integral / wide - total) / math.sqrt(wide)
        draws = torch.stack((first, second), 1).flatten(0, 1) if name == "srk" else first
        options = {"steps": steps, "grid": "uniform", "diffusion": "linear", "last_step": "none"}
        return solvers.build(name, start=start, end=end, **options).solve(exact.flow(), x, increments=draws).x

    reference, counts = solve("srk", finest), (8, 16, 32, 64)
    errors = [float((solve(loop, steps) - reference).square().mean().sqrt()) for steps in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope > order - 0.2 and slope < order + 0.7  # srk reaches 2 where the drift is nearly linear
    assert solvers.build(loop, steps=3).order == order


def test_the_two_draws_of_srk_have_the_covariance_of_a_brownian_path(gaussian):
    """(W, ∫W dt) over a step h: variances h and h³/3, covariance h²/2, by the response of one step without drift."""
    h = 0.3
    noise = solvers.build("srk", steps=1, diffusion="constant", last_step="none", start=0.9, end=0.9 - h)
    flow = GaussianMixture([[0.0]], 1.0).flow(LINEAR)
    draws = torch.eye(2, dtype=torch.float64)[:, :, None]
    zero = torch.zeros(2, 1, dtype=torch.float64)
    still = noise.solve(flow, zero, increments=0 * draws).x
    assert torch.allclose(still, zero, atol=1e-12)
    area = 0.5 * h * (math.sqrt(h) * torch.tensor([1.0, 1 / math.sqrt(3)]).double())
    assert float(area.square().sum()) == pytest.approx(h**3 / 3)
    assert float(area[0]) * math.sqrt(h) == pytest.approx(h**2 / 2)
    # x = drift's part + √2·W, and in the stage √2·(3/2)·J/h: written out for the linear drift of a Gaussian
    response = noise.solve(flow, zero, increments=draws).x[:, 0]
    t, node, g = 0.9, 0.9 - 0.75 * h, math.sqrt(2)

    def slope(time):
        variance = (1 - time) ** 2 + time**2
        velocity = (2 * time - 1) / variance
        return -velocity - 1 / variance  # −(v − score·g²/2) per unit of x, in the direction of the solve

    stage = 1.5 * g * area / h
    expected = h * 2 / 3 * slope(node) * stage + g * math.sqrt(h) * torch.tensor([1.0, 0.0]).double()
    assert torch.allclose(response, expected) and t == 0.9


# --- transitions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["linear", "trigonometric", "vp", "linear-vp"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_an_exponential_step_is_the_posterior_given_the_data(path, eta):
    """η = 1: mean and variance of x_t given x_s and the data, by conditioning the joint Gaussian of (x_t, x_s)."""
    interpolant = interpolants.build(path)
    s, t, data = 0.7, 0.45, 1.3
    now, there = (interpolant.evaluate(torch.tensor(v, dtype=torch.float64)) for v in (s, t))
    point = GaussianMixture([[data]], 1e-6).flow(
        interpolant
    )  # all data are one number, which is then expected for sure
    x = torch.tensor([[0.2], [0.2]], dtype=torch.float64)
    draws = torch.tensor([[[0.0], [1.0]]], dtype=torch.float64) if eta else None
    out = solvers.build("exponential", steps=1, eta=eta, start=s, end=t).solve(point, x, increments=draws).x[:, 0]
    ratio = float(now.alpha / there.alpha)
    covariance = ratio * float(there.sigma) ** 2  # of x_t and x_s given the data
    gain = covariance / float(now.sigma) ** 2
    mean = float(there.alpha) * data + gain * (0.2 - float(now.alpha) * data)
    variance = float(there.sigma) ** 2 - gain * covariance
    spread = eta * math.sqrt(variance)
    noise = (0.2 - float(now.alpha) * data) / float(now.sigma)
    expected = float(there.alpha) * data + math.sqrt(float(there.sigma) ** 2 - spread**2) * noise
    assert float(out[0]) == pytest.approx(expected, abs=1e-6)
    assert float(out[1] - out[0]) == pytest.approx(spread, abs=1e-6)
    if eta == 1:
        assert float(out[0]) == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize("path", ["linear", "trigonometric", "vp"])
def test_exponential_is_the_ode_and_the_reverse_sde(path, gaussian):
    exact = gaussian(path)
    for eta in (0.0, 0.3, 1.0):
        for start in (1.0, 0.9) if path != "vp" else (0.9,):
            mean, std = moments(solvers.build("exponential", steps=400, eta=eta, start=start), exact)
            assert abs(mean - 2) < 0.01 and abs(std - 0.5) < 0.01, (eta, start)
    if path == "linear":
        x = torch.randn(5, 3)
        euler, exponential = solvers.build("euler", steps=9), solvers.build("exponential", steps=9, eta=0.0)
        assert torch.allclose(euler(exact.flow(), x), exponential(exact.flow(), x), atol=1e-5)
        there = exponential.reversed()(exact.flow(), x)
        assert torch.allclose(there, euler.reversed()(exact.flow(), x), atol=1e-5)


def test_churn_adds_noise_by_the_forward_kernel(gaussian):
    """Row D10: noise without the rescaling gave means of 3.8 at 20 steps and 6.0 at 100; here 2, at any churn."""
    for path in ("linear", "trigonometric"):
        for steps in (20, 100):
            for churn in (0.0, 10.0, 80.0):
                mean, std = moments(solvers.build("churn", steps=steps, churn=churn), gaussian(path))
                assert abs(mean - 2) < 3 / steps**1.5 + 0.02 and abs(std - 0.5) < 0.03, (path, steps, churn)


def test_churn_without_noise_is_heun_with_a_last_step_of_euler(gaussian):
    exact = gaussian()
    x = torch.randn(4, 3, dtype=torch.float64)
    part = {"grid": {"name": "custom", "points": [1.0, 0.6, 0.3]}}
    halfway = solvers.build("heun", steps=2, end=0.3, **part)(exact.flow(), x)
    expected = halfway - 0.3 * exact.velocity(halfway, torch.tensor(0.3, dtype=torch.float64))
    grid = {"name": "custom", "points": [1.0, 0.6, 0.3, 0.0]}
    for options in ({"churn": 0.0}, {"churn": 40.0, "interval": (0.8, 0.9)}):
        assert torch.allclose(solvers.build("churn", steps=3, grid=grid, **options)(exact.flow(), x, seed=0), expected)
    noisy = solvers.build("churn", steps=3, grid=grid, interval=(0.6, 0.9))(exact.flow(), x, seed=0)
    assert not torch.allclose(noisy, expected)


def test_churn_by_hand(gaussian):
    """One step on the trigonometric path: rescaled, noised, and Heun's rule from the later time."""
    exact = gaussian("trigonometric")
    x, z = torch.randn(2, 3, 1, dtype=torch.float64)
    solver = solvers.build("churn", steps=2, churn=0.5, noise_scale=1.1, start=0.6, end=0.2)
    out = solver.solve(exact.flow(), x, increments=torch.stack((z, 0 * z)), trajectory=True).trajectory[1]
    later = 2 / math.pi * math.atan(1.25 * math.tan(0.3 * math.pi))
    a, b = math.cos(0.3 * math.pi), math.cos(later * math.pi / 2)
    spread = math.sqrt(math.sin(later * math.pi / 2) ** 2 - (b / a * math.sin(0.3 * math.pi)) ** 2)
    y = b / a * x + 1.1 * spread * z
    first = exact.velocity(y, torch.tensor(later, dtype=torch.float64))
    dt = 0.4 - later
    second = exact.velocity(y + dt * first, torch.tensor(0.4, dtype=torch.float64))
    assert torch.allclose(out, y + dt * (first + second) / 2)


def test_langevin_steps_by_hand_and_their_bias(gaussian):
    exact = gaussian()
    x, z = torch.randn(2, 3, 1, dtype=torch.float64)
    solver = solvers.build("predictor-corrector", steps=1, ratio=0.3, start=0.8, end=0.5)
    out = solver.solve(exact.flow(), x, increments=z[None]).x
    y = x - 0.3 * exact.velocity(x, torch.tensor(0.8, dtype=torch.float64))
    length = 2 * (0.3 * 0.5) ** 2
    expected = y + length * exact.score(y, torch.tensor(0.5, dtype=torch.float64)) + math.sqrt(2 * length) * z
    assert torch.allclose(out, expected)
    many = solvers.build("predictor-corrector", steps=1, corrections=400, ratio=0.3, start=0.55, end=0.5)
    _, std = moments(many, exact)
    variance = truth(exact, 0.5)[1] ** 2
    # the fixed point of Langevin's step of length δ on a Gaussian of variance V is V/(1 − δ/2V)
    assert std**2 == pytest.approx(variance / (1 - length / (2 * variance)), rel=1e-3)


def test_bad_options():
    build = solvers.build
    for options in ({"last_step": "nothing"}, {"last_step": "Mean"}):
        with pytest.raises(InputError, match="expected one of mean, tweedie, euler, none"):
            build("euler-maruyama", **options)
    for name, options in (
        ("exponential", {"eta": 1.5}),
        ("exponential", {"eta": math.nan}),
        ("churn", {"churn": -1.0}),
        ("churn", {"noise_scale": 0.0}),
        ("churn", {"interval": (0.7, 0.2)}),
        ("predictor-corrector", {"corrections": 0}),
        ("predictor-corrector", {"ratio": 0.0}),
    ):
        with pytest.raises(InputError, match="got"):
            build(name, steps=3, **options)
    for name in ("exponential", "churn", "predictor-corrector"):
        with pytest.raises(InputError, match="runs from noise to data"):
            build(name, steps=3, start=0.0, end=1.0)
        with pytest.raises(InputError, match="runs from noise to data"):
            build(name, steps=3).reversed()


def test_ends_that_do_not_fit_are_refused_before_the_first_call(gaussian):
    flow = gaussian("linear").flow()
    own = "where the diffusion Own is infinite on the Linear path"
    for name, options, message in (
        ("euler-maruyama", {"diffusion": "sbdm"}, f"evaluates t = 1, {own}"),
        ("srk", {"diffusion": "sbdm"}, f"evaluates t = 1, {own}"),
        ("stochastic-heun", {"last_step": "none"}, "evaluates t = 0, where the Linear path has no score"),
        ("euler-maruyama", {"start": 0.0, "end": 1.0}, "evaluates t = 0, where the Linear path has no score"),
        ("srk", {"start": 0.3, "end": 1.0, "diffusion": "sbdm", "last_step": "none"}, f"evaluates t = 1, {own}"),
    ):
        with pytest.raises(OpenEndError, match=message):
            solvers.build(name, steps=5, **options)(flow, torch.zeros(2, 1))
    assert flow.nfe == 0
