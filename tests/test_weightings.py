"""Weights against what they mean: the same loss in another space, and the published formulas on the linear path."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pathline import InputError, UnknownNameError, interpolants
from pathline.core.errors import MissingPackageError
from pathline.objectives import weightings

KINDS = ("velocity", "noise", "score", "data")
NAMES = ("none", "velocity", "likelihood", "sigma-sqrt", "cosmap", "min-snr")
times = st.floats(0.02, 0.98)


def built():
    """Yield every path without latent noise by name, but for those of packages that are not installed."""
    for name in interpolants.names():
        try:
            path = interpolants.build(name)
        except MissingPackageError:
            continue
        if not path.latent_noise:
            yield name, path


def kinds(path):
    """What can be predicted on a path: there is no score between two data sets."""
    return [kind for kind in KINDS if kind != "score" or not isinstance(path, interpolants.TwoEnded)]


PATHS = dict(built())
CASES = [(name, kind) for name, path in PATHS.items() for kind in kinds(path)]


def errors(path, t, kind, x, truth, wrong):
    """Squared error of two predictions of x in the space of a kind; a score in units of the noise."""
    at = path.coefficients(t)
    scale = at.sigma.reshape(-1, 1) if kind == "score" else 1.0
    first, second = (path.convert(v, x, t, source="velocity", target=kind) for v in (truth, wrong))
    return (scale * (first - second)).square().mean(1)


def test_names():
    assert set(NAMES) <= set(weightings.names())
    assert {"linear", "trigonometric", "vp", "polynomial", "linear-vp", "two-ended"} <= set(PATHS)


@pytest.mark.parametrize("name", ["velocity", "likelihood", "min-snr"])
@given(t=times, case=st.sampled_from(CASES))
def test_one_weighted_loss_whatever_is_predicted(name, t, case):
    """The weighted error of converted predictions is the weighted error of the velocities."""
    path, kind, times = PATHS[case[0]], case[1], torch.full((3,), t, dtype=torch.float64)
    x, truth, wrong = torch.randn(3, 3, 5, dtype=torch.float64)
    weighting = weightings.build(name)
    ours = weighting.weight(times, path, kind) * errors(path, times, kind, x, truth, wrong)
    velocities = weighting.weight(times, path, "velocity") * (truth - wrong).square().mean(1)
    assert torch.allclose(ours, velocities, rtol=1e-8)


def test_formulas_on_the_linear_path():
    t, linear = torch.linspace(0.05, 0.95, 13, dtype=torch.float64), interpolants.build("linear")

    def weight(name, kind, **options):
        return weightings.build(name, **options).weight(t, linear, kind)

    for kind in KINDS:
        assert torch.equal(weight("none", kind), torch.ones_like(t))
        assert torch.allclose(weight("sigma-sqrt", kind), t**-2)
        assert torch.allclose(weight("cosmap", kind), 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2))
    assert torch.equal(weight("velocity", "velocity"), torch.ones_like(t))
    assert torch.allclose(weight("velocity", "noise"), (1 - t) ** -2)
    assert torch.allclose(weight("velocity", "data"), t**-2)
    assert torch.allclose(weight("likelihood", "noise"), 1 / (t * (1 - t)))
    snr = ((1 - t) / t) ** 2
    for gamma in (5.0, 1.0):
        assert torch.allclose(weight("min-snr", "data", gamma=gamma), snr.clamp(max=gamma))
        assert torch.allclose(weight("min-snr", "noise", gamma=gamma), (gamma / snr).clamp(max=1))
        assert torch.allclose(weight("min-snr", "velocity", gamma=gamma), torch.minimum((1 - t) ** 2, gamma * t**2))


@pytest.mark.parametrize("path", [name for name, kind in CASES if kind == "score"])
def test_likelihood_is_half_the_squared_diffusion_on_the_score(path):
    """λ = g²/2 on ‖s − s'‖², with the path's own g: its definition, without W."""
    path, t = PATHS[path], torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    x, truth, wrong = torch.randn(3, 7, 2, dtype=torch.float64)
    plain = [path.convert(v, x, t, source="velocity", target="score") for v in (truth, wrong)]
    bound = path.own_diffusion(t) / 2 * (plain[0] - plain[1]).square().mean(1)
    ours = weightings.build("likelihood").weight(t, path, "score") * errors(path, t, "score", x, truth, wrong)
    assert torch.allclose(ours, bound, rtol=1e-9)


def test_cosmap_is_the_density_of_its_law():
    t = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    density = weightings.build("cosmap").weight(t, interpolants.build("linear"), "velocity")
    assert float(torch.trapezoid(density, t)) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_shape_and_precision(name, dtype):
    t = torch.tensor([0.2, 0.5, 0.7], dtype=dtype)
    weight = weightings.build(name).weight(t, interpolants.build("vp"), "velocity")
    assert weight.shape == (3,) and weight.dtype == dtype and bool((weight > 0).all())


@pytest.mark.parametrize(
    ("name", "path", "kind", "end"),
    [
        ("velocity", "linear", "noise", 1),
        ("velocity", "trigonometric", "noise", 1),
        ("velocity", "linear", "data", 0),
        ("likelihood", "linear", "velocity", 0),
        ("likelihood", "linear", "score", 0),
        ("sigma-sqrt", "linear", "velocity", 0),
        ("min-snr", "polynomial", "velocity", 1),
    ],
)
def test_infinite_weights_are_refused(name, path, kind, end):
    weighting, path = weightings.build(name), PATHS[path]
    with pytest.raises(InputError, match=f"infinite at t = {end}; keep the objective's interval away"):
        weighting.check(path, kind, (0.0, 1.0))
    weighting.check(path, kind, (0.001, 0.999))


def test_finite_weights_are_accepted():
    for name, kind in (("none", "data"), ("cosmap", "noise"), ("velocity", "velocity"), ("min-snr", "data")):
        weightings.build(name).check(PATHS["linear"], kind, (0.0, 1.0))
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert weightings.build("min-snr").weight(ends, PATHS["linear"], "data").tolist() == [5.0, 0.0]
    assert weightings.build("min-snr").weight(ends, PATHS["linear"], "noise").tolist() == [0.0, 1.0]


def test_bad_options():
    for gamma in (0, -1, math.nan, math.inf):
        with pytest.raises(InputError, match=f"got gamma {gamma}"):
            weightings.build("min-snr", gamma=gamma)
    with pytest.raises(UnknownNameError, match="unknown weighting 'min_snr'; did you mean 'min-snr'"):
        weightings.build("min_snr")  # D15: an unknown name is not uniform in silence
