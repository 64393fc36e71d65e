"""Flows made of others: sampling along another path, and two networks on a path with latent noise."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from pathline import Flow, InputError, InputTypeError, OpenEndError, Rescheduled, SplitFlow, interpolants, solvers
from pathline.solvers import guidance
from pathline.testing import GaussianMixture

NAMES = ("linear", "trigonometric", "vp", "polynomial", "linear-vp")
MIXTURE = GaussianMixture([[1.0, -2.0], [-1.5, 1.0]], [0.3, 0.8], labels=[0, 1])
T = torch.tensor([0.1, 0.35, 0.6, 0.85], dtype=torch.float64)


@pytest.mark.parametrize(("old", "new"), list(permutations(NAMES, 2)))
@pytest.mark.parametrize("predicts", ["velocity", "noise", "data", "score"])
def test_a_rescheduled_flow_is_the_exact_flow_of_the_new_path(old, new, predicts):
    """All four quantities, against the closed form on the new path; the old path is met only inside."""
    x = 1.5 * torch.randn(4, 2, dtype=torch.float64)
    there, here = interpolants.build(old), interpolants.build(new)
    prediction = Rescheduled(MIXTURE.flow(there, predicts), here)(x, T)
    for kind in ("velocity", "noise", "data", "score"):
        assert torch.allclose(getattr(prediction, kind), MIXTURE.value(kind, x, T, here), atol=1e-6), kind


def test_ends_are_limits_and_open_ones_are_refused():
    """F10: linear to trigonometric and back are closed at both ends; nothing explodes near them."""
    x, label = torch.randn(3, 2, dtype=torch.float64), torch.tensor([0, 1, 2])
    for old, new in (("linear", "trigonometric"), ("trigonometric", "linear")):
        there, here = interpolants.build(old), interpolants.build(new)
        flow = Rescheduled(MIXTURE.flow(there), here)
        for t in (0.0, 1e-9, 1 - 1e-9, 1.0):
            exact = MIXTURE.value("velocity", x, t, here, label=label)
            assert torch.allclose(flow(x, t, label=label).velocity, exact, atol=1e-6)
        assert flow.open_ends("velocity") == () and flow.open_ends("score") == (0.0,)
        done = solvers.build("heun", steps=20)(flow, x, label=label)
        assert bool(done.isfinite().all())
    on_vp = Rescheduled(MIXTURE.flow(interpolants.build("linear")), interpolants.build("vp"))
    assert on_vp.open_ends("velocity") == (0.0,)
    with pytest.raises(OpenEndError, match="evaluates t = 0"):
        solvers.build("heun", steps=4)(on_vp, x, label=label)
    from_vp = Rescheduled(MIXTURE.flow(interpolants.build("vp"), "noise"), interpolants.build("linear"))
    assert from_vp.open_ends("velocity") == ()  # data and noise from a predicted noise exist on all of vp
    assert bool(solvers.build("heun", steps=4)(from_vp, x, label=label).isfinite().all())


def test_sampling_along_another_path_reaches_the_data():
    noise = torch.randn(4000, 2)
    flow = Rescheduled(MIXTURE.flow(interpolants.build("linear")), interpolants.build("trigonometric"))
    solution = solvers.build("heun", steps=60).solve(flow, noise, label=torch.zeros(4000, dtype=torch.long))
    assert solution.nfe == flow.nfe == 120
    assert torch.allclose(solution.x.mean(0).double(), MIXTURE.means[0], atol=0.03)
    assert float((solution.x - solution.x.mean(0)).std()) == pytest.approx(0.3, rel=0.04)


def test_guidance_and_rescheduling_commute():
    x, label = torch.randn(4, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    guide, path = guidance.build("classifier-free", scale=2.0), interpolants.build("trigonometric")
    flow = MIXTURE.flow(interpolants.build("linear"))
    inside, outside = Rescheduled(guide(flow), path), guide(Rescheduled(flow, path))
    for t in (0.0, 0.3, 1.0):
        first, second = inside(x, t, label=label), outside(x, t, label=label)
        assert torch.allclose(first.velocity, second.velocity, atol=1e-9)
        assert torch.allclose(inside.given(label=label)(x, t).data, second.data, atol=1e-9)


@pytest.mark.parametrize("predicts", ["noise", "data", "score"])
def test_guided_values_need_no_velocity(predicts):
    """Guidance mixes what the network predicts: a score at vp's noise end has no detour through a velocity."""
    path, x, label = interpolants.build("vp"), torch.randn(4, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    guided = guidance.build("classifier-free", scale=3.0)(MIXTURE.flow(path, predicts))
    null = torch.full((4,), 2)
    for t in (0.5, 1.0):
        low, high = (MIXTURE.value(predicts, x, t, path, label=y) for y in (null, label))
        assert torch.allclose(getattr(guided(x, t, label=label), predicts), low + 3 * (high - low), atol=1e-9)


# --- two networks ----------------------------------------------------------------------------------------------------


def split(path, source=None):
    return SplitFlow(
        MIXTURE.backbone(path, "drift", source=source), MIXTURE.backbone(path, "noise", source=source), path
    )


@pytest.mark.parametrize("gamma", ["brownian", "sine-squared"])
def test_a_split_flow_is_the_exact_flow(gamma):
    path = interpolants.build("stochastic", gamma=gamma, scale=0.7)
    source = GaussianMixture([[3.0, 0.0]], 0.5)
    x = torch.randn(4, 2, dtype=torch.float64)
    label = torch.tensor([0, 1, 2, 0])
    prediction = split(path, source).given(label=label)(x, T)
    for kind in ("velocity", "score", "noise"):
        exact = MIXTURE.value(kind, x, T, path, label=label, source=source)
        assert torch.allclose(getattr(prediction, kind), exact, atol=1e-10), kind
    with pytest.raises(InputError, match="one does not tell the other"):
        _ = prediction.data


@pytest.mark.parametrize(("solver", "options"), [("heun", {}), ("euler-maruyama", dict(grid="uniform"))])
def test_bridges_carry_one_mixture_to_another(solver, options):
    """ODE and SDE on the exact fields, from a source that is no Gaussian noise: the data's moments come out."""
    path, source = interpolants.build("bridge", scale=0.6), GaussianMixture([[3.0, 0.0], [-2.0, 2.0]], [0.5, 0.3])
    start, end = 0.999, 0.001
    data, _ = source.sample(6000, seed=3)
    label = torch.zeros(6000, dtype=torch.long)
    flow = split(path, source)
    solution = solvers.build(solver, steps=300, start=start, end=end, **options).solve(flow, data, label=label, seed=1)
    assert solution.nfe == flow.nfe
    assert torch.allclose(solution.x.mean(0).double(), MIXTURE.means[0], atol=0.05)
    assert float((solution.x - solution.x.mean(0)).std()) == pytest.approx(0.3, rel=0.08)


def test_ends_of_a_bridge_are_refused_before_the_first_call():
    flow = split(interpolants.build("bridge"))
    with pytest.raises(OpenEndError, match="evaluates t = 1"):
        solvers.build("euler", steps=3)(flow, torch.zeros(2, 2))
    assert flow.nfe == 0
    smooth = split(interpolants.build("stochastic", gamma="sine-squared"))
    assert bool(solvers.build("euler", steps=3)(smooth, torch.zeros(2, 2)).isfinite().all())
    with pytest.raises(OpenEndError, match="has no score"):
        solvers.build("euler-maruyama", steps=3)(smooth, torch.zeros(2, 2))


def test_bad_flows():
    linear, bridge = interpolants.build("linear"), interpolants.build("bridge")
    with pytest.raises(InputTypeError, match="expected a path with latent noise"):
        SplitFlow(torch.nn.Identity(), torch.nn.Identity(), linear)
    with pytest.raises(InputTypeError, match="expected an Interpolant"):
        Rescheduled(MIXTURE.flow(linear), "linear")
    with pytest.raises(InputError, match="one does not tell the other"):
        Rescheduled(MIXTURE.flow(linear), bridge)
    with pytest.raises(InputError, match="no known score"):
        Rescheduled(Flow(torch.nn.Identity(), interpolants.build("two-ended")), linear)
    velocity = Flow(MIXTURE.backbone(bridge), bridge)
    with pytest.raises(InputError, match="use SplitFlow"):
        solvers.build("euler-maruyama", start=0.9, end=0.1)(velocity, torch.zeros(2, 2))
