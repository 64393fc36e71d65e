"""Losses and weights against the numbers of SiT's program, whose clock runs the other way: t there is 1 − t here.

Its velocities point the other way too; its scores and noise are ours. The cases hold one loss a sample, in float64.
"""

from __future__ import annotations

import pytest
import torch

from pathline import interpolants, objectives
from pathline.interpolants import clocks

CASES = {"linear": "linear", "gvp": "trigonometric", "vp": "vp"}
# theirs ignores the weight of a predicted velocity; ours does what its name says
LOSSES = [("velocity", "none"), ("velocity", "velocity")] + [
    (kind, weighting) for kind in ("score", "noise") for weighting in ("none", "velocity", "likelihood")
]
TOLERANCE = 1e-11
cases = pytest.mark.parametrize("case", CASES)
losses = pytest.mark.parametrize(("kind", "weighting"), LOSSES)


def model(x, t):
    """The model of the cases, on their clock."""
    t = t.reshape(-1, 1, 1, 1)
    return 0.7 * torch.sin(1.3 * x + 2 * t) - 0.4 * x * torch.cos(3 * t) + 0.1 * t


def objective_of(about, case, kind, weighting):
    """Ours on their interval."""
    low, high = about["loss"]["intervals"][kind]["t0_t1"]
    path = interpolants.build(CASES[case])
    return objectives.build(kind, interpolant=path, weighting=weighting, interval=(1 - high, 1 - low))


@cases
@losses
def test_losses(case, kind, weighting, parity):
    _, given, wanted, about = parity(f"transport_{case}")
    objective = objective_of(about, case, kind, weighting)
    theirs = wanted[f"loss/{kind}/t"]
    data, noise, t = given["loss_x1"], given["loss_x0"], clocks.convert(theirs, source="sit")
    x = objective.interpolant.interpolate(data, noise, t)
    assert torch.allclose(x, wanted[f"loss/{kind}/x_t"], rtol=TOLERANCE, atol=TOLERANCE)
    prediction = model(x, theirs)
    term = objective.terms(-prediction if kind == "velocity" else prediction, data, noise, t)[kind]
    assert term.dtype == torch.float64
    assert torch.allclose(term, wanted[f"loss/{kind}/{weighting}"], rtol=TOLERANCE)


@cases
@pytest.mark.parametrize("kind", ["velocity", "score", "noise"])
def test_a_whole_call(case, kind, parity):
    """Through the backbone and the draws: uniform times in their interval, 1 − u for their u."""
    _, given, wanted, about = parity(f"transport_{case}")
    objective = objective_of(about, case, kind, "none")

    class Given:
        """Draws that return the case's."""

        def __len__(self):
            return 5

        def normal(self, stream, shape=()):
            assert (stream, tuple(shape)) == ("noise", (2, 3, 3))
            return given["loss_x0"]

        def uniform(self, stream, shape=()):
            return 1 - given["loss_uniform"]

    class Backbone(torch.nn.Module):
        def forward(self, x, t):
            self.t = t
            value = model(x, 1 - t)
            return -value if kind == "velocity" else value

    backbone = Backbone()
    loss = objective(backbone, given["loss_x1"], Given())
    assert torch.allclose(1 - backbone.t.double(), wanted[f"loss/{kind}/t"], atol=1e-7)  # times are drawn in float32
    assert torch.allclose(loss.terms[kind].double(), wanted[f"loss/{kind}/none"], rtol=2e-5)
    assert torch.equal(loss.details[kind], loss.terms[kind]) and torch.equal(loss.times, backbone.t)


@pytest.mark.parametrize("case", ["linear", "gvp"])
def test_their_margin_is_ours(case, parity):
    """1e-3 at the data end of a score, as theirs (but for 1e-5 on vp); ours keeps the noise end, where scores exist."""
    _, _, _, about = parity(f"transport_{case}")
    low, high = about["loss"]["intervals"]["score"]["t0_t1"]
    assert (low, high) == (0.001, 0.999)
    path = interpolants.build(CASES[case])
    assert objectives.build("score", interpolant=path).interval == (pytest.approx(1 - high), 1.0)
