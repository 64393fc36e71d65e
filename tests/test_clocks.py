"""Foreign clocks against their definitions, and there and back again."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pathline import InputError, InputTypeError, UnknownNameError, interpolants
from pathline.interpolants import clocks

PATHS = ("linear", "trigonometric", "vp", "polynomial", "linear-vp")


def usable(clock):
    return ("linear",) if clock.startswith("diffusers") else PATHS


@given(data=st.data(), clock=st.sampled_from(clocks.names()), t=st.floats(1e-6, 1 - 1e-6))
def test_there_and_back(data, clock, t):
    path = data.draw(st.sampled_from(usable(clock)))
    value = clocks.convert(t, target=clock, interpolant=path)
    back = clocks.convert(value, source=clock, interpolant=path)
    assert float(back) == pytest.approx(t, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("clock", clocks.names())
def test_ends_are_closed(clock):
    for path in usable(clock):
        for t in (0.0, 1.0):
            value = clocks.convert(t, target=clock, interpolant=path)
            assert not bool(value.isnan())
            assert float(clocks.convert(value, source=clock, interpolant=path)) == t


def test_definitions():
    t = torch.tensor([0.1, 0.25, 0.8], dtype=torch.float64)
    for path in PATHS:
        at = interpolants.build(path).evaluate(t)
        sigma = clocks.convert(t, target="edm-sigma", interpolant=path)
        assert torch.allclose(sigma, at.sigma / at.alpha)
        assert torch.allclose(clocks.convert(t, target="log-snr", interpolant=path), -2 * sigma.log())
        assert torch.allclose(clocks.convert(t, target="sit", interpolant=path), 1 - t)
    assert torch.allclose(clocks.convert(t, target="diffusers-step"), 1000 * t)
    assert torch.allclose(clocks.convert(t, target="diffusers-sigma"), t)
    # EDM's scale to time on the linear path, t = σ/(1 + σ), and on the trigonometric one, (2/π)·atan σ
    sigma = torch.tensor([0.002, 1.0, 80.0], dtype=torch.float64)
    assert torch.allclose(clocks.convert(sigma, source="edm-sigma"), sigma / (1 + sigma))
    turned = clocks.convert(sigma, source="edm-sigma", interpolant="trigonometric")
    assert torch.allclose(turned, 2 / math.pi * torch.atan(sigma))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_shape_and_precision_are_kept(dtype):
    for clock in clocks.names():
        value = clocks.convert(torch.full((2, 3), 0.25, dtype=dtype), target=clock)
        assert value.shape == (2, 3) and value.dtype == dtype
        assert torch.allclose(clocks.convert(value, source=clock).float(), torch.full((2, 3), 0.25), atol=4e-3)


@given(t=st.floats(0.01, 0.99), a=st.floats(0.1, 10))
def test_shifts(t, a):
    """LightningDiT's map on the reversed clock with 1/a is ours with a; on σ it multiplies, on log-SNR it adds."""

    def shifted(t, a):
        return a * t / (1 + (a - 1) * t)

    ours = shifted(t, a)
    assert shifted(1 - t, 1 / a) == pytest.approx(1 - ours)
    assert clocks.shift(1 / a, source="reversed") == pytest.approx(a)
    read = {name: [float(clocks.convert(x, target=name)) for x in (t, ours)] for name in ("edm-sigma", "log-snr")}
    assert read["edm-sigma"][1] == pytest.approx(clocks.shift(a, source="edm-sigma") * read["edm-sigma"][0])
    assert clocks.shift(read["log-snr"][1] - read["log-snr"][0], source="log-snr") == pytest.approx(a)
    assert clocks.shift(a, source="diffusers-sigma") == clocks.shift(a, source="time") == a


def test_intervals_and_grids():
    """LightningDiT's interval from 0.125 on its clock, EDM's in σ; EDM's grid of ρ = 7 keeps its order."""
    assert clocks.interval(0.125, 1, source="reversed") == (0.0, 0.875)
    low, high = clocks.interval(0.28, 2.9, source="edm-sigma")
    assert (low, high) == (pytest.approx(0.28 / 1.28), pytest.approx(2.9 / 3.9))
    assert clocks.interval(-1, 2, source="log-snr") == tuple(pytest.approx(1 / (1 + math.exp(x / 2))) for x in (2, -1))
    steps = torch.arange(6, dtype=torch.float64) / 5
    sigma = (80 ** (1 / 7) + steps * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    times = clocks.grid([*sigma.tolist(), 0.0], source="edm-sigma")
    assert bool((times.diff() < 0).all()) and float(times[-1]) == 0 and torch.allclose(times[:-1], sigma / (1 + sigma))
    assert clocks.grid([0, 0.5, 1.0], source="reversed").tolist() == [1, 0.5, 0]


def test_bad_inputs():
    with pytest.raises(UnknownNameError, match="unknown clock 'sigma'"):
        clocks.convert(0.3, source="sigma")
    for value, clock in ((1.2, "reversed"), (-0.1, "edm-sigma"), (1001.0, "diffusers-step"), (math.nan, "log-snr")):
        with pytest.raises(InputError, match="on the clock"):
            clocks.convert(value, source=clock)
    with pytest.raises(InputTypeError, match="expected a floating-point tensor"):
        clocks.convert(torch.tensor([1, 2]), source="diffusers-step")
    with pytest.raises(InputError, match="got diffusers' steps on the VariancePreserving path"):
        clocks.convert(0.3, target="diffusers-step", interpolant="vp")
    with pytest.raises(InputError, match="got diffusers' σ on the Trigonometric path"):
        clocks.convert(0.3, source="diffusers-sigma", interpolant="gvp")
    with pytest.raises(InputError, match="expected low <= high"):
        clocks.interval(0.5, 0.2, source="reversed")
    for values in ([0.1, 0.5, 0.3], [0.2], [0.3, 0.3]):
        with pytest.raises(InputError, match="strictly monotone"):
            clocks.grid(values, source="reversed")
    for value in (0.0, -1.0, math.inf):
        with pytest.raises(InputError, match="got shift"):
            clocks.shift(value, source="reversed")
    with pytest.raises(InputError, match="got 0 steps"):
        clocks.build("diffusers-step", steps=0)
    assert float(clocks.convert(25.0, source={"name": "diffusers-step", "steps": 50})) == 0.5
