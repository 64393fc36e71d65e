"""Momentum belongs to a trajectory: no solve, batch or sample sees another's."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from pathline import Flow, InputError, backbones, interpolants, solvers
from pathline.core.composed import Rescheduled
from pathline.solvers import guidance
from pathline.solvers.fixed import Euler
from pathline.testing import GaussianMixture

LINEAR = interpolants.build("linear")
MIXTURE = GaussianMixture([[1.0, -2.0, 0.5], [-1.5, 0.5, 1.0], [2.0, 2.0, 0.0]], [0.5, 0.8, 0.3], labels=[0, 1, 2])
LABEL = torch.tensor([1, 0, 2, 1, 0])
X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
BETA, SCALE = -0.6, 3.0


def build(**options):
    options = {"scale": SCALE, "momentum": BETA, "quantity": "velocity", "eta": 1.0, **options}
    return guidance.build("apg", **options)(MIXTURE.flow(LINEAR))


def pair(x, t, label=LABEL):
    return (MIXTURE.value("velocity", x, t, LINEAR, label=y) for y in (label, torch.full_like(label, 3)))


def by_hand(x, label, times, inside=lambda t: True):
    """Euler's method with d ← c − n + β·d, v = c + (w − 1)·d, written out."""
    d = torch.zeros_like(x)
    for t, t_next in pairwise(times):
        t = torch.tensor(t, dtype=torch.float64)
        c, n = pair(x, t, label)
        if inside(t):
            d = c - n + BETA * d
            c = c + (SCALE - 1) * d
        x = x + (t_next - t) * c
    return x


def test_momentum_by_hand():
    solver = solvers.build("euler", steps=7)
    expected = by_hand(X, LABEL, solver.times)
    assert torch.allclose(solver(build(), X, label=LABEL), expected, atol=1e-12)
    assert not torch.allclose(solver(build(momentum=0.0), X, label=LABEL), expected, atol=0.1)


def test_what_lies_outside_of_the_interval_is_not_remembered():
    solver = solvers.build("euler", steps=10)
    for low, high in ((0.0, 0.5), (0.35, 0.85), (0.55, 1.0)):
        expected = by_hand(X, LABEL, solver.times, lambda t, low=low, high=high: low <= t <= high)
        assert torch.allclose(solver(build(interval=(low, high)), X, label=LABEL), expected, atol=1e-12)


def test_each_sample_remembers_where_it_was_guided():
    """With a time a sample, those outside of the interval keep what they had."""
    flow = build(interval=(0.2, 0.8)).begin()
    d = torch.zeros_like(X)
    for times in ([0.5, 0.9, 0.3, 0.1, 0.7], [0.4, 0.8, 0.1, 0.2, 0.6], [0.3, 0.1, 0.4, 0.6, 0.5]):
        t = torch.tensor(times, dtype=torch.float64)
        c, n = pair(X, t)
        inside = ((t >= 0.2) & (t <= 0.8))[:, None]
        d = torch.where(inside, c - n + BETA * d, d)
        expected = torch.where(inside, c + (SCALE - 1) * d, c)
        assert torch.allclose(flow(X, t, label=LABEL).velocity, expected, atol=1e-12)


def test_two_solves_one_after_the_other():
    flow, solver = build(), solvers.build("heun", steps=4, start=0.98)
    first = solver(flow, X, label=LABEL)
    solver(flow, X[:2] + 1, label=LABEL[:2])
    assert torch.equal(solver(flow, X, label=LABEL), first)
    late = solvers.build("heun", steps=3, start=0.5)  # from the middle of a schedule
    assert torch.equal(late(flow, X, label=LABEL), late(build(), X, label=LABEL))


def test_two_solves_interleaved():
    """Of other batch sizes, step by step in turn, on one guided flow."""
    flow, solver = build(), solvers.build("euler", steps=6)
    other, label = X[1:4] * 2, LABEL[1:4]
    wanted = [solver(flow, X, label=LABEL), solver(flow, other, label=label)]

    class Both(Euler):
        """Runs the second solve a step ahead inside of the first one's."""

        def step(self, run, x, number, t, t_next):
            state["x"] = state["x"] + (t_next - t) * state["flow"](state["x"], t, label=label).velocity
            return super().step(run, x, number, t, t_next)

    state = {"x": other, "flow": flow.begin()}
    ours = Both(6)(flow, X, label=LABEL)
    assert torch.equal(ours, wanted[0])
    assert torch.allclose(state["x"], wanted[1], atol=1e-6)  # t came as a float32


def test_batches_do_not_matter():
    flow, solver = build(), solvers.build("euler", steps=6)
    whole = solver(flow, X, label=LABEL)
    for size in (1, 2, 3):
        parts = [solver(flow, X[i : i + size], label=LABEL[i : i + size]) for i in range(0, 5, size)]
        assert torch.allclose(torch.cat(parts), whole, atol=1e-12)


def test_outside_of_a_solve_nothing_is_remembered():
    flow = build()
    first = flow(X, 0.5, label=LABEL).velocity
    solvers.build("euler", steps=3)(flow, X, label=LABEL)
    flow(X + 1, 0.6, label=LABEL)
    assert torch.equal(flow(X, 0.5, label=LABEL).velocity, first)
    again = flow.begin()
    assert torch.equal(again(X, 0.5, label=LABEL).velocity, first)
    assert not torch.equal(again(X, 0.5, label=LABEL).velocity, first)  # within a trajectory it is


def test_bound_conditions_keep_options_and_trajectory():
    solver = solvers.build("euler", steps=6)
    flow = build(norm=2.0, rescale=0.3, interval=(0.1, 0.9))
    wanted = solver(flow, X, label=LABEL)
    for bound in (
        flow.given(label=LABEL),
        flow.begin().given(label=LABEL),
        flow.given(label=LABEL[:1]).given(label=LABEL),
    ):
        assert bound.remembers and bound.guidance is flow.guidance
        assert torch.equal(solver(bound, X), wanted)


def test_a_flow_says_whether_it_remembers():
    plain = MIXTURE.flow(LINEAR)
    assert build().remembers and not build(momentum=0.0).remembers and not build(scale=1.0).remembers
    assert guidance.build("cfg")(build()).remembers and not guidance.build("cfg")(plain).remembers
    assert guidance.build("apg", momentum=0.5)(guidance.build("cfg")(plain)).remembers
    for weak in (build(), plain):
        assert guidance.build("autoguidance", weak=weak)(plain).remembers == (weak is not plain)
        assert not guidance.build("autoguidance", weak=weak, scale=1.0)(plain).remembers
    assert Rescheduled(build(), interpolants.build("trigonometric")).remembers

    class Adaptive(Euler):
        adaptive = True

    Adaptive(3)(build(momentum=0.0), X, label=LABEL)
    with pytest.raises(InputError, match="depends on earlier calls for Adaptive"):
        Adaptive(3)(build(), X, label=LABEL)


def weak_flow():
    return GaussianMixture(MIXTURE.means * 0.5, 1.0, labels=[0, 1, 2]).flow(LINEAR)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda flow: Rescheduled(flow, interpolants.build("trigonometric")),
        lambda flow: guidance.build("cfg", scale=1.5, interval=(0.3, 0.7))(flow),
        lambda flow: guidance.build("autoguidance", weak=weak_flow())(flow),
        lambda flow: guidance.build("autoguidance", weak=flow)(weak_flow()),
        lambda flow: guidance.build("apg", scale=2.0, momentum=-0.3)(flow),
    ],
)
def test_a_memory_inside_of_others_is_renewed_too(wrap):
    flow, solver = wrap(build()), solvers.build("euler", steps=6, start=0.98)
    first = solver(flow, X, label=LABEL)
    solver(flow, X[1:4], label=LABEL[1:4])
    assert torch.equal(solver(flow, X, label=LABEL), first)
    assert torch.allclose(solver(flow, X[:2], label=LABEL[:2]), first[:2], atol=1e-9)
    forgetful = wrap(build(momentum=0.0))
    assert not torch.allclose(solver(forgetful, X, label=LABEL), first, atol=1e-3)


def test_rows_of_a_guidance_around_are_remembered_apart():
    """Around it, guidance is on for 0.7 ≥ t ≥ 0.3 alone: the label's rows go on, the null label's have d = 0."""
    inner = build()
    flow = guidance.build("cfg", scale=1.5, interval=(0.3, 0.7))(inner)
    solver = solvers.build("euler", steps=8)
    x, d = X.clone(), torch.zeros_like(X)
    for t, t_next in pairwise(solver.times):
        t = torch.tensor(t, dtype=torch.float64)
        c, n = pair(x, t)
        d = c - n + BETA * d
        v = c + (SCALE - 1) * d
        x = x + (t_next - t) * (n + 1.5 * (v - n) if 0.3 <= t <= 0.7 else v)
    assert torch.allclose(solver(flow, X, label=LABEL), x, atol=1e-12)


def test_a_network_may_answer_in_the_same_memory_every_time():
    exact, answer = MIXTURE.backbone(LINEAR), torch.empty(10, 3, dtype=torch.float64)

    def network(x, t, label):
        answer[: len(x)] = exact(x, t, label=label)
        return answer[: len(x)]

    flow = Flow(backbones.wrap(network, num_classes=3, null_label=3), LINEAR)
    solver = solvers.build("heun", steps=5)
    for name, options in (("apg", dict(momentum=BETA, quantity="velocity")), ("cfg-zero", {}), ("cfg", {})):
        guide = guidance.build(name, scale=3.0, interval=(0.2, 0.8), **options)
        wanted = solver(guide(MIXTURE.flow(LINEAR)), X, label=LABEL)
        assert torch.allclose(solver(guide(flow), X, label=LABEL), wanted, atol=1e-12)
    guided = guidance.build("cfg", scale=0.5)(flow)  # both made of one network
    auto = guidance.build("autoguidance", weak=guided)
    reference = guidance.build("autoguidance", weak=guidance.build("cfg", scale=0.5)(MIXTURE.flow(LINEAR)))
    wanted = solver(reference(MIXTURE.flow(LINEAR)), X, label=LABEL)
    assert torch.allclose(solver(auto(flow), X, label=LABEL), wanted, atol=1e-12)
