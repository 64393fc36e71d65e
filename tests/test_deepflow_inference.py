"""Sampling that uses the branches: exits, look-ahead, internal guidance, second-order steps."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.func import jvp

from pathline import Flow, InputError, InputTypeError, Rescheduled, UnknownOptionError, backbones, interpolants, solvers
from pathline.core import config
from pathline.core.errors import ConfigurationError, SolverError
from pathline.plugins.deepflow import AcceleratedPrediction, Branches, BranchFlow
from pathline.plugins.deepflow.flows import accelerated
from pathline.solvers import guidance
from pathline.testing import check_solver
from pathline.training import parts

LINEAR = interpolants.build("linear")
TOY = dict(input_size=4, patch_size=2, in_channels=3, hidden_size=16, depth=5, num_heads=2, num_classes=7)
X, LABEL = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3)), torch.tensor([1, 4])
NULL = torch.tensor([7, 7])
T = torch.tensor(0.4, dtype=torch.float64)


def network(cuts=(1, 3), **options):
    backbone = backbones.build("deepflow", **{**TOY, "acceleration_width": 6, **options}, cuts=cuts)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(std=0.25, generator=generator)
    return backbone.eval()


NETWORK = network()


@pytest.fixture
def flow():
    return Flow(NETWORK, LINEAR)


@pytest.fixture
def ran():
    """The calls of the network, and the blocks that ran, by hooks."""
    calls, blocks = [], []
    handles = [NETWORK.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))]
    handles += [block.register_forward_hook(lambda *_: blocks.append(1)) for block in NETWORK.trunk.blocks]
    yield calls, blocks
    for handle in handles:
        handle.remove()


@torch.no_grad()
def said(x=X, t=T, label=LABEL, gap=0.0, backbone=NETWORK):
    """What all branches say, as in training: every block runs, every head speaks."""
    t = t.float().expand(len(x))
    later = [(t - i * gap).clamp(0, 1) for i in range(1, backbone.branch_count)]
    return backbone(x, t, label=label, branch_times=later)


def euler(steps=5, **options):
    return solvers.build("euler", steps=steps, **options)


def close(ours, theirs, tolerance=2e-6):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    ours, theirs = ours.detach(), theirs.detach()
    assert float((ours - theirs).abs().max()) <= tolerance * (1 + float(theirs.abs().max()))


# --- exits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("branch", "blocks"), [(1, 1), (2, 3), (3, 5)])
def test_an_exit_is_its_branchs_velocity_and_runs_no_block_more(flow, ran, branch, blocks):
    velocity = guidance.build("branch", branch=branch)(flow)(X, T, label=LABEL).velocity
    assert (len(ran[0]), len(ran[1])) == (1, blocks)
    close(velocity, said().velocities[branch - 1])


@pytest.mark.parametrize("name", ["euler", "heun", "euler-maruyama"])
@pytest.mark.parametrize("guide", [dict(name="branch", branch=3), dict(name="internal", weight=0.0, branch=2),
                                   dict(name="look-ahead", gap=0.0)])  # fmt: skip
def test_what_changes_nothing_is_plain_sampling_bit_for_bit(flow, name, guide):
    solver = solvers.build(name, steps=4)
    plain = solver.solve(flow, X, seed=0, label=LABEL)
    ours = solver.solve(guidance.build(guide)(flow), X, seed=0, label=LABEL)
    assert torch.equal(ours.x, plain.x) and ours.nfe == plain.nfe
    assert ours.block_evaluations == plain.block_evaluations == 5 * plain.nfe


def test_a_switch_along_t_counts_the_blocks_it_ran(flow, ran):
    guide = guidance.build("branch", schedule=[(1.0, 1), (0.75, 2), (0.35, 3)])
    solution = euler(10).solve(guide(flow), X, label=LABEL, trajectory=True)
    # 1, 0.9 and 0.8 leave after branch 1; 0.7, 0.6, 0.5 and 0.4 after 2; 0.3, 0.2 and 0.1 run all five blocks
    assert solution.block_evaluations == len(ran[1]) == 3 * 1 + 4 * 3 + 3 * 5
    assert solution.nfe == len(ran[0]) == 10
    x = X.clone()
    for number, branch in enumerate((1, 1, 1, 2, 2, 2, 2, 3, 3, 3)):
        t = torch.tensor(1 - number / 10, dtype=torch.float64)
        x = x - 0.1 * said(x, t).velocities[branch - 1]
        close(solution.trajectory[number + 1], x, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_sample_has_the_branch_of_its_time(flow, ran, dtype):
    x, label = torch.cat((X, X, X))[:5], torch.tensor([1, 4, 0, 7, 2])
    t = torch.tensor([0.9, 0.7, 0.5, 0.3, 0.1], dtype=dtype)
    guided = guidance.build("branch", schedule=[(1, 2), (0.7, 1), (0.3, 3)])(flow)
    velocity = guided(x, t, label=label).velocity
    assert len(ran[0]) == 1 and guided.block_evaluations == len(ran[1]) == 5
    wanted = said(x, t, label).velocities
    close(velocity, torch.stack([wanted[branch - 1][i] for i, branch in enumerate((2, 1, 1, 3, 3))]))
    ran[1].clear()
    guided(x[:3], t[:3], label=label[:3])
    assert len(ran[1]) == 3  # no row needs the last branch


def test_bound_labels_and_counters_are_shared(flow):
    guided = guidance.build("branch", branch=2)(flow.given(label=LABEL))
    assert torch.equal(guided(X, T).velocity, guided.given(label=LABEL)(X, T).velocity)
    assert guided.nfe == flow.nfe == 2 and guided.block_evaluations == flow.block_evaluations == 6
    assert guided.bound["label"] is LABEL


# --- look-ahead ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [0.07, -0.05, 0.3, -0.5])
@pytest.mark.parametrize("branch", [2, 3])
def test_later_branches_look_ahead(flow, ran, gap, branch):
    ahead = guidance.build("look-ahead", gap=gap)(guidance.build("branch", branch=branch)(flow))
    for t in (T, torch.tensor([0.2, 0.9])):
        velocity = ahead(X, t, label=LABEL).velocity.detach()
        close(velocity, said(t=t, gap=gap).velocities[branch - 1])
        assert float((velocity - said(t=t).velocities[branch - 1]).abs().max()) > 1e-3
    assert len(ran[0]) == 6


# --- internal guidance -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.5, 1.7, -0.3])
@pytest.mark.parametrize("branch", [1, 2])
def test_internal_guidance_is_an_extrapolation_in_one_call(flow, ran, weight, branch):
    velocity = guidance.build("internal", weight=weight, branch=branch)(flow)(X, T, label=LABEL).velocity
    assert (len(ran[0]), len(ran[1])) == (1, 5)
    strong, weak = (guidance.build("branch", branch=i)(flow)(X, T, label=LABEL).velocity for i in (3, branch))
    close(velocity, strong + weight * (strong - weak))
    assert float((velocity - strong).detach().abs().max()) > 1e-2


def test_internal_guidance_in_an_interval_on_some_channels_and_rescaled(flow):
    guide = guidance.build("internal", weight=2.0, branch=1, interval=(0.3, 0.6), channels=2, rescale=0.7)
    t = torch.tensor([0.6, 0.65])
    velocity, (weak, _, strong) = guide(flow)(X, t, label=LABEL).velocity, said(t=t).velocities
    far = (strong + 2.0 * (strong - weak))[0, :2]
    wanted = strong.clone()
    wanted[0, :2] = far * (0.7 * strong[0, :2].std() / far.std() + 0.3)
    close(velocity, wanted)
    spoke = []
    handle = NETWORK.middle_head.register_forward_hook(lambda *_: spoke.append(1))
    outside = guide(flow)(X, torch.tensor(0.7), label=LABEL).velocity
    handle.remove()
    assert not spoke  # the weaker branch
    assert torch.equal(outside, flow(X, torch.tensor(0.7), label=LABEL).velocity)


def test_internal_guidance_of_an_exit_with_look_ahead_in_any_order(flow, ran):
    guides = [
        guidance.build("branch", schedule=[(1, 1), (0.5, 2)]),
        guidance.build("look-ahead", gap=0.1),
        guidance.build("internal", weight=0.8, branch=1, interval=(0, 0.5)),
    ]
    weak, strong, _ = said(gap=0.1).velocities
    for order in itertools.permutations(guides):
        guided = flow
        for guide in order:
            guided = guide(guided)
        ran[1].clear()
        close(guided(X, T, label=LABEL).velocity, strong + 0.8 * (strong - weak))
        assert len(ran[1]) == 3
        close(guided(X, 0.8, label=LABEL).velocity, said(t=torch.tensor(0.8)).velocities[0])


@pytest.mark.parametrize("t", [0.3, 0.45, 0.55])
def test_with_classifier_free_guidance_by_hand_on_four_rows(flow, ran, t):
    internal = guidance.build("internal", weight=0.6, branch=2, interval=(0.0, 0.5))
    free = guidance.build("classifier-free", scale=2.5, interval=(0.4, 1.0))
    velocity = free(internal(flow))(X, t, label=LABEL).velocity
    assert (len(ran[0]), len(ran[1])) == (1, 5) and ran[0] == ([4] if t >= 0.4 else [2])
    rows = said(torch.cat((X, X)), torch.tensor(t), torch.cat((LABEL, NULL))).velocities
    guided = rows[2] + (0.6 * (rows[2] - rows[1]) if t <= 0.5 else 0)
    given, null = guided[:2], guided[2:]
    close(velocity, null + 2.5 * (given - null) if t >= 0.4 else given)


def test_with_autoguidance_by_an_exit_of_the_same_network(flow, ran):
    weak = guidance.build("branch", branch=1)(flow)
    guided = guidance.build("autoguidance", weak=weak, scale=1.6)(guidance.build("look-ahead", gap=0.05)(flow))
    first, last = said().velocities[0], said(gap=0.05).velocities[2]
    ran[1].clear()
    close(guided(X, T, label=LABEL).velocity, first + 1.6 * (last - first))
    assert guided.nfe == 2 and guided.block_evaluations == len(ran[1]) == 6


# --- second-order steps ----------------------------------------------------------------------------------------------


class Gaussians(nn.Module):
    """The exact flow of data N(mean, std²), coordinate by coordinate, by label; its branch 1 says Dv/Dt.

    x = (1 − t)·mean + S·ζ on the linear path, S² = (1 − t)²·std² + t² and ζ constant along the flow.
    """

    branch_count, has_acceleration, num_classes, null_label = 2, True, 2, 2
    means, stds = torch.tensor([2.0, -1.0, 0.5]).double(), torch.tensor([0.5, 0.8, 1.1]).double()

    def blocks_until(self, branch):
        return 3 * branch

    def forward(self, x, t, spoken, branch_times, label):
        mean, std, t = (
            value.reshape(-1, *(1,) * (x.ndim - 1)).to(x) for value in (self.means[label], self.stds[label], t)
        )
        spread = ((1 - t) ** 2 * std**2 + t**2).sqrt()
        rate = (t - (1 - t) * std**2) / spread
        second = (std**2 + 1 - rate**2) / spread
        zeta = (x - (1 - t) * mean) / spread
        velocities = tuple(rate * zeta - mean for _ in spoken.velocities)
        return Branches(velocities, tuple(second * zeta for _ in spoken.accelerations), ())

    def solution(self, x, label):
        """At t = 0, from t = 1."""
        mean, std = (value[label].reshape(-1, *(1,) * (x.ndim - 1)) for value in (self.means, self.stds))
        return mean + std * x


def slope(errors, steps):
    """Of log error against log step length, by least squares."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (steps, errors))
    x, y = x - x.mean(), y - y.mean()
    return -float((x * y).sum() / x.square().sum())


STATE, LABELS = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.arange(5) % 3


def test_second_order_with_an_exact_acceleration():
    exact, steps = Gaussians(), (20, 40, 80, 160)
    wanted = exact.solution(STATE, LABELS)
    for name, order in (("taylor", 2), ("euler", 1)):
        flow = guidance.build("branch", branch=2)(Flow(exact, LINEAR))
        errors = [float((solvers.build(name, steps=n)(flow, STATE, label=LABELS) - wanted).abs().max()) for n in steps]
        assert abs(slope(errors, steps) - order) < 0.2


def test_guided_accelerations_are_not_the_guided_flows_own():
    """By the formula the order is 1 under a scale other than 1; with w(w − 1)·(d·∇)d added it is 2."""

    class Corrected(Gaussians):
        def forward(self, x, t, spoken, branch_times, label):
            out = super().forward(x, t, spoken, branch_times, label)
            if not spoken.accelerations or not corrected:
                return out
            half = x[: len(x) // 2]

            def difference(half):
                there = super(Corrected, self).forward(torch.cat((half, half)), t, spoken, branch_times, label)
                return there.velocities[0][: len(half)] - there.velocities[0][len(half) :]

            d = difference(half)
            missing = 2.0 * (2.0 - 1) * jvp(difference, (half,), (d,))[1]
            return out._replace(accelerations=(out.accelerations[0] + torch.cat((missing, missing)),))

    flow, steps = guidance.build("cfg", scale=2.0)(Flow(Corrected(), LINEAR)), (20, 40, 80)
    label = torch.arange(5) % 2
    free = guidance.build("cfg", scale=2.0)(guidance.build("branch", branch=2)(Flow(Corrected(), LINEAR)))
    corrected = False
    wanted = solvers.build("rk4", steps=100)(free, STATE, label=label)
    for corrected, order in ((False, 1), (True, 2)):  # noqa: B007  # read inside
        errors = [
            float((solvers.build("taylor", steps=n)(flow, STATE, label=label) - wanted).abs().max()) for n in steps
        ]
        assert abs(slope(errors, steps) - order) < 0.2


class Derived(nn.Module):
    """A velocity, and its derivative along itself, by forward differentiation."""

    branch_count, has_acceleration = 2, True

    def __init__(self, velocity):
        super().__init__()
        self.velocity = velocity

    def blocks_until(self, branch):
        return branch

    def forward(self, x, t, spoken, branch_times):
        v, rate = jvp(self.velocity, (x, t), (self.velocity(x, t), torch.ones_like(t)))
        return Branches((v,), (rate,) * len(spoken.accelerations), ())


def test_taylor_keeps_the_contract_of_solvers(gaussian):
    """Moments, NFE, precision, batches, and the order on a path that is not straight; on the flow that is checked."""

    class Exact(solvers.registry.entry("taylor").factory):
        def solve(self, flow, x, **keywords):
            exact = Flow(Derived(gaussian()._replace(path=flow.interpolant).velocity), flow.interpolant)
            exact._spent = flow._spent
            return super().solve(exact, x, **keywords)

    check_solver(Exact)


def test_without_acceleration_it_is_eulers_method_bit_for_bit(flow):
    still = network()
    with torch.no_grad():
        for parameter in still.acceleration_head.parameters():
            parameter.zero_()
    flow = Flow(still, LINEAR)
    plain = euler().solve(flow, X, label=LABEL)
    taylor = solvers.build("taylor", steps=5).solve(flow, X, label=LABEL)
    assert torch.equal(taylor.x, plain.x) and taylor.nfe == plain.nfe == 5
    assert taylor.block_evaluations == plain.block_evaluations == 25 and flow.nfe == 10
    assert not torch.equal(solvers.build("taylor", steps=5)(Flow(NETWORK, LINEAR), X, label=LABEL), plain.x)


@pytest.mark.parametrize("branch", [None, 1, 2])
def test_a_step_by_hand(flow, ran, branch):
    solver = solvers.build("taylor", steps=1, branch=branch, start=0.8, end=0.5)
    ours = solver.solve(flow, X, label=LABEL)
    assert (len(ran[0]), len(ran[1])) == (1, 5) and ours.times.tolist() == [0.8]
    out = said(t=torch.tensor(0.8))
    close(ours.x, X - 0.3 * out.velocities[2] + 0.045 * out.accelerations[(branch or 2) - 1])


def test_a_step_from_an_exit_runs_no_block_more(flow, ran):
    guided = guidance.build("branch", schedule=[(1, 1), (0.8, 2)])(flow)
    ours = solvers.build("taylor", steps=2, start=0.9, end=0.3).solve(guided, X, label=LABEL)
    assert ours.block_evaluations == len(ran[1]) == 1 + 3
    out = said(t=torch.tensor(0.9))
    x = X - 0.3 * out.velocities[0] + 0.045 * out.accelerations[0]
    out = said(x, torch.tensor(0.6))
    close(ours.x, x - 0.3 * out.velocities[1] + 0.045 * out.accelerations[0], 1e-5)


@pytest.mark.parametrize("name", ["cfg", "autoguidance"])
def test_accelerations_are_guided_by_the_formula(flow, ran, name):
    """One step under classifier-free guidance, with internal guidance inside; and beside a weaker model of its own."""
    if name == "cfg":
        internal = guidance.build("internal", weight=0.5, branch=1)(flow)
        guided, w = guidance.build("cfg", scale=3.0)(internal), 3.0
        out = said(torch.cat((X, X)), torch.tensor(0.8), torch.cat((LABEL, NULL)))
        v = out.velocities[2] + 0.5 * (out.velocities[2] - out.velocities[0])
        (strong, weak), (a, b) = v.split(2), out.accelerations[1].split(2)
    else:
        other = network(cuts=(2,), hidden_size=8)
        guided, w = guidance.build("autoguidance", weak=other, scale=1.4)(flow), 1.4
        out, beside = said(t=torch.tensor(0.8)), said(t=torch.tensor(0.8), backbone=other)
        strong, weak, a, b = out.velocities[2], beside.velocities[1], out.accelerations[1], beside.accelerations[0]
    ran[0].clear()
    ours = solvers.build("taylor", steps=1, start=0.8, end=0.5).solve(guided, X, label=LABEL)
    assert len(ran[0]) == 1 and ours.nfe == (1 if name == "cfg" else 2)
    v, acceleration = weak + w * (strong - weak), b + w * (a - b)
    close(ours.x, X - 0.3 * v + 0.045 * acceleration, 1e-5)


def test_samples_at_times_of_their_own_have_accelerations_too(flow):
    guided = accelerated(guidance.build("branch", schedule=[(1, 3), (0.5, 1)])(flow), None)
    t = torch.tensor([0.9, 0.2])
    prediction, out = guided(X, t, label=LABEL), said(t=t)
    assert isinstance(prediction, AcceleratedPrediction)
    close(prediction.acceleration, torch.stack((out.accelerations[1][0], out.accelerations[0][1])))
    close(prediction.velocity, torch.stack((out.velocities[2][0], out.velocities[0][1])))


def test_a_taylor_solve_can_be_differentiated():
    """By central differences in float64."""
    solver, flow, x = solvers.build("taylor", steps=3), Flow(network().double(), LINEAR), X.double()
    d = 1e-6 * torch.randn(X.shape, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    end = solver.solve(flow, leaf, gradients=True, label=LABEL).x
    (gradient,) = torch.autograd.grad(end.sin().sum(), leaf)
    ahead, behind = (solver(flow, x + sign * d, label=LABEL).sin().sum() for sign in (1, -1))
    assert float((gradient * d).sum()) == pytest.approx(float(ahead - behind) / 2, rel=1e-5)
    assert torch.equal(solver(flow, x, label=LABEL), end.detach())


def test_a_bfloat16_network_with_a_float32_state():
    """Exits, looks ahead, guides and steps in the network's precision; states keep theirs."""
    for guide in (dict(name="branch", branch=2), dict(name="look-ahead", gap=0.1), dict(name="internal", branch=2)):
        flow = guidance.build({**guide})(Flow(network().bfloat16(), LINEAR))
        solution = solvers.build("taylor", steps=3).solve(flow, X, label=LABEL, trajectory=True)
        assert solution.x.dtype == torch.float32 and solution.trajectory.shape == (4, *X.shape)
        assert torch.equal(solution.trajectory[0], X) and torch.equal(solution.trajectory[-1], solution.x)
        exact = guidance.build({**guide})(Flow(NETWORK, LINEAR))
        wanted = solvers.build("taylor", steps=3)(exact, X, label=LABEL)
        assert float((solution.x - wanted).norm() / (wanted - X).norm()) < 0.1


def test_a_taylor_step_that_fails_says_where():
    class Breaking(Gaussians):
        def forward(self, x, t, **given):
            out = super().forward(x, t, **given)
            return out._replace(accelerations=tuple(a / (t >= 0.5).to(a)[:, None] for a in out.accelerations))

    with pytest.raises(SolverError, match="became NaN or infinite") as caught:
        solvers.build("taylor", steps=10)(Flow(Breaking(), LINEAR), STATE, label=LABELS)
    assert caught.value.step == 6 and caught.value.t == pytest.approx(0.3) and caught.value.nfe == 7


# --- configuration ---------------------------------------------------------------------------------------------------

SMALL = {"name": "deepflow", "input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 8, "depth": 3,
         "num_heads": 2, "num_classes": 10, "cuts": [1], "acceleration_width": 4}  # fmt: skip


def configured(*guides, **sections):
    entries = {"data": "digits", "backbone": SMALL, "objective": "deepflow", "solver": {"name": "taylor", "steps": 3}}
    return config.resolve({**entries, "train": {"steps": 1, "folder": "f"}, "guidance": [*guides], **sections})


def test_a_configuration_names_them():
    switch = {"name": "branch", "schedule": [[1, 1], [0.7, 2]]}
    built = parts.build(
        configured(
            switch,
            {"name": "look-ahead", "gap": 0.01},
            {"name": "internal", "weight": 0.5, "branch": 1, "interval": [0.0, 0.6]},
            {"name": "classifier-free", "scale": 1.5},
        )
    )
    flow = built.flow(built.backbone)
    inner = flow.flow
    assert isinstance(inner, BranchFlow) and inner.schedule == ((1.0, 1), (0.7, 2)) and inner.reading.gap == 0.01
    x = torch.randn(2, 1, 8, 8)
    solution = built.solver.solve(flow, x, label=LABEL)
    assert solution.nfe == 3 and solution.block_evaluations == 1 + 3 + 3


@pytest.mark.parametrize(
    ("guides", "message"),
    [
        ([{"name": "branch", "branch": 1.5}], r"guidance.0.branch: got 1.5"),
        ([{"name": "branch", "schedule": [[1, 1, 1]]}], r"guidance.0.schedule: got \[\[1, 1, 1\]\]"),
        ([{"name": "branch", "brnch": 1}], "guidance.0.brnch"),
        ([{"name": "branch", "branch": 3}], r"guidance: got branch 3, expected a branch of 1 … 2"),
        ([{"name": "cfg"}, {"name": "internal"}], r"put 'internal' before other guidance"),
        ([{"name": "cfg-zero"}], r"solver: got guidance of the velocity alone"),
    ],
)
def test_a_wrong_configuration_is_refused_before_training(guides, message):
    with pytest.raises(ConfigurationError, match=message):
        parts.build(configured(*guides))


# --- wrong use -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: guidance.build("branch"), "got branch None and schedule None; give one"),
        (lambda: guidance.build("branch", branch=1, schedule=[(1, 1)]), "give one of them"),
        (lambda: guidance.build("branch", branch=0), r"got branch 0, expected a branch of 1 and more"),
        (lambda: guidance.build("branch", branch=True), "got branch True"),
        (lambda: guidance.build("branch", branch=1.0), "got branch 1.0"),
        (lambda: guidance.build("branch", schedule=[]), r"with the times \[\], expected ones that fall from 1"),
        (lambda: guidance.build("branch", schedule=[(0.9, 1), (0.5, 2)]), "each t has one branch"),
        (lambda: guidance.build("branch", schedule=[(1, 1), (0.5, 2), (0.5, 3)]), "expected ones that fall"),
        (lambda: guidance.build("branch", schedule=[(1, 1), (0.2, 2), (0.5, 3)]), "expected ones that fall"),
        (lambda: guidance.build("branch", schedule=[(1, 1), (-0.1, 2)]), "expected ones that fall"),
        (lambda: guidance.build("branch", schedule=[(1, 1), (math.nan, 2)]), "got schedule with time nan"),
        (lambda: guidance.build("branch", schedule=[1, 0.5]), "expected pairs"),
        (lambda: guidance.build("branch", schedule=0.5), "expected pairs"),
        (lambda: guidance.build("branch", schedule=[(1, "1")]), "got branch '1'"),
        (lambda: guidance.build("look-ahead", gap=math.inf), "got gap inf, expected a finite number"),
        (lambda: guidance.build("look-ahead", gap=1.5), r"got gap 1.5, expected a length of time in \[-1, 1\]"),
        (lambda: guidance.build("internal", weight=math.nan), "got weight nan, expected a finite number"),
        (lambda: guidance.build("internal", weight=True), "got weight True"),
        (lambda: guidance.build("internal", branch=0), "got weaker branch 0"),
        (lambda: guidance.build("internal", interval=(0.7, 0.3)), "got guidance interval"),
        (lambda: solvers.build("taylor", steps=3, branch=0), "got acceleration of branch 0"),
    ],
)
def test_options_out_of_range(make, message):
    with pytest.raises(InputError, match=message):
        make()


def wrap(name, flow, **options):
    return guidance.build(name, **options)(flow)


SIT = Flow(backbones.build("sit", **{**TOY, "depth": 2}), LINEAR)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: wrap("branch", f, branch=4), r"got branch 4, expected a branch of 1 … 3"),
        (lambda f: wrap("branch", f, schedule=[(1, 1), (0.5, 4)]), "got branch 4"),
        (lambda f: wrap("internal", f, branch=3), r"got weaker branch 3, expected a branch of 1 … 2"),
        (lambda f: wrap("branch", SIT, branch=1), "got a SiT that predicts velocity for 'branch'"),
        (lambda f: wrap("internal", SIT), "expected a DeepFlow backbone"),
        (lambda f: wrap("look-ahead", Flow(NETWORK, LINEAR, "data"), gap=0.1), "predicts data for 'look-ahead'"),
        (lambda f: wrap("internal", wrap("cfg", f)), "put 'internal' before other guidance"),
        (lambda f: wrap("branch", wrap("autoguidance", f, weak=NETWORK), branch=1), "put 'branch' before"),
        (lambda f: wrap("look-ahead", Rescheduled(f, LINEAR), gap=0.1), "got a Rescheduled"),
        (lambda f: wrap("branch", wrap("branch", f, branch=1), branch=2), "got 'branch' twice"),
        (lambda f: wrap("internal", wrap("internal", f), branch=2), "got 'internal' twice"),
        (lambda f: wrap("internal", wrap("branch", f, branch=1)), "by branch 1 at times where branch 1 is read"),
        (
            lambda f: wrap("branch", wrap("internal", f, branch=2, interval=(0, 0.6)), schedule=[(1, 1), (0.5, 3)]),
            "by branch 2 at times where branch 1 is read",
        ),
        (lambda f: wrap("internal", Flow(network(cuts=()), LINEAR)), "none, as the backbone has one"),
        (lambda f: wrap("look-ahead", wrap("branch", f, branch=1), gap=0.1), "where branch 1 alone is read, which st"),
        (lambda f: wrap("branch", wrap("look-ahead", f, gap=-0.1), branch=1), "got look-ahead -0.1 where branch 1"),
        (lambda f: wrap("look-ahead", Flow(network(cuts=()), LINEAR), gap=0.3), "got look-ahead 0.3 where branch 1"),
        (lambda f: wrap("internal", f, channels=4).check(X, {"label": LABEL}), "got channels 4 to guide"),
    ],
)
def test_wrong_use_is_refused_before_any_call(flow, ran, make, message):
    with pytest.raises(InputError, match=message):
        make(flow)
    assert not ran[0]


def test_what_is_allowed_beside_it(flow):
    """An interval that ends where the weaker branch takes over, and schedules that name one branch twice."""
    internal = guidance.build("internal", branch=2, interval=(0.0, 0.5))
    assert internal(wrap("branch", flow, schedule=[(1, 1), (0.5, 3)])).reading.weaker == 2
    assert wrap("branch", flow, schedule=[(1, 1), (0.5, 3), (0.0, 1)]).branches_at(torch.tensor(0.0)) == 1
    assert wrap("look-ahead", wrap("branch", flow, schedule=[(1, 1), (0.5, 2)]), gap=0.1).reading.gap == 0.1
    assert wrap("look-ahead", wrap("branch", flow, branch=1), gap=0.0).reading.gap == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: SIT, "got a SiT that predicts velocity and no acceleration"),
        (lambda f: Flow(NETWORK, LINEAR, "noise"), "predicts noise and no acceleration"),
        (lambda f: Flow(network(cuts=()), LINEAR), "of two branches or more"),
        (
            lambda f: Flow(backbones.build("deepflow", **TOY, cuts=(2,), refiner="none"), LINEAR),
            "whose refiner has one",
        ),
        (lambda f: wrap("cfg-zero", f), "guidance of the velocity alone"),
        (lambda f: wrap("apg", f), "guidance of the data alone"),
        (lambda f: Rescheduled(f, interpolants.build("trigonometric")), "got a Rescheduled, which hands no accel"),
        (lambda f: wrap("autoguidance", f, weak=SIT), "got a SiT that predicts velocity and no acceleration"),
        (lambda f: wrap("cfg", Rescheduled(f, LINEAR)), "got a Rescheduled"),
    ],
)
def test_flows_without_acceleration_are_refused_before_any_call(flow, ran, make, message):
    made, taylor = make(flow), solvers.build("taylor", steps=3)
    for act in (lambda: taylor(made, X, label=LABEL), lambda: taylor.check(made, X, None)):
        with pytest.raises(InputError, match=message):
            act()
    assert not ran[0]


def test_accelerations_of_branches_that_are_not_there(flow, ran):
    with pytest.raises(InputError, match=r"got acceleration of branch 3, expected a branch of 1 … 2"):
        solvers.build("taylor", steps=3, branch=3)(flow, X, label=LABEL)
    with pytest.raises(InputError, match=r"got acceleration of branch 2, expected a branch of 1 … 1"):
        solvers.build("taylor", steps=3, branch=2)(wrap("branch", flow, branch=1), X, label=LABEL)
    with pytest.raises(InputTypeError, match="expected a flow"):
        solvers.build("taylor", steps=3)(NETWORK, X, label=LABEL)
    with pytest.raises(UnknownOptionError, match="has no option 'brnch'"):
        solvers.build("taylor", steps=3, brnch=1)
    assert not ran[0]
