"""The methods for the ODE: orders, weights, diffusers' own multistep loops, and the adaptive one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pathline import Flow, InputError, OpenEndError, SolverError, backbones, interpolants, solvers
from pathline.testing import GaussianMixture

LINEAR = interpolants.build("linear")
ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "ab2": 2, "ab3": 3, "dpm++": 2, "unipc": 3, "exponential": 1}
OPTIONS = {"exponential": {"eta": 0.0}}
MIXTURE = GaussianMixture([[1.0, -1.0, 0.5], [-2.0, 0.5, 0.0]], [0.5, 0.3], weights=[0.4, 0.6])


def build(name, **options):
    return solvers.build(name, **OPTIONS.get(name, {}), **options)


def slope(steps, errors):
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("path", ["trigonometric", "linear", "vp"])
@pytest.mark.parametrize(("start", "end"), [(0.9, 0.2), (0.2, 0.9)])
def test_orders(name, path, start, end, gaussian):
    """Against the closed solution; a method may be better where the path's symmetry helps, and never worse."""
    if end > start and solvers.registry.entry(name).factory.one_way:
        pytest.skip("runs from noise to data")
    exact, x = gaussian(path, std=0.8), torch.randn(7, 3, dtype=torch.float64)
    counts, errors = (40, 80, 160) if name == "rk4" else (80, 160, 320), []
    for steps in counts:
        solution = build(name, steps=steps, start=start, end=end).solve(exact.flow(), x)
        errors.append(float((solution.x - exact.transported(x, start, end)).abs().max()))
    claimed = build(name, steps=1).order
    assert claimed == ORDERS[name]
    measured = slope(counts, errors)
    assert measured > claimed - 0.25
    if path == "trigonometric" and start > end:
        assert measured < claimed + (0.25 if name != "ab3" else 1.0)


@pytest.mark.parametrize(("name", "least"), [("heun", 1.8), ("ab2", 1.8), ("ab3", 2.8), ("dpm++", 1.5), ("unipc", 1.8)])
def test_orders_from_pure_noise_to_data(name, least, gaussian):
    """With infinite log-SNR at both ends the exponential methods fall back to one term there, and still converge so."""
    exact, x = gaussian("linear", std=0.8), torch.randn(7, 3, dtype=torch.float64)
    counts = (80, 160, 320)
    errors = [
        float((build(name, steps=n)(exact.flow(), x) - exact.transported(x, 1.0, 0.0)).abs().max()) for n in counts
    ]
    assert slope(counts, errors) > least


@given(st.lists(st.floats(0.02, 1.0), min_size=2, max_size=12), st.sampled_from(["ab2", "ab3"]))
def test_adams_bashforth_is_exact_for_polynomials_on_any_grid(gaps, name):
    """x' = p(t) of degree 1 and 2, from the second and third step on; the first steps' errors are computed by hand."""
    points = 0.98 - 0.9 * np.cumsum([0, *gaps]) / sum(gaps)
    degree = ORDERS[name] - 1
    flow = Flow(backbones.wrap(lambda x, t: (t[:, None] ** degree).expand_as(x)), LINEAR)
    solver = build(
        name, steps=len(gaps), start=points[0], end=points[-1], grid={"name": "custom", "points": points.tolist()}
    )
    x = solver.solve(flow, torch.zeros(1, 1, dtype=torch.float64), trajectory=True).trajectory[:, 0, 0].numpy()
    exact = points ** (degree + 1) / (degree + 1)
    begun = degree if name == "ab2" else 2
    assert np.allclose(x[begun:] - x[begun], exact[begun:] - exact[begun], atol=1e-6)
    assert x[1] == pytest.approx(
        (points[1] - points[0]) * (points[0] if name == "ab2" else ((points[0] + points[1]) / 2) ** 2)
    )


def test_equal_steps_have_the_textbook_weights(gaussian):
    x = torch.randn(3, 2, dtype=torch.float64)
    exact, h = gaussian("trigonometric"), -0.2
    solver = build("ab3", steps=4, start=0.9, end=0.1)
    states = solver.solve(exact.flow(), x, trajectory=True).trajectory
    v = [exact.velocity(state, torch.tensor(0.9 + h * i, dtype=torch.float64)) for i, state in enumerate(states)]
    assert torch.allclose(states[2], states[1] + h * (1.5 * v[1] - 0.5 * v[0]))
    assert torch.allclose(states[3], states[2] + h * (23 * v[2] - 16 * v[1] + 5 * v[0]) / 12)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("name", ["dpm++", "unipc"])
def test_against_diffusers(name, steps):
    """Its schedulers in flow mode, over its own sigmas, in float64: rounding apart, the same numbers."""
    diffusers = pytest.importorskip("diffusers")
    options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "solver_order": 2, "flow_shift": 3.0}
    kind = {"dpm++": diffusers.DPMSolverMultistepScheduler, "unipc": diffusers.UniPCMultistepScheduler}[name]
    scheduler = kind(**options)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()
    flow = MIXTURE.flow(LINEAR)
    y = x = torch.randn(5, 3, dtype=torch.float64)
    for t, sigma in zip(scheduler.timesteps, sigmas, strict=False):
        y = scheduler.step(flow(y, sigma).velocity, t, y).prev_sample
    grid = {"name": "custom", "points": sigmas.tolist()}
    solver = build(name, steps=steps, start=float(sigmas[0]), end=0.0, grid=grid)
    assert float((solver(flow, x) - y).abs().max()) < 2e-5  # its sigmas and their logarithms are float32


@pytest.mark.parametrize("order", [1, 2, 3])
def test_orders_of_unipc(order, gaussian):
    exact, x = gaussian("trigonometric", std=0.8), torch.randn(7, 3, dtype=torch.float64)
    errors = []
    for steps in (20, 40, 80):
        out = build("unipc", steps=steps, order=order, start=0.9, end=0.2)(exact.flow(), x)
        errors.append(float((out - exact.transported(x, 0.9, 0.2)).abs().max()))
    assert slope((20, 40, 80), errors) > build("unipc", steps=3, order=order).order - 0.25
    with pytest.raises(InputError, match="got order 4, expected 1, 2 or 3"):
        build("unipc", steps=3, order=4)


def test_methods_in_log_snr_are_exact_for_data_that_are_known():
    """One data point: the expected data never change, and one step of any length lands on the path."""
    flow = GaussianMixture([[1.5, -0.5]], 1e-4).flow(interpolants.build("trigonometric"))
    x = torch.randn(4, 2, dtype=torch.float64)
    for name in ("dpm++", "unipc", "exponential"):
        for steps in (1, 2, 5):
            assert torch.allclose(build(name, steps=steps)(flow, x), torch.tensor([1.5, -0.5]).double(), atol=1e-3)


@pytest.mark.parametrize("predicts", ["velocity", "noise", "data", "score"])
@pytest.mark.parametrize("name", [*ORDERS, "dopri5"])
def test_what_the_network_predicts_does_not_matter(name, predicts):
    steps = {} if name == "dopri5" else {"steps": 7}
    solver, x = build(name, **steps, start=0.95, end=0.05), torch.randn(5, 3, dtype=torch.float64)
    assert torch.allclose(solver(MIXTURE.flow(LINEAR, predicts), x), solver(MIXTURE.flow(LINEAR), x), atol=1e-8)


# --- inversion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [("heun", {"steps": 200}, 1e-3), ("midpoint", {"steps": 200}, 1e-3), ("rk4", {"steps": 80}, 1e-5),
     ("ab3", {"steps": 200}, 1e-3), ("dopri5", {"rtol": 1e-8, "atol": 1e-8}, 1e-6)],
)  # fmt: skip
def test_inversion_and_back(name, options, error):
    """Data to noise by the reversed solver and back; in between, the noise is standard normal."""
    data = MIXTURE.sample(2000)[0].double()
    solver, flow = build(name, **options), MIXTURE.flow(LINEAR)
    noise = solver.reversed()(flow, data)
    assert float((solver(flow, noise) - data).abs().max()) < error
    assert float(noise.mean(0).abs().max()) < 0.1 and float((noise.std(0) - 1).abs().max()) < 0.1
    again = solver.reversed().reversed()
    assert (again.start, again.end) == (1.0, 0.0) and torch.equal(again(flow, noise), solver(flow, noise))
    if "steps" in options:
        assert solver.reversed().times == solver.times[::-1]


# --- Dormand and Prince -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["linear", "trigonometric"])
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.0, 1.0), (0.8, 0.3)])
def test_dopri5_keeps_its_tolerance_inside_the_interval(path, start, end, gaussian):
    """Row B1, TD6: no call outside of [start, end], and the end is landed on, not interpolated."""
    exact, x = gaussian(path), torch.randn(5, 3, dtype=torch.float64)
    before = None
    for tolerance in (1e-4, 1e-6, 1e-9):
        solution = build("dopri5", start=start, end=end, rtol=tolerance, atol=tolerance).solve(exact.flow(), x)
        assert float((solution.x - exact.transported(x, start, end)).abs().max()) < 50 * tolerance
        low, high = sorted((start, end))
        assert float(solution.times.min()) == low and float(solution.times.max()) == high
        assert solution.times.shape == (solution.nfe, 5) and solution.nfe % 6 == 2
        assert before is None or solution.nfe >= before
        before = solution.nfe


def test_dopri5_has_order_five(gaussian):
    """Error against accepted steps, over tolerances."""
    exact, x = gaussian("trigonometric"), torch.randn(1, 3, dtype=torch.float64)
    rounds, errors = [], []
    for tolerance in (1e-6, 1e-8, 1e-10):
        solution = build("dopri5", rtol=tolerance, atol=tolerance).solve(exact.flow(), x)
        rounds.append(solution.nfe)
        errors.append(float((solution.x - exact.transported(x, 1.0, 0.0)).abs().max()))
    assert slope(rounds, errors) > 4.5


def stiff(x, t, rate=None):
    return -rate[:, None] * (x - torch.cos(3 * t[:, None]))


def test_one_hard_sample_changes_no_other(gaussian):
    """TD8: with the library's norm over the batch, one sample of rate 500 moved 63 others and was itself diluted."""
    flow = Flow(backbones.wrap(stiff), LINEAR)
    x, rate = torch.randn(64, 3, dtype=torch.float64), torch.full((64,), -1.0, dtype=torch.float64)
    hard = rate.clone()
    hard[5] = -500.0
    solver = build("dopri5")
    easy, mixed = solver(flow, x, rate=rate), solver(flow, x, rate=hard)
    others = torch.arange(64) != 5
    assert torch.equal(easy[others], mixed[others])
    assert torch.allclose(mixed[5:6], solver(flow, x[5:6], rate=hard[5:6]), rtol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_samples_of_dopri5_are_the_same_in_any_batch(size):
    flow, x = MIXTURE.flow(LINEAR), torch.randn(64, 3)
    solver = build("dopri5")
    whole = solver(flow, x)
    parts = torch.cat([solver(flow, x[i : i + size]) for i in range(0, 64, size)])
    assert float((parts - whole).abs().max()) <= 1e-5


def test_points_are_landed_on_and_change_little(gaussian):
    exact, x = gaussian("trigonometric"), torch.randn(4, 3, dtype=torch.float64)
    solution = build("dopri5", points=4, rtol=1e-7, atol=1e-7).solve(exact.flow(), x, trajectory=True)
    assert solution.trajectory.shape == (5, 4, 3) and torch.equal(solution.trajectory[0], x)
    for i, t in enumerate((1.0, 0.75, 0.5, 0.25, 0.0)):
        assert torch.allclose(solution.trajectory[i], exact.transported(x, 1.0, t), atol=1e-5)
    assert torch.equal(solution.trajectory[-1], solution.x)


def test_dopri5_shows_its_progress(capsys):
    build("dopri5", points=3)(MIXTURE.flow(LINEAR), torch.randn(2, 3), progress=True)
    assert "3/3" in capsys.readouterr().err


def test_dopri5_in_either_precision_and_any_shape():
    for shape in ((3,), (3, 2), (3, 2, 5, 7)):
        for dtype in (torch.float32, torch.float64):
            x = torch.randn(shape, dtype=dtype)
            flow = Flow(backbones.wrap(lambda x, t: -x), LINEAR)
            solution = build("dopri5").solve(flow, x)
            assert solution.x.dtype == dtype and torch.allclose(solution.x, math.e * x, rtol=1e-4)
    assert build("dopri5")(flow, torch.empty(0, 3)).shape == (0, 3)
    constant = Flow(backbones.wrap(lambda x, t: torch.ones_like(x)), LINEAR)
    assert torch.allclose(build("dopri5")(constant, torch.zeros(2, 3)), torch.tensor(-1.0))
    still = Flow(backbones.wrap(lambda x, t: torch.zeros_like(x)), LINEAR)
    assert torch.equal(build("dopri5")(still, torch.ones(2, 3)), torch.ones(2, 3))


def test_gradients_through_dopri5(gaussian):
    exact, x = gaussian(), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    out = build("dopri5", rtol=1e-8, atol=1e-8).solve(exact.flow(), x, gradients=True).x
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.allclose(gradient, torch.full_like(x, 0.5), atol=1e-5)  # the standardised state is constant
    assert not build("dopri5")(exact.flow(), x).requires_grad
    seen = []
    watched = Flow(backbones.wrap(lambda x, t: (seen.append(t.requires_grad), exact.velocity(x, t))[1]), exact.path)
    build("dopri5").solve(watched, x, gradients=True)
    assert seen and not any(seen)  # times and step lengths carry no gradient


def test_a_network_that_returns_the_same_buffer_or_nothing_finite():
    buffer = torch.empty(4, 3)
    plain = Flow(backbones.wrap(lambda x, t: torch.sin(3 * x)), LINEAR)
    reused = Flow(backbones.wrap(lambda x, t: torch.sin(3 * x, out=buffer)), LINEAR)
    x = torch.randn(4, 3)
    assert torch.equal(build("dopri5")(plain, x), build("dopri5")(reused, x))
    for bad in (math.nan, math.inf):
        for moment in (2.0, 0.5):
            flow = Flow(backbones.wrap(lambda x, t, b=bad, m=moment: torch.where(t[:, None] < m, b, x)), LINEAR)
            with pytest.raises(SolverError, match="vanishes: the network returns NaN") as caught:
                build("dopri5")(flow, x)
            assert caught.value.nfe < 1000 and caught.value.t >= min(moment, 1.0) - 1e-6


def test_a_blow_up_and_a_spent_budget_end():
    grow = Flow(backbones.wrap(lambda x, t: -(x**2)), LINEAR)  # 1/x falls by one: infinite at t = 0.5 from x = 2
    with pytest.raises(SolverError, match="vanishes") as caught:
        build("dopri5")(grow, torch.tensor([[2.0], [0.1]]))
    assert caught.value.t == pytest.approx(0.5, abs=1e-3) and caught.value.nfe < 2000
    jumpy = Flow(backbones.wrap(lambda x, t: torch.sign(torch.sin(1000 * t))[:, None].expand_as(x)), LINEAR)
    with pytest.raises(SolverError, match="the budget of 200 network calls is spent") as caught:
        build("dopri5", max_nfe=200, rtol=1e-9, atol=1e-9)(jumpy, torch.zeros(2, 1))
    assert caught.value.nfe <= 200 and jumpy.nfe == caught.value.nfe


def test_bad_options_of_dopri5():
    for options in ({"rtol": 0.0}, {"atol": -1.0}, {"rtol": math.nan}, {"max_nfe": 7}, {"points": 0}):
        with pytest.raises(InputError, match="got"):
            build("dopri5", **options)
    with pytest.raises(
        OpenEndError, match="evaluates t = 0, where the Linear path has no velocity from a predicted data"
    ):
        build("dopri5")(MIXTURE.flow(LINEAR, "data"), torch.zeros(2, 3))


def test_methods_that_run_one_way_say_so():
    for name in ("dpm++", "unipc"):
        with pytest.raises(InputError, match="runs from noise to data; give an end below the start"):
            build(name, steps=3).reversed()
        with pytest.raises(InputError, match="runs from noise to data"):
            build(name, steps=3, start=0.1, end=0.9)
