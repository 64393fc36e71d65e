"""Autoguidance: by hand, against closed forms, with other guidance inside and around it, and what it refuses."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from pathline import Flow, InputError, InputTypeError, backbones, interpolants, solvers
from pathline.core.composed import Rescheduled, SplitFlow
from pathline.solvers import guidance
from pathline.testing import GaussianMixture

LINEAR, TRIGONOMETRIC = interpolants.build("linear"), interpolants.build("trigonometric")
STRONG = GaussianMixture([[1.0, -2.0], [-1.5, 0.5], [2.0, 2.0]], [0.5, 0.8, 0.3], labels=[0, 1, 2])
WEAK = GaussianMixture([[0.5, -1.5], [-1.0, 0.0], [1.0, 2.5]], [0.9, 1.1, 0.7], labels=[0, 1, 2])
LABEL = torch.tensor([1, 0, 2, 1, 0])
X = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
T = torch.tensor(0.4, dtype=torch.float64)
NULL = torch.full_like(LABEL, 3)
CFG = partial(guidance.build, "cfg")


def auto(weak=None, **options):
    return guidance.build("autoguidance", weak=WEAK.flow(LINEAR) if weak is None else weak, **options)


def value(mixture, kind="velocity", label=LABEL, t=T, path=LINEAR):
    return mixture.value(kind, X, t, path, label=label)


def close(ours, theirs, tolerance=1e-11):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert float((ours - theirs).abs().max()) <= tolerance


@pytest.mark.parametrize("scale", [0.0, 2.0, 3.5, [0.5, 4.0, 1.0, 2.0, 3.0]])
def test_formula_in_two_calls(scale):
    strong, weak = STRONG.flow(LINEAR), WEAK.flow(LINEAR)
    flow = auto(weak, scale=scale)(strong)
    m, r = value(STRONG), value(WEAK)
    w = torch.tensor(scale if isinstance(scale, list) else [scale] * 5, dtype=torch.float64)[:, None]
    close(flow(X, T, label=LABEL).velocity, r + w * (m - r))
    assert (strong.nfe, weak.nfe, flow.nfe) == (1, 1, 2)
    close(flow(X, T.expand(5), label=LABEL).velocity, r + w * (m - r))
    close(flow.given(label=LABEL)(X, T).velocity, r + w * (m - r))
    close(auto(weak, scale=scale)(strong.given(label=LABEL))(X, T).velocity, r + w * (m - r))


def test_the_guided_flow_of_two_gaussians_is_that_of_a_third():
    """N(2, s²) guided by N(0.5, s²) is N(0.5 + w·1.5, s²): the whole solve against that flow's exact end."""
    strong, weak, mean = (GaussianMixture([[m, -m]], 0.6) for m in (2.0, 0.5, 0.5 + 2.5 * 1.5))
    solver = solvers.build("rk4", steps=40)
    for quantity in (None, "velocity", "noise"):
        start = 1.0 if quantity != "noise" else 0.9  # noise tells no velocity at 1
        solver = solvers.build("rk4", steps=60, start=start, end=0.05)
        ours = solver(auto(weak.flow(LINEAR), scale=2.5, quantity=quantity)(strong.flow(LINEAR)), X)
        a0, s0 = 1 - start, (((1 - start) * 0.6) ** 2 + start**2) ** 0.5
        a1, s1 = 0.95, ((0.95 * 0.6) ** 2 + 0.05**2) ** 0.5
        centre = mean.means
        close(ours, a1 * centre + s1 / s0 * (X - a0 * centre), 1e-6)


def test_off_and_outside_of_the_interval_one_network_is_called():
    weak = WEAK.flow(LINEAR)
    for options in (dict(scale=1.0), dict(scale=[1.0] * 5), dict(scale=3.0, interval=(0.5, 0.9))):
        flow = auto(weak, **options)(STRONG.flow(LINEAR))
        assert torch.equal(flow(X, T, label=LABEL).velocity, value(STRONG))
        assert weak.nfe == 0 and flow.nfe == 1
    flow = auto(weak, scale=3.0, interval=(0.25, 0.75))(STRONG.flow(LINEAR))
    solution = solvers.build("euler", steps=10).solve(flow, X, label=LABEL)
    assert solution.nfe == 15 and weak.nfe == 5  # 0.7, 0.6, 0.5, 0.4 and 0.3 lie inside
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    mixed = flow(X, t, label=LABEL).velocity
    m, r = (value(mixture, t=t) for mixture in (STRONG, WEAK))
    assert torch.equal(mixed[[0, 4]], m[[0, 4]])
    close(mixed[1:4], (r + 3.0 * (m - r))[1:4])


@pytest.mark.parametrize("predicts", ["velocity", "noise", "data"])
def test_a_backbone_is_put_where_the_strong_one_is(predicts):
    """On its path and to its kind of prediction, under guidance of the strong one too."""
    flow = auto(WEAK.backbone(LINEAR, predicts), scale=2.5)(STRONG.flow(LINEAR, predicts))
    m, r = value(STRONG), value(WEAK)
    close(flow(X, T, label=LABEL).velocity, r + 2.5 * (m - r))
    assert flow.predicts == predicts and flow.open_ends("velocity") == STRONG.flow(LINEAR, predicts).open_ends(
        "velocity"
    )
    guided = guidance.build("cfg", scale=1.5, quantity="noise")(STRONG.flow(LINEAR, predicts))
    m = value(STRONG, label=NULL) + 1.5 * (m - value(STRONG, label=NULL))
    close(auto(WEAK.backbone(LINEAR, predicts), scale=2.5)(guided)(X, T, label=LABEL).velocity, r + 2.5 * (m - r))


@pytest.mark.parametrize("kinds", [("velocity", "data"), ("noise", "velocity"), ("score", "data")])
def test_networks_that_predict_different_things(kinds):
    """Guided as velocities; an end at which either lacks one is open."""
    flow = auto(WEAK.flow(LINEAR, kinds[1]), scale=2.5)(STRONG.flow(LINEAR, kinds[0]))
    m, r = value(STRONG), value(WEAK)
    prediction = flow(X, T, label=LABEL)
    close(prediction.velocity, r + 2.5 * (m - r))
    assert prediction.kind == flow.predicts == "velocity"
    wanted = {*LINEAR.open_ends(kinds[0], "velocity"), *LINEAR.open_ends(kinds[1], "velocity")}
    assert flow.open_ends("velocity") == tuple(sorted(wanted))


def test_a_weaker_prediction_opens_ends_where_it_is_used():
    def ends(**options):
        return auto(WEAK.flow(LINEAR, "data"), **options)(STRONG.flow(LINEAR, "data")).open_ends("velocity")

    assert ends() == ends(scale=1.0) == (0.0,)
    other = auto(WEAK.flow(LINEAR, "noise"), interval=(0.1, 0.8))(STRONG.flow(LINEAR))
    assert other.open_ends("velocity") == () and other.open_ends("diffusion") == LINEAR.open_ends("data", "diffusion")


# --- with other guidance ---------------------------------------------------------------------------------------------


def test_classifier_free_inside():
    """m itself is guided; r may be too."""

    m = value(STRONG, label=NULL) + 1.5 * (value(STRONG) - value(STRONG, label=NULL))
    r = value(WEAK)
    flow = auto(scale=2.5)(CFG(scale=1.5)(STRONG.flow(LINEAR)))
    close(flow(X, T, label=LABEL).velocity, r + 2.5 * (m - r))
    r = value(WEAK, label=NULL) + 0.5 * (r - value(WEAK, label=NULL))
    flow = auto(CFG(scale=0.5)(WEAK.flow(LINEAR)), scale=2.5)(CFG(scale=1.5)(STRONG.flow(LINEAR)))
    close(flow(X, T, label=LABEL).velocity, r + 2.5 * (m - r))
    assert flow.nfe == 2


@pytest.mark.parametrize("scale", [2.5, [0.5, 4.0, 1.0, 2.0, 3.0]])
def test_classifier_free_around(scale):
    """Both networks are called on a doubled batch: with the label, and with the null label."""
    w = torch.tensor(scale if isinstance(scale, list) else [scale] * 5, dtype=torch.float64)[:, None]

    def guided(label):
        return value(WEAK, label=label) + w * (value(STRONG, label=label) - value(WEAK, label=label))

    flow = guidance.build("cfg", scale=1.5)(auto(scale=scale)(STRONG.flow(LINEAR)))
    close(flow(X, T, label=LABEL).velocity, guided(NULL) + 1.5 * (guided(LABEL) - guided(NULL)))
    assert flow.nfe == 2


@pytest.mark.parametrize("inner", ["cfg-zero", "apg"])
@pytest.mark.parametrize("times", [0.4, [0.1, 0.3, 0.5, 0.7, 0.9]])
def test_other_guidance_inside_with_an_interval_of_its_own(inner, times):
    """Where the inner one is off, the strong model's own values are guided."""
    t = torch.tensor(times, dtype=torch.float64)
    guide = guidance.build(inner, scale=3.0, interval=(0.25, 0.55))
    strong = guide(STRONG.flow(LINEAR))(X, t, label=LABEL).velocity
    r = value(WEAK, t=t)
    for weak in (WEAK.flow(LINEAR), WEAK.flow(LINEAR, "noise"), WEAK.backbone(LINEAR)):
        flow = auto(weak, scale=2.5, interval=(0.2, 0.8))(guide(STRONG.flow(LINEAR)))
        inside = ((t >= 0.2) & (t <= 0.8)).expand(5)[:, None]
        close(flow(X, t, label=LABEL).velocity, torch.where(inside, r + 2.5 * (strong - r), strong))


def test_two_guided_flows_of_one_network_count_each_call_once():
    """A network beside itself with less of the label: three ways to have it in common."""
    flow = STRONG.flow(LINEAR)
    weak = guidance.build("cfg", scale=0.5)(flow)
    both = auto(weak, scale=3.0)(flow)
    c, n = value(STRONG), value(STRONG, label=NULL)
    r = n + 0.5 * (c - n)
    close(both(X, T, label=LABEL).velocity, r + 3.0 * (c - r))
    assert flow.nfe == both.nfe == 2
    solution = solvers.build("heun", steps=3).solve(both, X, label=LABEL)
    assert solution.nfe == 12 and flow.nfe == both.nfe == 14
    partly = auto(auto(weak, scale=2.0)(WEAK.flow(LINEAR)), scale=2.0)(flow)  # a call of both, one of flow's
    partly(X, T, label=LABEL)
    assert partly.nfe == flow.nfe + 1 == 14 + 2 + 1
    assert solvers.build("euler", steps=2).solve(partly, X, label=LABEL).nfe == 6


def test_composed_flows():
    """On another path both are; on a path with latent noise drift and noise are guided one by one."""
    strong, weak = (Rescheduled(mixture.flow(LINEAR), TRIGONOMETRIC) for mixture in (STRONG, WEAK))
    prediction = auto(weak, scale=2.5)(strong)(X, T, label=LABEL)
    exact = auto(WEAK.flow(TRIGONOMETRIC), scale=2.5)(STRONG.flow(TRIGONOMETRIC))(X, T, label=LABEL)
    for kind in ("velocity", "score", "noise", "data"):
        close(getattr(prediction, kind), getattr(exact, kind), 1e-10)
    close(auto(WEAK.flow(TRIGONOMETRIC), scale=2.5)(strong)(X, T, label=LABEL).velocity, exact.velocity, 1e-10)
    bridge = interpolants.build("bridge", scale=0.8)
    drift, noise, other = (
        backbones.wrap(lambda x, t, f=f: f(x) + t[:, None]) for f in (torch.sin, torch.cos, torch.tanh)
    )
    strong, weak = SplitFlow(drift, noise, bridge), SplitFlow(other, drift, bridge)
    guided, m, r = auto(weak, scale=2.5)(strong)(X, T), strong(X, T), weak(X, T)
    for kind in ("velocity", "score", "noise"):
        close(getattr(guided, kind), getattr(r, kind) + 2.5 * (getattr(m, kind) - getattr(r, kind)))


# --- what it refuses -------------------------------------------------------------------------------------------------


def test_a_path_to_a_run_is_not_a_model():
    for weak in ("runs/small", 3, None):
        with pytest.raises(InputTypeError, match="for a weak model, expected a backbone or a flow; load it first"):
            guidance.build("autoguidance", weak=weak)


def test_models_that_do_not_fit():
    strong = STRONG.flow(LINEAR)
    with pytest.raises(InputError, match="the Trigonometric path beside one on the Linear path, expected one path"):
        auto(WEAK.flow(TRIGONOMETRIC))(strong)
    with pytest.raises(InputError, match="the Linear path beside one on the Bridge path"):
        auto()(SplitFlow(torch.nn.Identity(), torch.nn.Identity(), interpolants.build("bridge")))
    auto(WEAK.flow(interpolants.build("linear")))(strong)  # another object, the same path
    wide = GaussianMixture([[1.0, 2.0, 3.0]], 0.5)
    with pytest.raises(InputError, match=r"weak flow for samples of shape \(3,\), expected \(2,\)"):
        auto(wide.flow(LINEAR))(strong)
    with pytest.raises(InputError, match="got a weak backbone beside a Rescheduled, expected a weak flow"):
        auto(WEAK.backbone(LINEAR))(Rescheduled(strong, TRIGONOMETRIC))
    shapeless = Flow(backbones.wrap(lambda x, t, label: x, num_classes=2), LINEAR)
    with pytest.raises(InputError, match="got label 2, expected 0 to 1"):  # checked for both before a solve
        solvers.build("euler", steps=2)(auto(shapeless)(strong), X, label=LABEL)
    assert strong.nfe == 0
