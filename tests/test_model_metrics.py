"""Metrics of models against closed forms: known layers, exact flows, and errors put in by hand."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from pathline import Draws, Flow, InputError, InputTypeError, backbones, interpolants, metrics, solvers
from pathline.core.errors import UnknownNameError, UnknownOptionError
from pathline.metrics import models
from pathline.metrics.feature_distance import distance_of
from pathline.solvers import guidance

LINEAR = interpolants.build("linear")
SIT = dict(
    input_size=4, patch_size=2, in_channels=3, hidden_size=24, depth=3, num_heads=2, num_classes=5, mlp_ratio=2.0
)


def turn(angle: float) -> torch.Tensor:
    return torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])


class Turning(nn.Module):
    """Tokens of length r that block i turns by angle i, and that something between two blocks turns further."""

    def __init__(self, angles: tuple[float, ...], between: dict[int, float] | None = None, radius: float = 3.0):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in angles)
        self.between, self.radius = between or {}, radius
        for block, angle in zip(self.blocks, angles, strict=True):
            block.weight.data = turn(angle).T
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x, t):
        h = self.radius * torch.tensor([1.0, 0.0]).expand(len(x), 7, 2) * self.length(t)[:, None, None]
        for number, block in enumerate(self.blocks, start=1):
            h = h @ turn(self.between[number]) if number in self.between else h
            h = block(h)
        return self.scale * x

    def length(self, t):
        return torch.ones_like(t)


class Growing(Turning):
    """The same, with tokens of length r·t: distances follow the time of the call."""

    def length(self, t):
        return t


def measured(name, flow, *, batches=((0, 5),), shape=(2, 3), seed=0, data=None, **options):
    metric = models.build(name, **options)
    for first, last in batches:
        x = 0.5 * Draws(7).normal("data", range(first, last), shape) if data is None else data[first:last]
        metric.update(flow, {"data": x}, Draws(seed).at(range(first, last)))
    return metric


def labelled_sit():
    backbone = backbones.build("sit", **SIT)
    for p in backbone.parameters():
        p.data.normal_(std=0.2)
    return Flow(backbone.eval(), LINEAR)


# --- distance of layers -------------------------------------------------------------------------------------------


ANGLES, SOLVER = (0.3, 0.5, 0.2, 0.7), {"name": "euler", "steps": 4}


def test_distances_of_turned_tokens_in_closed_form():
    """Two vectors of length r at an angle θ are 2r·sin(θ/2) apart; layer i is turned by what follows it."""
    left = {f"layer {i}": sum(ANGLES[i:]) for i in range(4)}
    flow = Flow(Turning(ANGLES), LINEAR)
    for distance, expected in {
        "euclidean": lambda angle: 2 * 3.0 * math.sin(angle / 2),
        "normalised": lambda angle: 2 * math.sin(angle / 2),
        "cosine": lambda angle: 1 - math.cos(angle),
    }.items():
        record = measured("feature-distance", flow, solver=SOLVER, distance=distance).compute()
        assert record.times == (1.0, 0.75, 0.5, 0.25) and record.count == 5
        assert [row.name for row in record.rows] == list(left)
        for row in record.rows:
            assert row.mean == pytest.approx(expected(left[row.name]), rel=1e-5)
            assert row.means == pytest.approx([expected(left[row.name])] * 4, rel=1e-5)
            assert row.error == pytest.approx(0, abs=1e-5) and max(row.errors) == pytest.approx(0, abs=1e-5)


def test_distances_follow_the_times_of_the_calls():
    record = measured("feature-distance", Flow(Growing(ANGLES), LINEAR), solver={"name": "heun", "steps": 2}).compute()
    assert record.times == (1.0, 0.5, 0.0)  # of four calls, two at 0.5
    apart = 2 * 3.0 * math.sin(sum(ANGLES[2:]) / 2)
    assert record.row("layer 2").means == pytest.approx([apart, apart / 2, 0.0], rel=1e-5, abs=1e-6)
    assert record.row("layer 2").mean == pytest.approx(apart / 2, rel=1e-5)


def test_calls_at_one_time_are_averaged():
    class Counting(Turning):
        """Tokens of length r·n in the n-th call."""

        calls = 0

        def length(self, t):
            self.calls += 1
            return torch.full_like(t, self.calls)

    record = measured("feature-distance", Flow(Counting(ANGLES), LINEAR), solver={"name": "heun", "steps": 3}).compute()
    assert record.times == pytest.approx((1.0, 2 / 3, 1 / 3, 0.0))
    apart = 2 * 3.0 * math.sin(sum(ANGLES[1:]) / 2)
    assert record.row("layer 1").means == pytest.approx([apart * n for n in (1, 2.5, 4.5, 6)], rel=1e-5)


@pytest.mark.parametrize("name", sorted({*solvers.names()} - {"dopri5", "mean-flow", "ode", "sde", "taylor"}))
def test_a_plot_has_one_value_at_a_time(name):
    """Of every solver of fixed steps that takes any network."""
    flow = Flow(Growing(ANGLES), LINEAR)
    record = measured("feature-distance", flow, solver={"name": name, "steps": 5, "end": 0.1}).compute()
    times = sorted(record.times)
    assert min(b - a for a, b in pairwise(times)) > 1e-6


def test_what_stands_between_two_blocks_has_a_row_of_its_own():
    """A turn by 0.4 before the third block: layer 2 lies 0.4 + 0.2 + 0.7 before the last, its refined tokens 0.9."""
    record = measured("feature-distance", Flow(Turning(ANGLES, {3: 0.4}), LINEAR), solver=SOLVER).compute()
    assert [row.name for row in record.rows] == ["layer 0", "layer 1", "layer 2", "into layer 3", "layer 3"]
    for name, angle in {"layer 2": 1.3, "into layer 3": 0.9, "layer 3": 0.7}.items():
        assert record.row(name).mean == pytest.approx(2 * 3.0 * math.sin(angle / 2), rel=1e-5)


def test_the_mean_over_tokens_and_the_error_over_samples_by_hand():
    h, last = torch.randn(5, 3, 7).double(), torch.randn(5, 3, 7).double()
    expected = [sum(math.dist(a, b) for a, b in zip(x, y, strict=True)) / 3 for x, y in zip(h, last, strict=True)]
    assert distance_of(h, last).tolist() == pytest.approx(expected, rel=1e-12)
    averages = models.Averages(torch.tensor(expected[:2], dtype=torch.float64))
    averages.merge(models.Averages(torch.tensor(expected[2:], dtype=torch.float64)))
    mean = sum(expected) / 5
    assert float(averages.mean) == pytest.approx(mean, rel=1e-12)
    assert float(averages.error) == pytest.approx(math.sqrt(sum((e - mean) ** 2 for e in expected) / 4 / 5), rel=1e-12)


def test_the_tokens_of_a_transformer_by_hand():
    """Layers of a real trunk, followed by hand at the solver's own states."""
    flow, label = labelled_sit(), torch.tensor([1, 4, 5])
    metric = models.build("feature-distance", solver={"name": "euler", "steps": 2})
    metric.update(flow, {"data": torch.zeros(3, 3, 4, 4), "label": label}, Draws(2).at(range(4, 7)))
    trunk, expected = flow.backbone, []
    x = Draws(2).normal("initial noise", range(4, 7), (3, 4, 4))
    for t in (torch.ones(3), torch.full((3,), 0.5)):
        with torch.no_grad():
            layers = [trunk.embed(x)]
            for block in trunk.blocks:
                layers.append(block(layers[-1], None, trunk.condition(t, label=label))[0])
            expected.append([(layer - layers[-1]).square().sum(-1).sqrt().mean() for layer in layers[:-1]])
            x = x - 0.5 * trunk(x, t, label=label)
    means = torch.tensor([row.means for row in metric.compute().rows])
    assert torch.allclose(means, torch.tensor(expected).T, rtol=1e-4)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in trunk.modules())


def test_distances_refuse_what_they_cannot_follow():
    with pytest.raises(InputError, match="got the solver DormandPrince, whose steps differ from batch to batch"):
        models.build("feature-distance", solver="dopri5")
    with pytest.raises(InputError, match="got distance 'manhattan', expected one of euclidean, normalised, cosine"):
        models.build("feature-distance", distance="manhattan")
    with pytest.raises(InputError, match="got a MLP without two layers to compare"):
        measured("feature-distance", Flow(backbones.build("mlp", dim=3), LINEAR), shape=(3,))
    with pytest.raises(InputError, match="got a Turning without two layers to compare"):
        measured("feature-distance", Flow(Turning((0.3,)), LINEAR))
    guided = guidance.build("classifier-free", scale=2.0)(labelled_sit())
    metric = models.build("feature-distance", solver=SOLVER)
    with pytest.raises(InputError, match="got tokens of 4 samples in a call for 2; give a flow without guidance"):
        metric.update(guided, {"data": torch.zeros(2, 3, 4, 4), "label": torch.tensor([0, 1])}, Draws(0).at(range(2)))
    assert metric.count == 0


# --- loss by time -------------------------------------------------------------------------------------------------


def test_the_loss_of_an_exact_gaussian_flow_in_closed_form(gaussian):
    """The error of the best velocity is Var[noise − data | x_t] = 1 + s² − (t − (1−t)s²)² / ((1−t)²s² + t²)."""
    exact = gaussian("linear", mean=2.0, std=0.5)
    data = 2.0 + 0.5 * torch.randn(400, 3, 5)
    record = measured("loss-by-time", exact.flow(), batches=((0, 400),), data=data, bins=8).compute()
    assert record.times == pytest.approx([(b + 0.5) / 8 for b in range(8)]) and record.count == 400
    (row,) = record.rows
    t = (torch.arange(8000, dtype=torch.float64) + 0.5) / 8000
    variance = 1.25 - (t - 0.25 * (1 - t)) ** 2 / (0.25 * (1 - t) ** 2 + t**2)
    expected = variance.reshape(8, 1000).mean(1)
    assert row.name == "velocity"
    for mean, error, value in zip(row.means, row.errors, expected.tolist(), strict=True):
        assert abs(mean - value) < 4 * error and error < 0.1 * value
    assert abs(row.mean - float(variance.mean())) < 4 * row.error


def test_the_error_over_times_knows_that_one_sample_is_measured_at_all(gaussian):
    """The residual is a·(data − mean) + b·noise: its squares at two times share the covariance 2(a·a'·s²)²."""
    data = 2.0 + 0.5 * torch.randn(900, 3, 5)
    flow = gaussian("linear", mean=2.0, std=0.5).flow()
    (row,) = measured("loss-by-time", flow, batches=((0, 900),), data=data, bins=8).compute().rows
    t = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    variance = 0.25 * (1 - t) ** 2 + t**2
    slope = (t - 0.25 * (1 - t)) / variance
    by_data = 0.25 * torch.outer(1 + slope * (1 - t), 1 + slope * (1 - t))
    covariance = 2 * by_data**2 / 15
    covariance.diagonal().copy_(2 * (1.25 - slope**2 * variance) ** 2 / 15)  # by data and noise, over 15 values
    assert row.errors == pytest.approx((covariance.diagonal() / 900).sqrt().tolist(), rel=0.15)
    assert row.error == pytest.approx(math.sqrt(float(covariance.mean()) / 900), rel=0.1)


@pytest.mark.parametrize("predicts", ["velocity", "noise", "data", "score"])
def test_an_error_put_in_by_hand_comes_out(predicts):
    """Data are one point, so that the exact answer is known: noise = x/σ. The backbone is off by a known amount."""
    path = interpolants.build("trigonometric")

    def answer(x, t):
        coefficients = path.evaluate(t[:, None].double())
        noise = x / coefficients.sigma
        return {
            "velocity": coefficients.sigma_rate * noise,
            "noise": noise,
            "data": 0 * noise,
            "score": -noise / coefficients.sigma,
        }[predicts]

    flow = Flow(backbones.wrap(lambda x, t: answer(x, t) + 1 + t[:, None]), path, predicts)
    record = measured("loss-by-time", flow, data=torch.zeros(40, 3).double(), batches=((0, 40),), bins=5).compute()
    (row,) = record.rows
    assert row.name == predicts
    low, high = path.training_interval(predicts)
    for b, mean in enumerate(row.means):
        first, last = (low + (high - low) * end / 5 for end in (b, b + 1))
        assert (1 + first) ** 2 < mean < (1 + last) ** 2


def test_another_kind_than_the_predicted_one():
    """Off by e in the noise is off by −e·σ/α in the data: on the linear path, at t, by e·t/(1 − t)."""
    flow = Flow(backbones.wrap(lambda x, t: x / t[:, None] + 0.5), LINEAR, "noise")
    data = torch.zeros(30, 3).double()
    record = measured("loss-by-time", flow, data=data, batches=((0, 30),), bins=4, kind="data").compute()
    assert record.rows[0].name == "data" and "data" in record.metric
    for b, mean in enumerate(record.rows[0].means[:3]):
        assert (0.5 * (b / 4) / (1 - b / 4)) ** 2 <= mean * (1 + 1e-9)
        assert mean < (0.5 * ((b + 1) / 4) / (1 - (b + 1) / 4)) ** 2
    # the end at which data cannot be had is kept away from
    assert record.times == pytest.approx([(b + 0.5) / 4 * 0.999 for b in range(4)], rel=1e-12)


def test_the_data_end_is_kept_away_from_where_the_kind_cannot_be_had():
    """Noise from predicted data is (x − α·data)/σ: at t = 0 there is none."""
    flow = Flow(backbones.wrap(lambda x, t: 0 * x), LINEAR, "data")
    data = torch.zeros(30, 3).double()
    record = measured("loss-by-time", flow, data=data, batches=((0, 30),), bins=4, kind="noise").compute()
    assert record.times == pytest.approx([0.001 + (b + 0.5) / 4 * 0.999 for b in range(4)], rel=1e-12)
    assert max(record.rows[0].means) < 1e-20


def test_losses_refuse_what_does_not_fit():
    with pytest.raises(InputError, match="got bins 0, expected a whole number of 1 or more"):
        models.build("loss-by-time", bins=0)
    with pytest.raises(UnknownNameError, match="did you mean 'velocity'"):
        models.build("loss-by-time", kind="velocty")
    flow = Flow(backbones.wrap(lambda x, t: x), interpolants.build("two-ended"))
    with pytest.raises(InputError, match="got the TwoEnded path, whose ends are both data"):
        measured("loss-by-time", flow)


# --- what all share -----------------------------------------------------------------------------------------------


def options_of(name):
    return {"feature-distance": {"solver": {"name": "euler-maruyama", "steps": 5}}}.get(name, {"bins": 3})


CORE = ["feature-distance", "loss-by-time"]


def over(flow, name, batches, seed=3):
    metric = models.build(name, **options_of(name))
    for ids in batches:
        label = torch.tensor([i % 6 for i in ids])
        data = Draws(1).normal("data", ids, (3, 4, 4))
        metric.update(flow, {"data": data, "label": label}, Draws(seed).at(ids))
    return metric


def figures(metric):
    record = metric.compute()
    return [x for row in record.rows for x in (row.mean, row.error, *row.means, *row.errors)]


@pytest.mark.parametrize("name", CORE)
def test_batches_and_halves_change_nothing_but_rounding(name):
    flow = labelled_sit()
    whole, again = (over(flow, name, [range(11)]) for _ in range(2))
    pieces = over(flow, name, [range(8, 11), range(2), range(2, 8)])
    half, other = over(flow, name, [range(4)]), over(flow, name, [range(4, 11)])
    half.merge(other)
    half.merge(models.build(name, **options_of(name)))
    empty = models.build(name, **options_of(name))
    empty.merge(whole)
    assert figures(whole) == figures(again) == figures(empty)  # bit for bit
    assert figures(pieces) == pytest.approx(figures(whole), rel=1e-4)
    assert figures(half) == pytest.approx(figures(whole), rel=1e-4)
    assert whole.count == pieces.count == half.count == 11
    assert figures(over(flow, name, [range(11)], seed=4)) != pytest.approx(figures(whole), rel=1e-3)
    assert json.loads(json.dumps(whole.compute().to_json()))["count"] == 11


@pytest.mark.parametrize("name", CORE)
def test_metrics_of_models_refuse_what_does_not_fit(name):
    flow, metric = labelled_sit(), models.build(name, **options_of(name))
    good = {"data": torch.zeros(2, 3, 4, 4), "label": torch.tensor([0, 5])}
    for error, change, message in (
        (InputTypeError, {"data": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, "got data of type torch.uint8"),
        (InputError, {"data": torch.zeros(2, 1, 4, 4)}, r"state of shape \(2, 1, 4, 4\), expected \(N, 3, 4, 4\)"),
        (InputError, {"data": torch.full((2, 3, 4, 4), math.nan)}, "NaN or infinite values"),
        (InputError, {"data": torch.zeros(3, 3, 4, 4)}, "got 3 samples beside draws for 2"),
        (InputError, {"label": torch.tensor([0, 6])}, "got label 6, expected 0 to 5"),
    ):
        with pytest.raises(error, match=message):
            metric.update(flow, {**good, **change}, Draws(0).at(range(2)))
    with pytest.raises(InputError, match="got a batch of label, expected data"):
        metric.update(flow, {"label": good["label"]}, Draws(0).at(range(2)))
    with pytest.raises(InputError, match="got no label"):
        metric.update(flow, {"data": good["data"]}, Draws(0).at(range(2)))
    with pytest.raises(InputError, match="got 0 samples, expected at least 2"):
        metric.compute()
    metric.update(flow, {"data": good["data"][:1], "label": good["label"][:1]}, Draws(0).at(range(1)))
    with pytest.raises(InputError, match="got 1 samples, expected at least 2"):
        metric.compute()
    with pytest.raises(UnknownOptionError, match="has no option"):
        models.build(name, step=3)


def test_merging_unlike_metrics():
    flow = Flow(Turning(ANGLES), LINEAR)
    one = measured("feature-distance", flow, solver=SOLVER)
    with pytest.raises(InputError, match="got 'feature-distance, cosine, Euler in 4 steps' to merge into"):
        one.merge(measured("feature-distance", flow, solver=SOLVER, distance="cosine"))
    with pytest.raises(InputError, match="got rows layer 0, layer 1 at 4 times after layer 0, layer 1, layer 2"):
        one.merge(measured("feature-distance", Flow(Turning((0.1, 0.2)), LINEAR), solver=SOLVER))
    shifted = {**SOLVER, "grid": {"name": "shifted", "shift": 3.0}}
    with pytest.raises(InputError, match=r"at 4 times after .*; measure one network, with a solver of fixed steps"):
        one.merge(measured("feature-distance", flow, solver=shifted))
    assert one.count == 5


def test_values_that_are_not_finite_are_refused():
    flow = Flow(backbones.wrap(lambda x, t: x / 0), LINEAR)
    with pytest.raises(InputError, match="NaN or infinite values in what loss-by-time"):
        measured("loss-by-time", flow)


def test_the_table_and_the_names():
    assert {*CORE} <= {*models.names()} and metrics.models is models
    record = measured("feature-distance", Flow(Growing(ANGLES), LINEAR), solver=SOLVER).compute()
    head, about, columns, *rows = models.table(record).splitlines()
    assert head == "feature-distance, euclidean, Euler in 4 steps: 5 samples" and "Euclidean distance" in about
    assert columns.split() == "mean over t t = 0.25 t = 0.5 t = 0.75 t = 1".split()
    assert [row[:7] for row in rows] == [f"layer {i}" for i in range(4)]
    assert float(rows[3].split()[-1]) == pytest.approx(6 * math.sin(0.35), rel=1e-3)  # at t = 1
    with pytest.raises(InputError, match="got row 'layer 4', expected one of layer 0, layer 1, layer 2, layer 3"):
        record.row("layer 4")


def test_plots_draw_every_row():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    metric = measured("feature-distance", Flow(Growing(ANGLES), LINEAR), solver=SOLVER)
    axes = Figure().add_subplot()
    metric.plot(axes)
    record = metric.compute()
    assert len(axes.lines) == 4
    for line, row in zip(axes.lines, record.rows, strict=True):
        assert tuple(line.get_xdata()) == record.times and tuple(line.get_ydata()) == row.means
        assert line.get_label().startswith(row.name)
