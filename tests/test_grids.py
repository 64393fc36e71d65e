"""Time grids and diffusion coefficients against their formulas, and against diffusers' schedules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pathline import InputError, InputTypeError, OpenEndError, UnknownNameError, interpolants, solvers
from pathline.interpolants import clocks
from pathline.solvers import diffusions, grids

LINEAR = interpolants.build("linear")
OPTIONS = {"dynamic-shift": {"tokens": 1024}, "custom": {"points": [0.9, 0.6, 0.5, 0.2]}}
LAID = [name for name in grids.names() if name != "custom"]


def build(name, **options):
    return grids.build(name, **{**OPTIONS.get(name, {}), **options})


@given(name=st.sampled_from(LAID), start=st.floats(0, 1), end=st.floats(0, 1), steps=st.integers(1, 40))
def test_grids_are_monotone_and_have_their_ends_in_either_direction(name, start, end, steps):
    if abs(start - end) < 0.05 or (name == "terminal" and not min(start, end) < 0.02 < max(start, end)):
        return
    times = build(name).times(steps, start, end)
    assert times.dtype == torch.float64 and len(times) == steps + 1
    assert times[0] == start and times[-1] == end
    assert bool((times.diff() * (end - start) > 0).all())
    if name not in ("uniform", "paper"):
        assert torch.equal(times.flip(0), build(name).times(steps, end, start))


@pytest.mark.parametrize("name", LAID)
def test_a_grid_is_a_function_of_its_options_alone(name):
    grid = build(name)
    first = grid.times(7, 1.0, 0.0)
    grid.times(3, 0.8, 0.0)
    assert torch.equal(grid.times(7, 1.0, 0.0), first)
    assert len(solvers.build("euler", steps=1, grid=grid).times) == 2  # one step is legal


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0, 6.93])
def test_a_shift_adds_to_the_logit(shift):
    """logit t = logit u + ln a; the end of the unshifted grid is met, however large the shift."""
    times = grids.build("shifted", shift=shift).times(9, 1.0, 0.0)[1:-1].numpy()
    u = np.linspace(1, 0, 10)[1:-1]
    assert np.allclose(np.log(times / (1 - times)), np.log(u / (1 - u)) + math.log(shift))
    parts = grids.build("shifted", shift=shift).times(9, 0.8, 0.1).numpy()
    logits = np.log(parts / (1 - parts)) - math.log(shift)
    assert np.allclose(np.diff(1 / (1 + np.exp(-logits))), np.diff(1 / (1 + np.exp(-logits)))[0])
    reversed_clock = clocks.shift(1 / shift, source="reversed")
    assert reversed_clock == pytest.approx(shift)


@pytest.mark.parametrize(("tokens", "shift"), [(256, 1.649), (1024, 1.878), (4096, 3.158)])
def test_dynamic_shift(tokens, shift):
    assert grids.build("dynamic-shift", tokens=tokens).shift == pytest.approx(shift, abs=5e-4)
    assert grids.build("dynamic-shift", tokens=4096, kind="linear").shift == pytest.approx(1.15)


@pytest.mark.parametrize("steps", [2, 5, 28])
def test_against_diffusers(steps):
    """diffusers' schedule of the same sigmas: shift, dynamic shift and terminal stretch."""
    diffusers = pytest.importorskip("diffusers")
    sigmas = np.linspace(1, 0, steps + 1)[:-1]
    cases = {
        "shifted": ({"shift": 3.0}, {}, {"name": "shifted", "shift": 3.0}),
        "dynamic": (
            {"use_dynamic_shifting": True},
            {"mu": math.log(grids.build("dynamic-shift", tokens=1024).shift)},
            {"name": "dynamic-shift", "tokens": 1024},
        ),
        "terminal": ({"shift": 3.0, "shift_terminal": 0.1}, {}, {"name": "terminal", "last": 0.1, "grid": "shifted"}),
    }
    for options, given_mu, ours in cases.values():
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**options)
        scheduler.set_timesteps(sigmas=sigmas.tolist(), **given_mu)
        assert np.allclose(grids.build(ours).times(steps, 1.0, 0.0).numpy(), scheduler.sigmas.numpy(), atol=1e-6)


@pytest.mark.parametrize("path", ["linear", "trigonometric"])
def test_edm_lies_in_its_variable(path):
    """Equation 5 of arXiv:2206.00364; EDM's own ends give its own points."""
    n = 18
    sigma = (80 ** (1 / 7) + np.arange(n) / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    grid = grids.build("edm", interpolant=path)
    start = float(clocks.convert(80.0, source="edm-sigma", interpolant=path))
    times = grid.times(n, start, 0.0)
    ratio = clocks.convert(times[:-1], target="edm-sigma", interpolant=path).numpy()
    assert np.allclose(ratio, sigma, rtol=1e-9) and times[-1] == 0
    from_noise = grid.times(n, 1.0, 0.0)
    assert from_noise[0] == 1 and torch.allclose(from_noise[1:], times[1:], rtol=1e-12)
    inside = clocks.convert(grid.times(n, start, 0.5), target="edm-sigma", interpolant=path).numpy() ** (1 / 7)
    assert np.allclose(np.diff(inside), np.diff(inside)[0])


def test_edm_over_time_is_another_grid():
    times = grids.build("edm", low=0.001, high=1.0, rho=3.0, variable="time").times(4, 1.0, 0.0).numpy()
    root = np.linspace(1, 0.1, 4)
    assert np.allclose(times, [*(root**3), 0])


def test_custom_points():
    for points in ([0.9, 0.6, 0.5, 0.2], [0.2, 0.5, 0.6, 0.9]):
        solver = solvers.build(
            "euler", steps=3, start=points[0], end=points[-1], grid={"name": "custom", "points": points}
        )
        assert solver.times == points
    for points, options, message in (
        ([1.0, 0.5, 0.0], {"steps": 3}, "3 points between 1 and 0 for 3 steps between 1 and 0; give steps=2"),
        ([0.9, 0.5, 0.0], {"steps": 2}, r"give steps=2, start=0.9 and end=0"),
        ([1.0, 0.5, 0.5, 0.0], {"steps": 3}, "strictly monotone"),
        ([1.0, 0.2, 0.5, 0.0], {"steps": 3}, "strictly monotone"),
        ([1.5, 0.5, 0.0], {"steps": 2}, "expected 0.0 to 1.0"),
        ([1.0, math.nan, 0.0], {"steps": 2}, "expected 0.0 to 1.0"),
        ([1.0], {"steps": 1}, "strictly monotone"),
    ):
        with pytest.raises(InputError, match=message):
            solvers.build("euler", grid={"name": "custom", "points": points}, **options)


class Backwards(grids.Grid):
    def __init__(self, times):
        self.points = times

    def times(self, steps, start, end):
        return torch.tensor(self.points, dtype=torch.float64)


def test_bad_grids():
    for points in ([1.0, 1.0, 0.0], [1.0, 0.3], [0.9, 0.5, 0.0], [1.0, 0.5, 0.1], [1.0, 1.2, 0.0], [0.0, 0.5, 1.0]):
        with pytest.raises(InputError, match="does not go from 1 to 0 in 2 strictly monotone steps"):
            solvers.build("euler", steps=2, grid=Backwards(points))
    for name, options in (
        ("shifted", {"shift": 0}),
        ("shifted", {"shift": math.inf}),
        ("dynamic-shift", {"tokens": 0}),
        ("dynamic-shift", {"tokens": 9, "base_tokens": 9, "largest_tokens": 9}),
        ("dynamic-shift", {"tokens": 9, "kind": "cubic"}),
        ("dynamic-shift", {"tokens": 9, "kind": "linear", "base": -1.0}),
        ("terminal", {"last": 1.0}),
        ("edm", {"low": 0.0}),
        ("edm", {"low": 2.0, "high": 1.0}),
        ("edm", {"rho": 0}),
        ("paper", {"last": 1.5}),
    ):
        with pytest.raises(InputError, match="got"):
            grids.build(name, **options)
    with pytest.raises(InputError, match="use the grid 'uniform'"):
        solvers.build("euler-maruyama", steps=3, start=0.03)
    with pytest.raises(InputError, match="give a time in between"):
        solvers.build("euler", steps=3, start=0.8, end=0.5, grid="terminal")
    with pytest.raises(InputError, match="does not fall from noise to data"):
        solvers.build("euler", steps=3, grid={"name": "edm", "variable": "log-snr"})
    with pytest.raises(InputError, match="got EDM's values 0.002 to 80"):
        solvers.build("euler", steps=3, start=1.0, end=0.999, grid="edm")


# --- diffusions -------------------------------------------------------------------------------------------------------


def test_diffusions_against_their_formulas_and_their_ends():
    """SiT's forms are g²/2: sbdm t/(1 − t) on the linear path. All six stand in test_transport_solvers.py."""
    t = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
    vp = interpolants.build("vp")
    build = diffusions.build
    assert torch.allclose(build("sbdm", norm=0.6).squared(t, LINEAR), 2 * 0.6 * t / (1 - t))
    assert torch.allclose(build("constant", norm=0.6).squared(t, LINEAR), torch.full_like(t, 1.2))
    assert torch.allclose(build("sigma").squared(t, LINEAR), build("linear").squared(t, LINEAR))
    assert torch.allclose(
        build("decreasing", norm=0.5).squared(t, LINEAR), 0.5 * (1 - 0.5 * torch.cos(torch.pi * t)) ** 2
    )
    assert build("sbdm").open_ends(LINEAR) == (1.0,) and build("sbdm").open_ends(vp) == (0.0,)
    for name in diffusions.names():
        if name != "sbdm":
            assert build(name).open_ends(LINEAR) == build(name).open_ends(vp) == ()
        for norm in (0, -1.0, float("nan"), float("inf")):
            with pytest.raises(InputError, match=f"got norm {norm}, expected a finite number above 0"):
                build(name, norm=norm)


def test_any_function_is_a_diffusion(gaussian):
    t = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
    assert torch.allclose(diffusions.build(lambda t: 0.3 + t).squared(t, LINEAR), (0.3 + t) ** 2)
    x, flow = torch.randn(5, 2), gaussian().flow()
    named = solvers.build("euler-maruyama", steps=9, diffusion="linear")
    own = solvers.build("euler-maruyama", steps=9, diffusion=lambda t: torch.sqrt(2 * t))
    assert torch.allclose(named(flow, x, seed=1), own(flow, x, seed=1), atol=1e-6)
    with pytest.raises(OpenEndError, match="t = 1, where the diffusion Custom is infinite"):
        solvers.build("euler-maruyama", diffusion=lambda t: 1 / (1 - t))(flow, x)


def test_bad_functions():
    for function, error, message in (
        (lambda t: torch.ones(3, 1), InputError, r"g\(t\) of shape \(3, 1\) for t of shape \(3,\)"),
        (lambda t: torch.ones(3), InputError, r"g\(t\) of shape \(3,\) for t of shape \(\)"),
        (lambda t: 1.0, InputTypeError, "got a float from g"),
        (lambda t: t - 0.5, InputError, "expected finite numbers ≥ 0"),
        (lambda t: t * math.nan, InputError, "expected finite numbers ≥ 0"),
    ):
        with pytest.raises(error, match=message):
            solvers.build("euler-maruyama", steps=3, diffusion=function)
    with pytest.raises(InputTypeError, match="expected a name or a Diffusion"):
        diffusions.build(3)
    with pytest.raises(UnknownNameError, match="did you mean 'sigma'"):
        diffusions.build("sigm")
