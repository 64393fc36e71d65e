"""The options of DeepFlow's objective, each recomputed by hand; and the material acceleration against exact flows."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.func import jvp

from pathline import Draws, InputError, OpenEndError, backbones, interpolants, objectives, solvers
from pathline.backbones.layers import math_attention
from pathline.core.config import resolve
from pathline.plugins.deepflow import Branches
from pathline.plugins.deepflow.material import METHODS, material_acceleration
from pathline.plugins.deepflow.objective import later_times
from pathline.testing import GaussianMixture, check_objective
from pathline.training import Trainer
from pathline.training.log import read_rows

LINEAR, TRIGONOMETRIC = interpolants.build("linear"), interpolants.build("trigonometric")
TOY = dict(input_size=4, patch_size=2, in_channels=3, hidden_size=12, depth=5, num_heads=2, num_classes=7)
DATA, NOISE = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(1))
LABEL = torch.tensor([0, 3, 6, 7, 2])
TIMES = tuple(
    torch.tensor(t) for t in ([0.1, 0.3, 0.5, 0.8, 1.0], [0.12, 0.29, 0.5, 0.9, 1.0], [0.2, 0.2, 0.4, 1.0, 0.9])
)


def build(**options):
    return objectives.build("deepflow", interpolant=options.pop("path", LINEAR), **options)


def network(seed=0, **options):
    """A branched network of three branches whose every output moves."""
    made = backbones.build("deepflow", **{**TOY, "cuts": (1, 3), "acceleration_width": 9, **options})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return made


def wide(t):
    return t[:, None, None, None]


def mean(x):
    return x.square().flatten(1).mean(1)


def spoken(path=LINEAR):
    x = path.interpolate(DATA, NOISE, TIMES[0])
    return network()(x, TIMES[0], label=LABEL, branch_times=TIMES[1:])


# --- times ------------------------------------------------------------------------------------------------------------


def test_each_sample_has_a_sign_of_its_own():
    """Fair, shared by a sample's gaps, and a function of (seed, sample, counter) whatever the batch."""
    law, count = build(gap_sign="sample", max_gap=0.3, times={"name": "logit-normal", "std": 0.2}), 4000
    first, second, third = law.draw_times(Draws(1).at(range(count), 3), 3)
    up = second > first
    assert torch.equal(up, third > second)  # times lie around ½: none is clipped
    assert abs(float(up.double().mean()) - 0.5) < 4 * 0.5 / math.sqrt(count)
    some = law.draw_times(Draws(1).at((7, 2, 1999, 11, 5), 3), 3)
    for whole, part in zip((first, second, third), some, strict=True):
        assert torch.equal(whole[[7, 2, 1999, 11, 5]], part)
    for seed, counter in ((2, 3), (1, 4)):
        other = law.draw_times(Draws(seed).at(range(count), counter, step=0), 3)
        assert 0.4 < float((up == (other[1] > other[0])).double().mean()) < 0.6
    gap = (second - first).abs() / 0.3
    assert abs(float(gap[up].mean() - gap[~up].mean())) < 4 * math.sqrt(2 / 12 / (count / 2))  # sign and length apart


def test_a_given_sign_and_the_coin_of_the_batch():
    draws = [Draws(4).at(range(50), step) for step in range(40)]
    given = {sign: build(gap_sign=sign, max_gap=0.2) for sign in ("batch", "down", "up")}
    seen = set()
    for bound in draws:
        times = {sign: law.draw_times(bound, 3) for sign, law in given.items()}
        assert bool((times["down"][1] <= times["down"][0]).all()) and bool((times["up"][2] >= times["up"][1]).all())
        gaps = [0.2 * bound.uniform(f"time gap {i}") for i in (1, 2)]
        sign = 1 if bound.shared_uniform("time gap sign") < 0.5 else -1
        second = (times["batch"][0] + sign * gaps[0]).clamp(0, 1)
        assert torch.equal(times["batch"][1], second)
        assert torch.equal(times["batch"][2], (second + sign * gaps[1]).clamp(0, 1))
        assert torch.equal(times["batch"][2], times["up" if sign > 0 else "down"][2])
        seen.add(sign)
    assert seen == {1, -1}


def test_times_keep_to_the_interval_of_the_path():
    t, gap = torch.tensor([1e-5, 0.4, 1.0]), torch.tensor([0.1, 0.2, 0.3])
    down = later_times(t, [gap, gap], up=torch.tensor([False, True, False]), interval=(1e-5, 1.0))
    assert torch.allclose(down[2], torch.tensor([1e-5, 0.8, 0.4]))
    path = interpolants.build("vp")  # whose velocity is infinite at 0
    law = build(path=path, acceleration=0.0, max_gap=0.5, times={"name": "logit-normal", "mean": -9.0})
    for t in law.draw_times(Draws(0).at(range(500)), 2):
        assert float(t.min()) >= 1e-5
    plain = objectives.build("velocity", interpolant=path, times={"name": "logit-normal", "mean": -9.0})
    assert torch.equal(law.draw_times(Draws(0).at(range(500)), 2)[0], plain.draw_times(Draws(0).at(range(500)))[0])


# --- terms ------------------------------------------------------------------------------------------------------------


def accelerations(weights=(1.0, 1.0), power=0):
    """Σ wᵢ·‖x_{tᵢ} − tᵢ·vᵢ + ½·tᵢ²·aᵢ − data‖²/tᵢ^power."""
    out, total = spoken(), 0.0
    for weight, t, v, a in zip(weights, TIMES, out.velocities, out.accelerations, strict=False):
        x = (1 - wide(t)) * DATA + wide(t) * NOISE
        total = total + weight * mean(x - wide(t) * v + wide(t) ** 2 / 2 * a - DATA) / t**power
    return total


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, lambda: accelerations()),
        (dict(stop_velocity=False), lambda: accelerations()),
        (dict(acceleration_by_branch=True, branch_weights=(0.3, 0.7, 2.0)), lambda: accelerations((0.3, 0.7))),
        (dict(acceleration_by_branch=True), lambda: accelerations((0.2, 0.2))),
        (dict(acceleration_by_clock=True), lambda: accelerations(power=2)),
        (
            dict(acceleration_by_clock=True, acceleration_by_branch=True, branch_weights=(0.3, 0.7, 2.0)),
            lambda: accelerations((0.3, 0.7), power=2),
        ),
    ],
)
def test_acceleration_terms(options, wanted):
    terms = build(**options).terms(spoken(), DATA, NOISE, TIMES)
    assert torch.allclose(terms["acceleration"], wanted(), rtol=1e-3, atol=1e-5)
    plain = build(branch_weights=options.get("branch_weights")).terms(spoken(), DATA, NOISE, TIMES)
    assert set(terms) == {"deep", "acceleration"} and torch.equal(terms["deep"], plain["deep"])


def test_the_clock_weight_divides_by_nothing():
    """At t = 0, where the paper's loss is 0, the weighted one is that of the velocity."""
    x, zero = DATA.double(), torch.zeros(5, dtype=torch.float64)
    v, a = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    out, noise = Branches((v, v), (a,), ()), NOISE.double()
    assert float(build().terms(out, x, noise, (zero, zero))["acceleration"].max()) == 0
    weighted = build(acceleration_by_clock=True).terms(out, x, noise, (zero, zero))["acceleration"]
    assert torch.allclose(weighted, mean(v - (noise - x)))


def test_the_path_has_an_acceleration_of_its_own():
    """cos(πt/2) and sin(πt/2) twice differentiated; the target of the velocities is the path's own."""
    out, half = spoken(TRIGONOMETRIC), math.pi / 2
    terms = build(path=TRIGONOMETRIC, acceleration_target="path").terms(out, DATA, NOISE, TIMES)
    wanted = sum(
        mean(a + half**2 * (wide(torch.cos(half * t)) * DATA + wide(torch.sin(half * t)) * NOISE))
        for t, a in zip(TIMES, out.accelerations, strict=False)
    )
    velocity = half * (wide(torch.cos(half * TIMES[0])) * NOISE - wide(torch.sin(half * TIMES[0])) * DATA)
    deep = sum(w * mean(v - velocity) for w, v in zip((0.2, 0.2, 1.0), out.velocities, strict=True))
    assert torch.allclose(terms["acceleration"], wanted, rtol=1e-4) and torch.allclose(terms["deep"], deep, rtol=1e-4)
    by_branch = build(path=TRIGONOMETRIC, acceleration_target="path", acceleration_by_branch=True)
    assert torch.allclose(by_branch.terms(out, DATA, NOISE, TIMES)["acceleration"], 0.2 * wanted, rtol=1e-4)
    untrained = build(path=TRIGONOMETRIC, acceleration=0.0).terms(out, DATA, NOISE, TIMES)
    assert set(untrained) == {"deep", "acceleration"} and torch.equal(untrained["acceleration"], torch.zeros(5))
    assert torch.equal(untrained["deep"], terms["deep"])


@pytest.mark.parametrize("by_clock", [False, True])
@pytest.mark.parametrize("stopped", [False, True])
def test_where_the_gradient_of_the_acceleration_loss_flows(stopped, by_clock):
    out = spoken()
    terms = build(stop_velocity=stopped, acceleration_by_clock=by_clock).terms(out, DATA, NOISE, TIMES)
    given = (*out.accelerations, *out.velocities)
    gradients = torch.autograd.grad(terms["acceleration"].sum(), given, allow_unused=True)
    moved = [gradient is not None and bool(gradient.any()) for gradient in gradients]
    assert moved == [True, True, not stopped, not stopped, False]


# --- material acceleration --------------------------------------------------------------------------------------------


def gaussian(mean, std):
    """v and D v/Dt of the flow of N(mean, std²) on the linear path: x(t) = α·mean + S(t)·z with a constant z."""

    def parts(t):
        S = torch.sqrt((1 - t) ** 2 * std**2 + t**2)
        rate = (t - (1 - t) * std**2) / S
        return S[:, None], rate[:, None], ((1 + std**2) / S - rate**2 / S)[:, None]

    def velocity(x, t):
        S, rate, _ = parts(t)
        return -mean + rate / S * (x - (1 - t[:, None]) * mean)

    def acceleration(x, t):
        S, _, second = parts(t)
        return second / S * (x - (1 - t[:, None]) * mean)

    return velocity, acceleration


GAPS = torch.tensor([0.02, -0.02, 0.02, -0.02, 0.02, -0.02, 0.02], dtype=torch.float64)
INSTANTS = torch.tensor([0.0, 1e-3, 0.2, 0.5, 0.7, 0.999, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("method", METHODS)
def test_the_derivative_along_an_exact_flow(method):
    """Closed form, up to both ends; differences of the order that they claim."""
    velocity, acceleration = gaussian(1.5, 0.4)
    x = torch.randn(7, 3, dtype=torch.float64)

    def error(step):
        given = {"jvp": {}, "central-difference": {"step": step}, "branch-times": {"gap": GAPS * step / 0.02}}[method]
        found = material_acceleration(velocity, x, INSTANTS, method=method, **given)
        return (found - acceleration(x, INSTANTS)).abs().amax(1)

    if method == "jvp":
        assert float(error(0.0).max()) < 1e-12
        return
    coarse, fine = error(0.02), error(0.005)
    slopes = torch.log(coarse / fine) / math.log(4)
    order = 2 if method == "central-difference" else 1
    assert float((slopes - order).abs().max()) < 0.2, slopes


@pytest.mark.parametrize("path", [LINEAR, TRIGONOMETRIC], ids=["linear", "trigonometric"])
def test_it_is_the_second_derivative_of_a_course(path):
    """Of a mixture, against second differences of solutions of the flow: to t ± h, at tolerance 1e-12."""
    mixture, h = GaussianMixture([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]], [0.5, 0.3, 0.7]), 1e-3
    x, start = torch.randn(11, 2, dtype=torch.float64), 0.6
    flow = mixture.flow(path)
    there, back = (
        solvers.build("dopri5", rtol=1e-12, atol=1e-12, start=start, end=start + step)(flow, x) for step in (h, -h)
    )
    truth = (there - 2 * x + back) / h**2
    t = torch.full((11,), start, dtype=torch.float64)
    found = material_acceleration(lambda x, t: flow.backbone(x, t), x, t)
    assert torch.allclose(found, truth, rtol=1e-4, atol=1e-3)
    assert float(truth.abs().max()) > 1


@pytest.mark.parametrize("method", METHODS)
def test_no_call_leaves_the_interval(method):
    seen = []

    def velocity(x, t):
        seen.append(t)
        return x * t[:, None] ** 2

    gap = torch.tensor([-0.01, 0.01, 0.0, -1e-7, -0.3, 0.3, 0.01])
    given = {"gap": gap} if method == "branch-times" else {}
    t = torch.tensor([0.1, 0.9, 0.1, 0.9, 0.3, 0.7, 0.5])
    x = torch.randn(7, 2)
    found = material_acceleration(velocity, x, t, method=method, interval=(0.1, 0.9), **given)
    assert len(seen) == {"jvp": 2, "central-difference": 3, "branch-times": 2}[method]
    if method != "jvp":
        stacked = torch.stack(seen)
        assert float(stacked.min()) > 0.1 - 1e-6 and float(stacked.max()) < 0.9 + 1e-6
    if method == "branch-times":
        moved = seen[1] - seen[0]
        assert torch.allclose(moved, torch.tensor([0.01, -0.01, 1e-3, -1e-3, 0.3, -0.3, 0.01]), atol=1e-6)
    truth = x * (2 * t + t**4)[:, None]
    assert torch.allclose(found[:4], truth[:4], rtol=0.1 if method == "branch-times" else 1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_through_a_network(method):
    """In the loss: the last branch's plain velocity, labels as dropped, no gradient; a float32 network."""
    made = network()
    objective = build(acceleration=0.0, material=0.7, material_method=method, label_dropout=0.5, max_gap=0.02)
    draws = Draws(3).at(range(5))
    loss = objective(made, DATA, draws, label=LABEL)
    times, noise = objective.draw_times(draws, 3), draws.normal("noise", (3, 4, 4))
    x = (1 - wide(times[0])) * DATA + wide(times[0]) * noise
    label = torch.where(draws.uniform("label dropout") < 0.5, torch.tensor(7), LABEL)
    assert not torch.equal(label, LABEL)
    double = network().double()  # differentiated backward, twice: independent of forward mode
    point = (x.double(), times[0].double())
    v = double(*point, label=label)
    with math_attention():
        along = (v, torch.ones(5).double())
        rate = torch.autograd.functional.jvp(lambda x, t: double(x, t, label=label), point, along)[1]
    out = made(x, times[0], label=label, branch_times=times[1:])
    wanted = sum(mean(a - rate) for a in out.accelerations)
    tolerance = {"jvp": 1e-3, "central-difference": 5e-3, "branch-times": 0.2}[method]
    assert torch.allclose(loss.terms["material"], wanted.to(loss.terms["material"]), rtol=tolerance)
    deep = 0.2 * loss.details["velocity_1"] + 0.2 * loss.details["velocity_2"] + loss.details["velocity"]
    assert torch.allclose(loss.total, (deep + 0.7 * loss.terms["material"]).mean(), rtol=1e-5)
    # no gradient through the derivative: the last head, which speaks in it, moves by the deep term alone
    loss.terms["material"].sum().backward()
    assert made.trunk.head.linear.weight.grad is None and made.trunk.blocks[4].mlp.output.weight.grad is None
    assert bool(made.acceleration_head.linear.weight.grad.any())


def test_both_accelerations_may_be_trained_and_no_other_term_changes():
    made, draws = network(), Draws(3).at(range(5))
    plain, both = (build(material=m, label_dropout=0.0)(made, DATA, draws, label=LABEL) for m in (0.0, 0.5))
    alone = build(material=0.5, acceleration=0.0, label_dropout=0.0)(made, DATA, draws, label=LABEL)
    for name in ("deep", "acceleration"):
        assert torch.equal(plain.terms[name], both.terms[name])
    assert torch.equal(both.terms["material"], alone.terms["material"])
    assert torch.allclose(both.total, plain.total + 0.5 * both.terms["material"].mean(), rtol=1e-5)
    assert build().differentiates_all and not build(material=0.5).differentiates_all


def test_gradients_reach_every_parameter():
    """Data parallelism waits for each."""
    for options in (dict(material=1.0), dict(material=1.0, acceleration=0.0, material_method="branch-times")):
        made = network()
        build(**options)(made, DATA, Draws(0).at(range(5)), label=LABEL).total.backward()
        assert all(p.grad is not None for p in made.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["linear", "trigonometric", "vp", "linear-vp"])
@pytest.mark.parametrize("shared", [True, False])
def test_accelerations_that_nothing_trains_have_gradients_of_zero(name, shared):
    made, path = network(shared_heads=shared), interpolants.build(name)
    loss = build(path=path, acceleration=0.0)(made, DATA, Draws(0).at(range(5)), label=LABEL)
    loss.total.backward()
    heads = [p.grad for key, p in made.named_parameters() if key.startswith("acceleration_head")]
    assert len(heads) == (4 if shared else 8)
    assert all(p.grad is not None for p in made.parameters()) and not any(bool(grad.any()) for grad in heads)
    deep = 0.2 * loss.details["velocity_1"] + 0.2 * loss.details["velocity_2"] + loss.details["velocity"]
    assert torch.allclose(loss.total, deep.mean())
    with_material = build(path=path, acceleration=0.0, material=0.5)(made, DATA, Draws(0).at(range(5)), label=LABEL)
    assert set(with_material.terms) == {"deep", "material"} | ({"acceleration"} if name == "linear" else set())


def test_differences_are_taken_within_the_interval_of_the_path(monkeypatch):
    """On ``vp``, whose velocity is infinite at 0: one-sided also where t − δ lies above 0, but below the least time."""
    made, seen, vp = network(), [], interpolants.build("vp")
    made.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    low = vp.training_interval("velocity")[0]
    t = torch.tensor([5e-3 + low / 2, low, 0.5, 1.0, 0.9])
    objective = build(path=vp, acceleration=0.0, material=1.0, material_method="central-difference")
    monkeypatch.setattr(objective, "draw_times", lambda _, branches: (t,) * branches)
    objective(made, DATA, Draws(0).at(range(5)), label=LABEL)
    assert 0 < low < 1e-3 and len(seen) == 4 and torch.equal(seen[0], t) and torch.equal(seen[3], t)
    assert torch.allclose(seen[1] - t, 5e-3 * torch.tensor([2.0, 2.0, -1.0, -2.0, -1.0]), atol=1e-7)
    assert torch.allclose(seen[2] - t, 5e-3 * torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0]), atol=1e-7)
    assert torch.stack(seen).min() == t.min()


def test_which_objectives_divide_differences():
    methods = {method: build(material=0.5, material_method=method) for method in METHODS}
    assert {m: o.takes_differences for m, o in methods.items()} == {m: m != "jvp" for m in METHODS}
    derivatives = ("jvp", "finite-difference")
    averages = [objectives.build("mean-flow", interpolant=LINEAR, derivative=d).takes_differences for d in derivatives]
    assert averages == [False, True]
    assert not build().takes_differences and not objectives.build("velocity", interpolant=LINEAR).takes_differences


@pytest.mark.parametrize("gap_sign", ["sample", "down"])
@pytest.mark.parametrize("method", METHODS)
def test_the_contract_of_an_objective(method, gap_sign):
    """Nothing is drawn but from the draws, and a sample's loss does not depend on the others."""
    made = network(in_channels=1, num_classes=0).double()

    class Flat(nn.Module):
        cuts = made.cuts

        def forward(self, x, t, **conditions):
            out = made(x.reshape(-1, 1, 1, 2).repeat(1, 1, 4, 2).double(), t.double(), **conditions)
            if not isinstance(out, Branches):
                return out[:, 0, 0, :2].to(x)
            return Branches(*(tuple(v[:, 0, 0, :2].to(x) for v in said) for said in out[:2]), ())

    objective = build(material=1.0, material_method=method, gap_sign=gap_sign)
    check_objective(objective, backbone=Flat())
    data = torch.randn(9, 2)
    whole = objective(Flat(), data, Draws(1).at(range(9))).terms
    part = objective(Flat(), data[2:6], Draws(1).at(range(2, 6))).terms
    for name in ("deep", "acceleration", "material"):
        assert torch.allclose(whole[name][2:6], part[name], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", METHODS)
def test_it_trains_in_two_processes_as_in_one(method, strategy, processes, tmp_path):
    def train(folder, count):
        small = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 12, "depth": 2, "num_heads": 3}
        given = {"steps": 3, "global_batch": 10, "micro_batch": 5, "folder": str(folder), "accelerator": "cpu"}
        several = {"devices": count, "strategy": strategy if count > 1 else "auto", "timeout": 30.0}
        branched = {"name": "deepflow", **small, "num_classes": 10, "cuts": [1], "acceleration_width": 7}
        trained = {"name": "deepflow", "material": 0.5, "material_method": method, "gap_sign": "sample"}
        entries = {
            "data": "digits",
            "backbone": branched,
            "objective": trained,
            "solver": {"name": "euler", "steps": 1},
        }
        entries |= {"train": {**given, **several}, "optim": {"eps": 1e-2}}
        Trainer(resolve({**entries, "log": {"every": 1, "tensorboard": False}})).run()

    for name, count in (("one", 1), ("two", 2)):
        processes(count, train, tmp_path / name, count, timeout=120).checked()
    alone, together = ([row["loss"] for row in read_rows(tmp_path / name)] for name in ("one", "two"))
    assert len(alone) == 3 and together == pytest.approx(alone, rel=1e-4)


# --- paths ------------------------------------------------------------------------------------------------------------

PATHS = [
    ("linear", {}, ()),
    ("flow-matching", {}, ()),
    ("trigonometric", {}, ()),
    ("polynomial", {}, ()),
    ("polynomial", {"power": 3.0}, ()),
    ("polynomial", {"power": 1.5}, (1.0,)),
    ("polynomial", {"power": 0.5}, (1.0,)),
    ("vp", {}, (0.0,)),
    ("linear-vp", {}, (0.0,)),
    ("two-ended", {"path": "trigonometric"}, ()),
    ("stochastic", {"path": "trigonometric", "gamma": "sine-squared"}, ()),
    ("stochastic", {"path": "vp", "gamma": "sine-squared"}, (0.0,)),
    ("stochastic", {}, (0.0, 1.0)),
    ("bridge", {"scale": 0.7}, (0.0, 1.0)),
]


def test_every_path_has_a_case():
    assert {name for name, _, _ in PATHS} == set(interpolants.names())


@pytest.mark.parametrize(("name", "options", "ends"), PATHS)
def test_the_acceleration_of_a_path(name, options, ends):
    """The velocity differentiated, forward and by differences; refused at the ends where it is infinite."""
    path = interpolants.build(name, **options)
    data, noise, latent = torch.randn(3, 5, 2, 3, dtype=torch.float64)
    given = (latent,) if path.latent_noise else ()
    t = torch.tensor([0.1, 0.3, 0.5, 0.8, 0.9], dtype=torch.float64)
    found = path.acceleration(data, noise, t, *given)
    exact = jvp(lambda t: path.velocity(data, noise, t, *given), (t,), (torch.ones_like(t),))[1]
    assert torch.allclose(found, exact, rtol=1e-12, atol=1e-12)
    h = 1e-4
    ahead, here, behind = (path.interpolate(data, noise, t + step, *given) for step in (h, 0, -h))
    assert torch.allclose(found, (ahead - 2 * here + behind) / h**2, rtol=1e-3, atol=1e-4)
    one = path.acceleration(data[1:2], noise[1:2], t[1], *(z[1:2] for z in given))  # a batch of one, one time
    assert torch.allclose(one, found[1:2], rtol=1e-12, atol=1e-12)
    single = path.acceleration(data.float(), noise.float(), t.float(), *(z.float() for z in given))
    assert single.dtype == torch.float32 and torch.allclose(single.double(), found, rtol=1e-3, atol=1e-4)
    assert path.acceleration_ends() == ends
    for end in (0.0, 1.0):
        if end in ends:
            with pytest.raises(OpenEndError, match=f"got t = {end:g}, where the .* path has no acceleration"):
                path.acceleration(data, noise, end, *given)
        else:
            assert bool(path.acceleration(data, noise, end, *given).isfinite().all())
    with pytest.raises(InputError, match="expected equal ones"):
        path.acceleration(data, noise[:2], 0.5, *given)
    with pytest.raises(InputError, match="latent noise for the"):
        path.acceleration(data, noise, 0.5, *(() if given else (latent,)))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(gap_sign="left"), "got gap_sign 'left', expected one of batch, sample, down, up"),
        (dict(material=-1.0), "material -1.0; expected weights of 0 or more"),
        (dict(material=math.nan), "material nan; expected weights of 0 or more"),
        (
            dict(material=1.0, material_method="autograd"),
            "got material_method 'autograd', expected one of jvp, central",
        ),
        (dict(material_method="central-difference"), "with material 0, which takes no derivative; leave it out"),
        (dict(material=1.0, material_method="branch-times", max_gap=0.0), "'branch-times' with max_gap 0"),
        (dict(acceleration=0.0, stop_velocity=False), "got stop_velocity with acceleration 0, which trains none"),
        (
            dict(acceleration=0.0, acceleration_by_branch=True, acceleration_by_clock=True),
            "got acceleration_by_clock and acceleration_by_branch with acceleration 0",
        ),
        (dict(acceleration=0.0, acceleration_target="path"), "got acceleration_target with acceleration 0"),
        (dict(acceleration_target="path"), "the Linear path, which is straight: its second derivative is 0 for all da"),
        (dict(branch_weights=[]), r"got branch_weights \[\], .*; branch_weights are one a branch, or None"),
        (dict(branch_weights=1.0), "got branch_weights 1.0, .*one a branch, or None"),
        (dict(branch_weights=[0.2, "1"]), r"got branch_weights \[0.2, '1'\]"),
        (dict(acceleration="x"), "acceleration 'x', .*expected weights of 0 or more"),
        (dict(material="x"), "material 'x'; expected weights of 0 or more"),
        (dict(max_gap="x"), "max_gap 'x', .*expected weights of 0 or more and a gap"),
        *[
            (dict(max_gap=0.0, gap_sign=sign), f"got gap_sign '{sign}' with max_gap 0, which leaves no gap")
            for sign in ("sample", "down", "up")
        ],
        (dict(acceleration_target="noise"), "got acceleration_target 'noise', expected 'data' or 'path'"),
        (dict(acceleration_target="path", acceleration_by_clock=True), "whose loss has neither velocity nor step"),
        (dict(acceleration_target="path", stop_velocity=False), "got stop_velocity with acceleration_target 'path'"),
        (dict(path=TRIGONOMETRIC), "on straight paths only; .*or acceleration_target='path'"),
        (
            dict(path=interpolants.build("vp"), acceleration_target="path"),
            "the VariancePreserving path, whose second derivative is infinite at t = 0, so that the loss has no finite",
        ),
        (
            dict(path=interpolants.build("polynomial", power=1.5), acceleration_target="path"),
            "the Polynomial path, whose second derivative is infinite at t = 1",
        ),
        (dict(path=interpolants.build("bridge"), acceleration=0.0), "got the Bridge path, with latent noise"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        build(**options)


@pytest.mark.parametrize("refiner", ["gap", "none"])
def test_backbones_without_an_acceleration(refiner):
    made = backbones.build("deepflow", **TOY, cuts=(1, 3), refiner=refiner)
    draws = Draws(0).at(range(5))
    for options in ({}, dict(acceleration=0.0, material=0.5), dict(material=0.5)):
        with pytest.raises(
            InputError, match=f"for a backbone of refiner '{refiner}', whose branches say no acceleration; set both"
        ):
            build(**options)(made, DATA, draws, label=LABEL)
    loss = build(acceleration=0.0)(made, DATA, draws, label=LABEL)
    assert set(loss.terms) == {"deep"}
    loss.total.backward()
    assert all(p.grad is not None for p in made.parameters() if p.requires_grad)
    with pytest.raises(InputError, match=r"got material 0.5 for a backbone of one branch, which has no acceleration"):
        build(material=0.5)(network(cuts=()), DATA, draws, label=LABEL)
    assert set(build()(network(cuts=()), DATA, draws, label=LABEL).terms) == {"deep"}  # as ``velocity``


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(gap_sign="up", max_gap=0.3), "gap_sign and max_gap"),
        (dict(max_gap=0.0), "max_gap"),
        (dict(acceleration_by_branch=True), "acceleration_by_branch"),
        (dict(acceleration_by_clock=True, stop_velocity=False), "stop_velocity and acceleration_by_clock"),
        (dict(path=TRIGONOMETRIC, acceleration_target="path"), "acceleration_target"),
    ],
)
def test_options_of_gaps_and_accelerations_for_one_branch(options, named):
    with pytest.raises(InputError, match=f"got {named} for a backbone of one branch, without gap and acceleration"):
        build(**options)(network(cuts=()), DATA, Draws(0).at(range(5)), label=LABEL)


@pytest.mark.parametrize("options", [dict(refiner="addition"), dict(refiner="acceleration"), dict(shared_heads=False)])
def test_every_accelerating_backbone_trains_both_terms(options):
    made = network(**options)
    loss = build(material=0.5)(made, DATA, Draws(0).at(range(5)), label=LABEL)
    assert set(loss.terms) == {"deep", "acceleration", "material"}
    loss.total.backward()
    assert all(p.grad is not None for p in made.parameters() if p.requires_grad)


def test_bad_derivatives():
    x, t = torch.randn(3, 2), torch.full((3,), 0.5)
    for options, message in (
        (dict(method="exact"), "got material_method 'exact'"),
        (dict(method="branch-times"), "got no gap with 'branch-times'"),
        (dict(gap=t), "got a gap with 'jvp'"),
        (dict(method="central-difference", step=0.3), "below a quarter of the interval"),
        (dict(method="central-difference", step=0.0), "expected one above 0"),
    ):
        with pytest.raises(InputError, match=message):
            material_acceleration(lambda x, t: x, x, t, **options)
