"""Paths against the numbers of SiT's program, whose clock runs the other way: t there is 1 − t here.

Velocities and rates change their sign with the clock; α, σ, scores, noise and diffusion do not.
"""

from __future__ import annotations

import pytest
import torch

from pathline import Flow, backbones, interpolants
from pathline.interpolants import clocks

CASES = {"linear": "linear", "gvp": "trigonometric", "vp": "vp"}
cases = pytest.mark.parametrize("case", CASES)
FLOATS = [(torch.float64, 1e-10), (torch.float32, 5e-6)]


def close(ours, theirs, tolerance):
    """Relative to the largest magnitude, as the cases are stated."""
    assert ours.shape == theirs.shape and bool(theirs.isfinite().all())
    scale = max(1.0, float(theirs.abs().max()))
    assert float((ours.double() - theirs.double()).abs().max()) / scale <= tolerance


def load(parity, case, dtype=torch.float64):
    _, given, wanted, about = parity(f"transport_{case}")
    path = interpolants.build(CASES[case])
    return path, {key: value.to(dtype) for key, value in given.items()}, wanted, about


def ours(t):
    return clocks.convert(t, source="sit")


@cases
@pytest.mark.parametrize(("dtype", "tolerance"), FLOATS)
def test_coefficients(case, dtype, tolerance, parity):
    path, given, wanted, _ = load(parity, case, dtype)
    at = path.coefficients(ours(given["t_grid"]))
    close(at.alpha, wanted["path/alpha"], tolerance)
    close(at.sigma, wanted["path/sigma"], tolerance)
    close(-at.alpha_rate, wanted["path/d_alpha"], tolerance)
    close(-at.sigma_rate, wanted["path/d_sigma"], tolerance)
    close(-at.alpha_rate / at.alpha, wanted["path/d_alpha_over_alpha"], tolerance)
    close(at.alpha_rate / at.alpha, wanted["path/drift_at_one"], tolerance)
    close(path.own_diffusion(ours(given["t_grid"])) / 2, wanted["path/drift_variance"], tolerance)


@cases
@pytest.mark.parametrize(("dtype", "tolerance"), FLOATS)
def test_conversions(case, dtype, tolerance, parity):
    path, given, wanted, _ = load(parity, case, dtype)
    x, v, t = given["x"], given["v"], ours(given["t"])
    close(path.convert(-v, x, t, source="velocity", target="score"), wanted["convert/score_from_velocity"], tolerance)
    close(path.convert(-v, x, t, source="velocity", target="noise"), wanted["convert/noise_from_velocity"], tolerance)
    close(-path.convert(v, x, t, source="score", target="velocity"), wanted["convert/velocity_from_score"], tolerance)
    at = path.coefficients(t)
    close((at.alpha_rate / at.alpha).reshape(-1, 1, 1, 1) * x, wanted["convert/drift"], tolerance)
    close(path.own_diffusion(t) / 2, wanted["convert/drift_variance"].reshape(t.shape), tolerance)


@cases
@pytest.mark.parametrize("predicts", ["velocity", "score", "noise"])
def test_drift_and_score_of_a_model(case, predicts, parity):
    """The closed-form model of the case, read as each prediction, through Flow."""
    path, given, wanted, _ = load(parity, case)

    def model(x, t):
        there = (1 - t).reshape(-1, 1, 1, 1)
        value = 0.7 * torch.sin(1.3 * x + 2 * there) - 0.4 * x * torch.cos(3 * there) + 0.1 * there
        return -value if predicts == "velocity" else value

    prediction = Flow(backbones.wrap(model), path, predicts)(given["x"], ours(given["t"]))
    close(-prediction.velocity, wanted[f"model_{predicts}/ode_drift"], 1e-10)
    close(prediction.score, wanted[f"model_{predicts}/score"], 1e-10)


@cases
def test_intervals_of_training(case, parity):
    """Where the velocity's interval is closed there, it is here, and the same margin stands at vp's data end."""
    path, _, _, about = load(parity, case)
    low, high = about["loss"]["intervals"]["velocity"]["t0_t1"]
    assert path.training_interval("velocity") == (pytest.approx(1 - high), pytest.approx(1 - low))
