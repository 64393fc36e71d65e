"""Classifier-free guidance, and the options that every guidance has."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pathline import (
    Flow,
    InputError,
    InputTypeError,
    OpenEndError,
    UnknownNameError,
    backbones,
    interpolants,
    solvers,
    weights,
)
from pathline.core.composed import Rescheduled, SplitFlow
from pathline.solvers import guidance
from pathline.testing import GaussianMixture

LINEAR = interpolants.build("linear")
X, LABEL = torch.randn(3, 5), torch.tensor([0, 1, 2])


class Rows:
    """A backbone that answers with the label, and keeps count of its rows."""

    def __init__(self):
        self.rows = []

    def __call__(self, x, t, label, **others):
        self.rows.append(len(x))
        for value in others.values():
            assert len(value) == len(x)
        return x * 0 + 1.0 + label[:, None] + t[:, None]


def build(scale=1.5, rows=None, **options):
    backbone = backbones.wrap(rows or Rows(), num_classes=3, null_label=3)
    return guidance.build("classifier-free", scale=scale, **options)(Flow(backbone, LINEAR))


def expected(scale, t, label=LABEL, null=3):
    given, nothing = 1.0 + label + t, 1.0 + null + t
    return (nothing + scale * (given - nothing))[:, None].expand(3, 5)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 4.0])
def test_formula_in_one_call_on_two_rows_a_sample(scale):
    rows = Rows()
    flow = build(scale, rows)
    assert torch.allclose(flow(X, 0.4, label=LABEL).velocity, expected(scale, 0.4))
    assert rows.rows == [6] and flow.nfe == 1


def test_scale_one_calls_the_conditional_model_alone():
    rows = Rows()
    assert torch.allclose(build(1.0, rows)(X, 0.4, label=LABEL).velocity, expected(1.0, 0.4))
    assert rows.rows == [3]


@pytest.mark.parametrize(("t", "rows"), [(0.1, 6), (0.7, 6), (0.3, 6), (0.0999, 3), (0.7001, 3)])
def test_interval_includes_both_ends(t, rows):
    counter = Rows()
    flow = build(2.0, counter, interval=(0.1, 0.7))
    t = torch.tensor(t, dtype=torch.float64)
    velocity = flow(X, t, label=LABEL).velocity
    assert counter.rows == [rows]
    assert torch.allclose(velocity, expected(2.0 if rows == 6 else 1.0, float(t)).to(velocity))


def test_times_of_their_own_a_sample():
    flow = build(2.0, interval=(0.1, 0.7))
    t = torch.tensor([0.05, 0.5, 0.9])
    velocity = flow(X, t, label=LABEL).velocity
    for i, scale in enumerate((1.0, 2.0, 1.0)):
        assert torch.allclose(velocity[i], expected(scale, float(t[i]))[i])


def test_solvers_take_guided_flows_and_count_calls():
    rows = Rows()
    solution = solvers.build("euler", steps=10).solve(build(2.0, rows, interval=(0.25, 0.75)), X, label=LABEL)
    # grid 1, 0.9, …, 0.1: 0.7, 0.6, 0.5, 0.4, 0.3 lie inside
    assert rows.rows == [3] * 3 + [6] * 5 + [3] * 2 and solution.nfe == 10


def test_bound_conditions_and_other_conditions_are_doubled_too():
    rows = Rows()
    flow = build(1.5, rows).given(label=LABEL, caption=torch.randn(3, 2, 7))
    assert torch.allclose(flow(X, 0.4).velocity, expected(1.5, 0.4)) and rows.rows == [6]


def test_guided_flows_compose():
    """A second guidance acts on the guided velocity; for this backbone both are affine in the label."""
    inner = build(1.5)
    flow = guidance.build("classifier-free", scale=2.0)(inner)
    assert torch.allclose(flow(X, 0.4, label=LABEL).velocity, expected(3.0, 0.4))


def test_score_and_data_follow_the_guided_velocity():
    prediction = build(1.5)(X, 0.4, label=LABEL)
    assert torch.allclose(prediction.score, LINEAR.convert(expected(1.5, 0.4), X, 0.4))


def test_null_label_of_the_callers_choice():
    flow = build(2.0, null=1)
    assert torch.allclose(flow(X, 0.4, label=LABEL).velocity, expected(2.0, 0.4, null=1))


# --- options of every guidance, by hand in float64 --------------------------------------------------------------------

Y = torch.tensor([1, 0, 2])
STATE = torch.randn(3, 5, 2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
T = torch.tensor(0.4, dtype=torch.float64)


def network(x, t, label):
    """Neither affine nor alike for any two labels."""
    label, t = (value.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1)) for value in (label, t))
    return torch.sin((1 + label) * x) + t * x - 0.3 * label


def flow_of(predicts="velocity", path=LINEAR, function=network):
    return Flow(backbones.wrap(function, num_classes=3, null_label=3), path, predicts)


def pair(x=STATE, t=T, label=Y):
    times = t.expand(len(x))
    return network(x, times, label), network(x, times, torch.full_like(label, 3))


def close(ours, theirs, tolerance=1e-12):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert float((ours - theirs).abs().max()) <= tolerance


@pytest.mark.parametrize("make", [list, tuple, torch.tensor])
def test_one_scale_a_sample(make):
    scales = [0.5, 4.0, 1.0]
    c, n = pair()
    velocity = guidance.build("cfg", scale=make(scales))(flow_of())(STATE, T, label=Y).velocity
    for i, w in enumerate(scales):
        close(velocity[i], n[i] + w * (c[i] - n[i]))
    assert torch.equal(velocity[2], c[2])  # off: not a bit of difference


@pytest.mark.parametrize("name", ["classifier-free", "cfg-zero", "apg"])
def test_scales_of_one_call_the_conditional_model_alone(name):
    rows = Rows()
    flow = Flow(backbones.wrap(rows, num_classes=3, null_label=3), LINEAR)
    plain = flow(X, 0.4, label=LABEL)
    for scale in (1.0, [1.0, 1.0, 1.0]):
        prediction = guidance.build(name, scale=scale, rescale=0.5)(flow)(X, 0.4, label=LABEL)
        assert rows.rows[-1] == 3
        for kind in ("velocity", "score", "noise", "data"):
            assert torch.equal(getattr(prediction, kind), getattr(plain, kind))


@pytest.mark.parametrize("name", ["classifier-free", "cfg-zero", "apg"])
def test_outside_of_the_interval_are_exactly_the_conditional_models_values(name):
    """For each sample, also where the guided quantity does not tell a velocity at t = 0."""
    guide = guidance.build(name, scale=3.0, interval=(0.2, 0.8), quantity="data")
    t = torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64)
    guided, plain = guide(flow_of())(STATE, t, label=Y), flow_of()(STATE, t, label=Y)
    for kind in ("velocity", "noise", "data"):
        ours, theirs = getattr(guided, kind), getattr(plain, kind)
        assert torch.equal(ours[[0, 2]], theirs[[0, 2]]) and not torch.allclose(ours[1], theirs[1])
        alone = getattr(guide(flow_of())(STATE[1:2], t[1:2], label=Y[1:2]), kind)
        close(ours[1:2], alone)
    outside = torch.tensor(0.1, dtype=torch.float64)
    assert torch.equal(guide(flow_of())(STATE, outside, label=Y).velocity, flow_of()(STATE, outside, label=Y).velocity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_both_ends_are_inside_in_any_precision(dtype, shape):
    for low, high in ((0.3, 0.7), (0.1, 0.9)):
        for t in (low, high):
            rows = Rows()
            build(2.0, rows, interval=(low, high))(X.to(dtype), torch.full(shape, t, dtype=dtype), label=LABEL)
            assert rows.rows == [6]


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_rescaling_by_hand(share):
    """Eqs. 15 and 16 of arXiv:2305.08891, over all that is not the batch."""
    c, n = pair()
    g = n + 3.0 * (c - n)
    velocity = guidance.build("cfg", scale=3.0, rescale=share)(flow_of())(STATE, T, label=Y).velocity
    for i in range(3):
        rescaled = g[i] * c[i].numpy().std() / g[i].numpy().std()
        close(velocity[i], share * rescaled + (1 - share) * g[i])
        if share == 1:
            assert float(velocity[i].std()) == pytest.approx(float(c[i].std()), rel=1e-12)


def test_rescaling_what_has_no_spread():
    """A constant guided prediction has a standard deviation of 0 to be divided by; a constant stronger one gives 0."""

    def opposite(x, t, label):  # c = x, n = 2x: 2c − n is 0 everywhere
        return x * torch.where(label == 3, 2.0, 1.0).to(x)[:, None, None, None]

    out = guidance.build("cfg", scale=2.0, rescale=1.0)(flow_of(function=opposite))(STATE, T, label=Y).velocity
    close(out, torch.zeros_like(STATE))
    flow = flow_of(function=lambda x, t, label: x * (label == 3).to(x)[:, None, None, None] + 2.0)  # c = 2
    close(guidance.build("cfg", scale=3.0, rescale=1.0)(flow)(STATE, T, label=Y).velocity, torch.zeros_like(STATE))


@pytest.mark.parametrize("name", ["classifier-free", "cfg-zero", "apg"])
def test_channels_are_guided_as_if_there_were_no_others(name):
    """The first two of five are those of a network of two; the others are the conditional model's."""
    options = dict(scale=3.0, rescale=0.6, quantity="velocity")
    out = guidance.build(name, channels=2, **options)(flow_of())(STATE, T, label=Y).velocity
    close(out[:, :2], guidance.build(name, **options)(flow_of())(STATE[:, :2], T, label=Y).velocity)
    assert torch.equal(out[:, 2:], pair()[0][:, 2:])
    assert torch.equal(
        guidance.build(name, channels=5, **options)(flow_of())(STATE, T, label=Y).velocity,
        guidance.build(name, **options)(flow_of())(STATE, T, label=Y).velocity,
    )


@pytest.mark.parametrize("name", ["sit", "sit_sigma"])
def test_three_channels_of_four_as_in_the_published_program(name, parity):
    """Its rows are (x, x) with (label, null); its last channel is each half's own."""
    case = parity(name)
    sizes = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=48, num_heads=4, num_classes=10)
    made = backbones.build("sit", **sizes, depth=case.description["config"]["depth"])
    made.load_state_dict(weights.convert(case.state, family="sit"))
    x, t, label = (case.inputs[key] for key in ("x", "t", "y"))
    guide = guidance.build("classifier-free", scale=4.0, channels=3)
    with torch.no_grad():
        ours = -guide(Flow(weights.reverse_clock(made), LINEAR))(x, 1 - t, label=label).velocity
    theirs = case.outputs["with_cfg_4"]
    assert float((ours - theirs[:3]).abs().max()) <= 5e-5
    assert float((ours[:, :3] - theirs[3:, :3]).abs().max()) <= 5e-5


@pytest.mark.parametrize("kind", ["velocity", "score", "noise", "data"])
@pytest.mark.parametrize("predicts", ["velocity", "data"])
def test_the_formula_acts_on_the_declared_quantity(kind, predicts):
    c, n = (LINEAR.convert(value, STATE, T, source=predicts, target=kind) for value in pair())
    g = n + 2.5 * (c - n)
    flow = guidance.build("cfg", scale=2.5, rescale=1.0, quantity=kind)(flow_of(predicts))
    prediction = flow(STATE, T, label=Y)
    assert prediction.kind == flow.predicts == kind
    expected = g * (c.flatten(1).std(1) / g.flatten(1).std(1))[:, None, None, None]
    close(getattr(prediction, kind), expected, 1e-11)
    close(prediction.velocity, LINEAR.convert(expected, STATE, T, source=kind, target="velocity"), 1e-11)
    plain = guidance.build("cfg", scale=2.5)(flow_of(predicts))
    same = guidance.build("cfg", scale=2.5, quantity=kind)(flow_of(predicts))  # affine: the same in any quantity
    close(same(STATE, T, label=Y).velocity, plain(STATE, T, label=Y).velocity, 1e-11)


def test_a_quantity_that_does_not_tell_the_velocity_opens_an_end():
    def ends(quantity, target, predicts="velocity", **options):
        return guidance.build("cfg", quantity=quantity, **options)(flow_of(predicts)).open_ends(target)

    # on the linear path velocity = (x − data)/t = (noise − x)/(1 − t), score = −noise/t
    assert ends(None, "velocity") == () and ends("velocity", "velocity") == ()
    assert ends("data", "velocity") == (0.0,) and ends("noise", "velocity") == (1.0,)
    assert ends("score", "velocity") == (0.0, 1.0)
    assert ends("velocity", "velocity", "data") == (0.0,) and ends("noise", "data", "data") == (0.0, 1.0)
    assert ends("data", "velocity", interval=(0.1, 1.0)) == () and ends("data", "velocity", scale=1.0) == ()
    assert ends("noise", "velocity", interval=(0.0, 0.9)) == ()
    assert ends("velocity", "velocity", "data", interval=(0.1, 0.9)) == (0.0,)
    assert ends("data", "velocity", scale=[1.0, 2.0]) == (0.0,)
    assert ends("data", "score") == (0.0,) and ends("data", "diffusion") == LINEAR.open_ends("data", "diffusion")
    with pytest.raises(OpenEndError, match="no velocity from a predicted data"):
        solvers.build("heun", steps=3)(guidance.build("cfg", quantity="data")(flow_of()), STATE, label=Y)
    half = guidance.build("cfg", quantity="data", interval=(0.1, 1.0))(flow_of())
    assert bool(solvers.build("heun", steps=3)(half, STATE, label=Y).isfinite().all())


def test_each_value_of_a_composed_prediction_is_guided():
    """Data and noise of a flow on another path; drift and latent noise of two networks."""
    path = interpolants.build("trigonometric")
    flow = Rescheduled(flow_of(), path)
    guided = guidance.build("cfg", scale=2.5)(flow)(STATE, T, label=Y)
    given, null = flow(STATE, T, label=Y), flow(STATE, T, label=torch.full_like(Y, 3))
    for kind in ("velocity", "score", "noise", "data"):
        c, n = getattr(given, kind), getattr(null, kind)
        close(getattr(guided, kind), n + 2.5 * (c - n), 1e-11)
    bridge = interpolants.build("bridge", scale=0.8)
    other = backbones.wrap(lambda x, t, label: network(x.cos(), t, label), num_classes=3, null_label=3)
    flow = SplitFlow(flow_of().backbone, other, bridge)
    guided = guidance.build("cfg", scale=2.5)(flow)(STATE, T, label=Y)
    given, null = flow(STATE, T, label=Y), flow(STATE, T, label=torch.full_like(Y, 3))
    for kind in ("velocity", "score", "noise"):
        c, n = getattr(given, kind), getattr(null, kind)
        close(getattr(guided, kind), n + 2.5 * (c - n), 1e-11)
    with pytest.raises(InputError, match="data"):
        guidance.build("cfg", quantity="data")(flow)(STATE, T, label=Y)


@pytest.mark.parametrize("t", [0.2, 0.4, 0.6, 0.9])
def test_intervals_compose(t):
    """One guidance in [0.1, 0.5], one around it in [0.3, 0.7]: each where it is on, each with scales of its own."""
    inner = guidance.build("cfg", scale=[2.0, 0.5, 3.0], interval=(0.1, 0.5))
    outer = guidance.build("cfg", scale=1.5, rescale=0.4, interval=(0.3, 0.7))
    t = torch.tensor(t, dtype=torch.float64)
    c, n = pair(t=t)
    w = torch.tensor([2.0, 0.5, 3.0], dtype=torch.float64)[:, None, None, None]
    first = n + w * (c - n) if t <= 0.5 else c
    expected = first
    if 0.3 <= t <= 0.7:  # the inner guidance moves the null prediction nowhere: n + w·(n − n)
        expected = n + 1.5 * (first - n)
        ratio = (first.flatten(1).std(1) / expected.flatten(1).std(1))[:, None, None, None]
        expected = expected * (0.4 * ratio + 0.6)
    flow = outer(inner(flow_of()))
    close(flow(STATE, t, label=Y).velocity, expected)
    close(flow(STATE, t.expand(3), label=Y).velocity, expected)
    assert flow.nfe == 2


def test_conditions_bound_before_and_after():
    """Whatever was bound, wherever, is doubled and reaches the network."""

    def strong(x, t, label, strength):
        return network(x, t, label) * strength[:, None, None, None]

    strength = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    c, n = (value * strength[:, None, None, None] for value in pair())
    flow = flow_of(function=strong)
    guide = guidance.build("cfg", scale=2.5, interval=(0.2, 0.6))
    for made in (
        guide(flow.given(label=Y, strength=strength)),
        guide(flow.given(strength=strength)).given(label=Y),
        guide(flow).given(label=LABEL).given(label=Y, strength=strength),
        guide(guide(flow.given(label=Y, strength=strength))).flow,
    ):
        close(made(STATE, T).velocity, n + 2.5 * (c - n))
        assert torch.equal(made(STATE, 0.1).velocity, flow(STATE, 0.1, label=Y, strength=strength).velocity)


def test_a_gaussian_with_a_null_label_of_its_own():
    """Means 2 and −1 of one width, guided by w: the exact flow of the mean −1 + w·3, through a whole solve."""
    means = torch.tensor([[2.0, 0.5], [-1.0, 1.5]], dtype=torch.float64)
    path, std = interpolants.build("trigonometric"), 0.6

    def velocity(x, t, label):
        return torch.cat(
            [
                GaussianMixture(means[k : k + 1], std).value("velocity", x[i : i + 1], t[i : i + 1], path)
                for i, k in enumerate(label.tolist())
            ]
        )

    flow = Flow(backbones.wrap(velocity, num_classes=1, null_label=1), path)
    x = torch.randn(3, 2, dtype=torch.float64)
    heun = solvers.build("heun", steps=7)
    truth = heun(GaussianMixture([[3.5, 0.0]], std).flow(path), x)  # −1 + 1.5·3, 1.5 + 1.5·(−1)
    for quantity in (None, "velocity", "noise"):
        guided = guidance.build("cfg", scale=1.5, quantity=quantity, interval=(0.0, 1.0))(flow)
        ends = guided.open_ends("velocity")
        solver = heun if not ends else solvers.build("heun", steps=7, start=0.9)
        wanted = truth if not ends else solver(GaussianMixture([[3.5, 0.0]], std).flow(path), x)
        close(solver(guided, x, label=torch.zeros(3, dtype=torch.long)), wanted, 1e-10)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(operation.__name__.split(".")[0])
        return operation(*args, **(kwargs or {}))


def test_a_time_on_the_host_costs_no_tensor_operations():
    """On a doubled batch the one formula is left: no comparison, no mask, no broadcast scale."""
    flow = Flow(backbones.wrap(lambda x, t, label: x, num_classes=3, null_label=3), LINEAR)
    guided = guidance.build("cfg", scale=2.5, interval=(0.2, 0.6))(flow)
    for t, most in ((0.4, {"cat": 2, "slice": 3, "fill_": 1, "full": 1, "lerp": 1}), (0.8, {"full": 1})):
        time = torch.tensor(t, dtype=torch.float64)
        with Operations() as seen:
            guided.evaluate(X, time, {"label": LABEL})
        names = [name for name in seen.names if name not in ("_local_scalar_dense", "detach", "lift_fresh")]
        assert {name: names.count(name) for name in names} == most


def test_bad_input():
    unconditional = Flow(backbones.build("mlp", dim=5), LINEAR)
    with pytest.raises(InputError, match="guidance for a backbone without a null label; pass null"):
        guidance.build("classifier-free")(unconditional)
    with pytest.raises(InputError, match="got no label to guide towards"):
        build()(X, 0.4)
    with pytest.raises(InputError, match="got label 9"):
        build(null=9)(X, 0.4, label=LABEL)
    for scale in (math.nan, math.inf):
        with pytest.raises(InputError, match="expected a finite number"):
            guidance.build("classifier-free", scale=scale)
    for interval in ((0.7, 0.1), (-0.1, 0.5), (0.1, 1.5), (0.2,), (0.1, 0.2, 0.3), 0.5, (math.nan, 1.0)):
        with pytest.raises(InputError, match="guidance interval"):
            guidance.build("classifier-free", interval=interval)


@pytest.mark.parametrize("name", ["classifier-free", "cfg-zero", "apg"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(scale=[1.0, math.nan]), InputError, "expected a finite number, or one a sample"),
        (dict(scale=[[1.0, 2.0]]), InputError, "expected a finite number, or one a sample"),
        (dict(scale=[]), InputError, "expected a finite number, or one a sample"),
        (dict(scale="high"), InputTypeError, "got guidance scale 'high'"),
        (dict(rescale=1.1), InputError, r"got rescale 1.1, expected a share in \[0, 1\]"),
        (dict(rescale=-0.1), InputError, "got rescale -0.1"),
        (dict(rescale=math.nan), InputError, "got rescale nan, expected a finite number"),
        (dict(channels=0), InputError, "got channels 0, expected a whole number of 1 or more"),
        (dict(channels=1.5), InputError, "got channels 1.5"),
        (dict(channels=True), InputError, "got channels True"),
        (dict(quantity="velocty"), UnknownNameError, "unknown prediction 'velocty'; did you mean 'velocity'?"),
    ],
)
def test_wrong_options(name, options, error, message):
    with pytest.raises(error, match=message):
        guidance.build(name, **options)


@pytest.mark.parametrize("name", ["classifier-free", "cfg-zero", "apg"])
def test_options_that_do_not_fit_the_state(name):
    """Refused before any network call, by a solve too."""
    flow = flow_of()
    for options, x, message in (
        (dict(scale=[1.0, 2.0]), STATE, "got 2 guidance scales for 3 samples; give one for all, or one each"),
        (dict(channels=6), STATE, "got channels 6 to guide, expected at most the 5 of x"),
        (dict(channels=1), STATE[:, 0, 0, 0], "got channels 1 to guide, expected at most the 0 of x"),
    ):
        with pytest.raises(InputError, match=message):
            guidance.build(name, **options)(flow)(x, T, label=Y)
        with pytest.raises(InputError, match=message):
            solvers.build("euler", steps=2)(guidance.build(name, **options)(flow), x, label=Y)
        with pytest.raises(InputError, match=message):  # also of the inner of two
            guidance.build("cfg")(guidance.build(name, **options)(flow))(x, T, label=Y)
    assert flow.nfe == 0


def test_conditions_bound_to_a_split_flow_reach_the_guided_one():
    """A flow of two networks, on a path with latent noise: what was bound before is doubled too."""
    drift, noise = (backbones.wrap(rows, num_classes=3, null_label=3) for rows in (Rows(), Rows()))
    split = SplitFlow(drift, noise, interpolants.build("stochastic")).given(label=LABEL)
    assert split.bound["label"] is LABEL
    guided = guidance.build("classifier-free", scale=2.0)(split)
    before = guidance.build("classifier-free", scale=2.0)(SplitFlow(drift, noise, split.interpolant))
    assert torch.equal(guided(X, 0.4).score, before(X, 0.4, label=LABEL).score)
