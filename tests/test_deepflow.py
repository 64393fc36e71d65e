from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pathline import Draws, Flow, InputError, UnknownOptionError, backbones, interpolants, objectives, solvers
from pathline.backbones.layers import math_attention
from pathline.plugins.deepflow import Branches

LINEAR = interpolants.build("linear")
TOY = dict(input_size=4, patch_size=2, in_channels=3, hidden_size=24, depth=5, num_heads=2, num_classes=7)


def build(**options):
    return backbones.build("deepflow", **{**TOY, "cuts": (1, 3), "acceleration_width": 10, **options})


def shuffled(backbone, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return backbone


X, T, LABEL = torch.randn(2, 3, 4, 4), torch.tensor([0.3, 0.8]), torch.tensor([1, 7])


def test_branches_have_their_numbers_and_shapes():
    for cuts in ((), (2,), (1, 2, 4)):
        backbone = shuffled(build(cuts=cuts, **(dict(align_dims=(5, 9), align_width=6) if cuts else {})))
        times = [torch.rand(2) for _ in cuts]
        out = backbone(X, T, label=LABEL, branch_times=times)
        assert isinstance(out, Branches)
        assert [v.shape for v in out.velocities] == [X.shape] * (len(cuts) + 1)
        assert [a.shape for a in out.accelerations] == [X.shape] * len(cuts)
        assert [[f.shape for f in fs] for fs in out.features] == [[(2, 4, 5), (2, 4, 9)]] * len(cuts)


def test_the_same_times_give_the_plain_forward_to_the_bit():
    backbone = shuffled(build())
    out = backbone(X, T, label=LABEL, branch_times=(T, T))
    assert torch.equal(out.velocities[-1], backbone(X, T, label=LABEL))
    # a later time of an earlier branch moves every later one, and only those
    moved = backbone(X, T, label=LABEL, branch_times=(T, T * 0.5))
    assert torch.equal(moved.velocities[0], out.velocities[0]) and torch.equal(moved.velocities[1], out.velocities[1])
    assert not torch.allclose(moved.velocities[2], out.velocities[2])


def test_at_inference_only_what_the_last_branch_needs_is_computed():
    backbone = shuffled(build(align_dims=(5,), align_width=6))
    called = []
    for name, module in backbone.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    backbone(X, T, label=LABEL)
    assert not [name for name in called if name.startswith(("middle_head", "acceleration_head", "projectors"))]
    assert {"refiners.0", "refiners.1", "trunk.head"} <= set(called)
    assert [name for name in called if name.startswith("trunk.blocks.") and name.count(".") == 2] == [
        f"trunk.blocks.{i}" for i in range(5)
    ]


def test_no_attention_map_is_formed():
    """No tensor of T × T is allocated by attention: a T of its own size would show among the outputs' shapes."""

    class Shapes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    self.seen.add(tuple(tensor.shape))
            return out

    backbone = build(input_size=26)  # 169 tokens
    with Shapes() as shapes, torch.no_grad():
        backbone(torch.randn(2, 3, 26, 26), T, label=LABEL)
    assert any(169 in shape for shape in shapes.seen)
    assert not [shape for shape in shapes.seen if shape.count(169) > 1]
    with Shapes() as shapes, math_attention(), torch.no_grad():
        backbone(torch.randn(2, 3, 26, 26), T, label=LABEL)
    assert [shape for shape in shapes.seen if shape.count(169) > 1]  # the check sees one where there is one


@pytest.mark.parametrize("objective", ["velocity", "deepflow"])
def test_one_branch_is_the_plain_backbone_and_the_plain_objective_to_the_bit(objective):
    """Same seed, same parameters, same draws: three training steps agree in every bit."""
    results = []
    for name, loss_name in (("sit", "velocity"), ("deepflow", objective)):
        torch.manual_seed(3)
        backbone = backbones.build(name, **TOY, **({"branches": 1} if name == "deepflow" else {}))
        loss_function = objectives.build(loss_name, interpolant=LINEAR, times="logit-normal")
        optimizer = torch.optim.AdamW(backbone.parameters(), lr=1e-2)
        for step in range(3):
            data = Draws(1).normal("data", range(6), (3, 4, 4), counter=step)
            loss = loss_function(backbone, data, Draws(2).at(range(6), step), label=torch.arange(6)).total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results.append((loss, [p for p in backbone.parameters()], backbone(X, T, label=LABEL)))
    (one, first, said), (other, second, repeated) = results
    assert torch.equal(one, other) and torch.equal(said, repeated)
    assert len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_cuts_and_sizes_by_name():
    with torch.device("meta"):
        assert backbones.build("deepflow", size="XL", branches=3).cuts == (8, 16)
        assert backbones.build("deepflow", size="B", branches=2).cuts == (6,)
        assert backbones.build("deepflow", size="L").cuts == (12,)
        assert backbones.build("deepflow", size="XL", depth=28, branches=4).cuts == (7, 14, 21)
        assert len(backbones.build("sit", size="XL").blocks) == 28
        assert len(backbones.build("deepflow", size="XL", branches=1).trunk.blocks) == 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(cuts=(0,)), r"got cuts \(0,\), expected ascending, distinct block counts from 1 to 4"),
        (dict(cuts=(5,)), r"got cuts \(5,\)"),
        (dict(cuts=(6,)), r"got cuts \(6,\)"),
        (dict(cuts=(3, 1)), r"got cuts \(3, 1\)"),
        (dict(cuts=(2, 2)), r"got cuts \(2, 2\)"),
        (dict(cuts=2), r"got cuts 2, expected a sequence of block counts; write \(2,\)"),
        (dict(cuts=(-1,)), r"got cuts \(-1,\)"),
        (dict(cuts=None, branches=2), "got branches 2 and depth 5; expected a divisor of the depth, or give cuts"),
        (dict(cuts=None, branches=0), "got branches 0"),
        (dict(branches=2), r"got branches 2 beside cuts \(1, 3\)"),
        (dict(acceleration_width=0), "expected positive numbers"),
        (dict(align_dims=(5, 0)), "expected positive numbers"),
        (dict(trunk="mlp"), "has no option"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises((InputError, UnknownOptionError), match=message):
        build(**options)


def test_bad_branch_times():
    for times in ((), (T,), (T, T, T)):
        with pytest.raises(InputError, match=f"got {len(times)} branch times, expected 2"):
            build()(X, T, label=LABEL, branch_times=times)
    with pytest.raises(InputError, match=r"got t of shape \(3,\), expected \(2,\) or \(\)"):
        build()(X, T, label=LABEL, branch_times=(T, torch.rand(3)))


# --- the objective ------------------------------------------------------------------------------------------------


def objective(**options):
    return objectives.build("deepflow", interpolant=LINEAR, **options)


def test_times_follow_the_law():
    """Gaps are uniform up to α, their sign is one coin a batch and fair over steps, and times stay in [0, 1]."""
    law = objective(max_gap=0.2)
    ups, gaps = [], []
    for step in range(200):
        t1, t2, t3 = law.draw_times(Draws(0).at(range(50 * step, 50 * step + 50), step=step), 3)
        signs = torch.cat((t2 - t1, t3 - t2)).sign().unique().tolist()
        assert set(signs) <= {-1.0, 0.0} or set(signs) <= {0.0, 1.0}
        ups.append(1.0 in signs)
        gaps.append((t2 - t1).abs()[(t1 > 0.2) & (t1 < 0.8)])
        for t in (t1, t2, t3):
            assert bool(((t >= 0) & (t <= 1)).all())
    assert abs(sum(ups) / 200 - 0.5) < 4 * 0.5 / math.sqrt(200)
    gap = torch.cat(gaps).double().sort().values / 0.2
    steps = torch.arange(len(gap) + 1) / len(gap)
    assert float((gap - steps[1:]).abs().max()) < 1.95 / math.sqrt(len(gap)) + 1e-5


def test_terms_by_hand():
    data, noise = torch.randn(2, 2, 3, 4, 4)
    out = shuffled(build(align_dims=(5,), align_width=6))(X, T, label=LABEL, branch_times=(T + 0.1, T + 0.15))
    times = (T, T + 0.1, T + 0.15)
    features = (torch.randn(2, 4, 5),)
    terms = objective(branch_weights=(0.3, 0.5, 2.0)).terms(out, data, noise, times, features)
    deep = sum(
        w * ((v - (noise - data)) ** 2).mean((1, 2, 3)) for w, v in zip((0.3, 0.5, 2.0), out.velocities, strict=True)
    )
    reached = [
        (1 - t)[:, None, None, None] * data
        + t[:, None, None, None] * noise
        - t[:, None, None, None] * v
        + 0.5 * t[:, None, None, None] ** 2 * a
        for t, v, a in zip(times, out.velocities, out.accelerations, strict=False)
    ]
    acceleration = sum(((r - data) ** 2).mean((1, 2, 3)) for r in reached)
    unit = [functional.normalize(f[0], dim=-1) * functional.normalize(features[0], dim=-1) for f in out.features]
    align = -sum(u.sum(-1).mean(1) for u in unit) / 2
    assert torch.allclose(terms["deep"], deep) and torch.allclose(terms["acceleration"], acceleration, atol=1e-6)
    assert torch.allclose(terms["align"], align, atol=1e-6)
    total = objective(acceleration=0.7, align=0.25).combine(terms, {}).total
    assert torch.allclose(total, (deep + 0.7 * acceleration + 0.25 * align).mean())


def test_the_acceleration_loss_does_not_move_the_velocity():
    out = shuffled(build(cuts=(2,)))(X, T, label=LABEL, branch_times=(T,))
    velocity = out.velocities[0]
    terms = objective().terms(out, torch.randn_like(X), torch.randn_like(X), (T, T))
    assert torch.autograd.grad(terms["acceleration"].sum(), velocity, allow_unused=True)[0] is None
    assert torch.autograd.grad(terms["deep"].sum(), velocity)[0].any()


def test_details_name_the_final_head():
    backbone = shuffled(build())
    loss = objective()(backbone, torch.randn_like(X), Draws(0).at(range(2)), label=LABEL)
    assert set(loss.details) == {"velocity", "velocity_1", "velocity_2"}
    deep = 0.2 * loss.details["velocity_1"] + 0.2 * loss.details["velocity_2"] + loss.details["velocity"]
    assert torch.allclose(deep, loss.terms["deep"])


def test_alignment_needs_both_sides():
    backbone = shuffled(build(align_dims=(5,), align_width=6))
    data, features = torch.randn_like(X), (torch.randn(2, 4, 5),)
    draws = Draws(0).at(range(2))
    loss = objective(align=0.5)(backbone, data, draws, label=LABEL, features=features)
    assert loss.terms["align"].shape == (2,)
    with pytest.raises(InputError, match="got 0 encoder features with align 0.5; give both or neither"):
        objective(align=0.5)(backbone, data, draws, label=LABEL)
    with pytest.raises(InputError, match="a backbone with projectors but no encoder features"):
        objective()(backbone, data, draws, label=LABEL)
    with pytest.raises(InputError, match="got 1 encoder features with align 0"):
        objective()(backbone, data, draws, label=LABEL, features=features)
    with pytest.raises(InputError, match="features of 2 encoders for a backbone with 1 projectors"):
        objective(align=0.5)(backbone, data, draws, label=LABEL, features=features * 2)
    with pytest.raises(InputError, match=r"encoder features of shape \(2, 3, 5\), expected \(2, 4, 5\)"):
        objective(align=0.5)(backbone, data, draws, label=LABEL, features=(features[0][:, :3],))
    with pytest.raises(InputError, match="a backbone of one branch, which aligns nothing"):
        objective(align=0.5)(build(cuts=()), data, draws, label=LABEL, features=features)


def test_bad_objectives():
    nan, inf = float("nan"), float("inf")
    for options in (
        dict(acceleration=nan),
        dict(align=inf),
        dict(max_gap=nan),
        dict(acceleration=-1),
        dict(align=-0.1),
        dict(max_gap=2),
        dict(branch_weights=(1.0, -1.0)),
    ):
        with pytest.raises(InputError, match="expected weights of 0 or more and a gap"):
            objective(**options)
    with pytest.raises(InputError, match="3 branches, 3 times and 2 branch weights"):
        objective(branch_weights=(0.2, 1.0))(build(), X, Draws(0).at(range(2)), label=LABEL)
    with pytest.raises(InputError, match="without branches, expected a DeepFlow backbone; use objective 'velocity'"):
        objective()(backbones.build("sit", **TOY), X, Draws(0).at(range(2)), label=LABEL)

    class Curved(interpolants.Interpolant):
        def evaluate(self, t):
            return interpolants.Coefficients(t.cos(), t.sin(), -t.sin(), t.cos())

    with pytest.raises(InputError, match="exact on straight paths only; set acceleration=0"):
        objectives.build("deepflow", interpolant=Curved())
    assert objectives.build("deepflow", interpolant=Curved(), acceleration=0.0).weights["acceleration"] == 0


def test_it_can_be_sampled_by_every_solver():
    for name in set(solvers.names()) - {"mean-flow"}:  # needs a network that takes a gap
        flow = Flow(shuffled(build()), LINEAR)
        stepped = {"steps": 3} if name not in ("dopri5", "ode") else {"rtol": 0.1, "atol": 0.1}
        assert solvers.build(name, **stepped)(flow, torch.randn(2, 3, 4, 4), label=LABEL).shape == (2, 3, 4, 4)


# --- the sizes of the paper ---------------------------------------------------------------------------------------

# name, depth, cuts: trainable parameters; multiply–accumulates of a forward pass of one 32 × 32 × 4 latent, all heads
TABLE = [
    ("sit", "B", 12, (), 130303504, 23001956352),
    ("sit", "L", 24, (), 457824272, 80693428224),
    ("sit", "XL", 28, (), 674816272, 118616702976),
    ("deepflow", "B", 10, (5,), 144748080, 25897467904),
    ("deepflow", "B", 12, (6,), 166004784, 29729751040),
    ("deepflow", "L", 20, (10,), 431087664, 75460771840),
    ("deepflow", "L", 22, (11,), 468867120, 82184241152),
    ("deepflow", "L", 24, (12,), 506646576, 88907710464),
    ("deepflow", "XL", 22, (11,), 588046128, 102285967360),
    ("deepflow", "XL", 24, (12,), 635856432, 110757609472),
    ("deepflow", "XL", 26, (13,), 683666736, 119229251584),
    ("deepflow", "XL", 28, (14,), 731477040, 127700893696),
    ("deepflow", "L", 18, (6, 12), 433176624, 76951584768),
    ("deepflow", "L", 21, (7, 14), 489845808, 87036788736),
    ("deepflow", "L", 24, (8, 16), 546514992, 97121992704),
    ("deepflow", "XL", 18, (6, 12), 537833520, 94426873856),
    ("deepflow", "XL", 21, (7, 14), 609548976, 107134337024),
    ("deepflow", "XL", 24, (8, 16), 681264432, 119841800192),
    ("deepflow", "XL", 27, (9, 18), 752979888, 132549263360),
    ("deepflow", "XL", 28, (7, 14, 21), 822293040, 145869275136),
]


@pytest.mark.parametrize(("name", "size", "depth", "cuts", "parameters", "products"), TABLE)
def test_parameters_and_costs_of_the_papers_models(name, size, depth, cuts, parameters, products):
    options = dict(size=size, depth=depth, **({"branches": len(cuts) + 1} if cuts else {}))
    with torch.device("meta"):
        backbone = backbones.build(name, **options)
        x, t, label = torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, dtype=torch.long)
        assert sum(p.numel() for p in backbone.parameters()) == parameters
        assert cuts == getattr(backbone, "cuts", ())
        spoken = {"branch_times": [t] * len(cuts)} if cuts else {}
        with FlopCounterMode(display=False) as counter, math_attention():
            backbone(x, t, label=label, **spoken)
    assert counter.get_total_flops() == 2 * products
