from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pathline import Draws, InputError, InputTypeError, UnknownNameError, backbones, interpolants, objectives
from pathline.objectives import times

LINEAR = interpolants.build("linear")


class Recorder(nn.Module):
    """Predicts a known thing and remembers what it was asked."""

    num_classes, null_label = 7, 7

    def __init__(self, value=0.0):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x, t, label=None):
        self.x, self.t, self.label = x, t, label
        return self.value * x


def build(name="velocity", **options):
    return objectives.build(name, interpolant=LINEAR, **options)


def test_velocity_loss_by_hand():
    data, draws = torch.randn(5, 3, 2), Draws(3).at(range(10, 15))
    backbone = Recorder(0.7)
    loss = build()(backbone, data, draws, label=torch.arange(5))
    noise, t = draws.normal("noise", (3, 2)), draws.uniform("time")
    x = (1 - t)[:, None, None] * data + t[:, None, None] * noise
    expected = ((0.7 * x - (noise - data)) ** 2).mean((1, 2))
    assert torch.allclose(backbone.x, x) and torch.equal(backbone.t, t)
    assert torch.allclose(loss.terms["velocity"], expected)
    assert torch.allclose(loss.total, expected.mean())
    loss.total.backward()
    assert torch.allclose(backbone.value.grad, (2 * x * (0.7 * x - (noise - data))).mean())


def test_the_minimum_is_the_exact_velocity(gaussian):
    """For Gaussian data the expected loss is Var(velocity | x), known in closed form, and no network beats it."""
    exact = gaussian(mean=0.5, std=0.3)
    data = 0.5 + 0.3 * Draws(1).normal("data", range(200_000), (1,)).double()
    draws = Draws(2).at(range(200_000))
    loss = build()(backbones.wrap(lambda x, t: exact.velocity(x, t)), data, draws)
    t = draws.uniform("time").double()
    variance = 0.3**2 * (1 - t) ** 2 + t**2
    conditional = 1 + 0.3**2 - (t - 0.3**2 * (1 - t)) ** 2 / variance
    error = float((loss.terms["velocity"] - conditional).std()) / math.sqrt(len(t))
    assert abs(float(loss.total) - float(conditional.mean())) < 4 * error
    worse = build()(backbones.wrap(lambda x, t: 1.1 * exact.velocity(x, t)), data, draws)
    assert float(worse.total) > float(loss.total)


def test_rows_do_not_depend_on_the_batch_they_are_in():
    data, label = torch.randn(6, 4), torch.arange(6)
    for name in ("velocity", "deepflow"):
        options = dict(trunk="sit", input_size=2, patch_size=1, in_channels=1, hidden_size=8, num_heads=2, depth=2)
        backbone = (
            backbones.build("deepflow", **options, num_classes=7, acceleration_width=4)
            if name == "deepflow"
            else Recorder(0.3)
        )
        batch = data.reshape(6, 1, 2, 2) if name == "deepflow" else data
        objective = build(name, label_dropout=0.5)
        whole = objective(backbone, batch, Draws(0).at(range(20, 26), step=4), label=label)
        part = objective(backbone, batch[2:5], Draws(0).at(range(22, 25), step=4), label=label[2:5])
        for term, value in whole.terms.items():
            assert torch.allclose(part.terms[term], value[2:5], atol=1e-6)


def test_without_draws_torchs_generator_governs():
    data, backbone = torch.randn(5, 3), Recorder(0.5)
    torch.manual_seed(8)
    first = build()(backbone, data, label=torch.arange(5)).total
    assert build()(backbone, data, label=torch.arange(5)).total != first
    torch.manual_seed(8)
    assert build()(backbone, data, label=torch.arange(5)).total == first


def test_label_dropout_has_its_rate_and_touches_nothing_else():
    backbone, label = Recorder(), torch.arange(20_000) % 7
    data = torch.zeros(20_000, 1)
    build(label_dropout=0.1)(backbone, data, Draws(0).at(range(20_000)), label=label)
    dropped = backbone.label != label
    assert set(backbone.label[dropped].tolist()) == {7}
    assert abs(float(dropped.float().mean()) - 0.1) < 4 * math.sqrt(0.09 / 20_000)
    kept = backbone.t
    build(label_dropout=0.0)(backbone, data, Draws(0).at(range(20_000)), label=label)
    assert torch.equal(backbone.label, label) and torch.equal(backbone.t, kept)
    build(label_dropout=1.0)(backbone, data, Draws(0).at(range(20_000)), label=label)
    assert set(backbone.label.tolist()) == {7}


def test_the_loss_is_float32_whatever_the_networks_precision():
    backbone = backbones.wrap(lambda x, t: (0 * x).bfloat16())
    loss = build()(backbone, torch.randn(3, 5), Draws(0).at(range(3)))
    assert loss.total.dtype == torch.float32


def test_a_score_in_bfloat16_is_scaled_in_float32():
    data, draws = torch.randn(5, 3), Draws(0).at(range(5))
    loss = build("score")(backbones.wrap(lambda x, t: (-x).bfloat16()), data, draws)
    t, noise = 1e-3 + (1 - 1e-3) * draws.uniform("time")[:, None], draws.normal("noise", (3,))
    score = -((1 - t) * data + t * noise).bfloat16().float()
    assert torch.allclose(loss.terms["score"], (t * score + noise).square().mean(1), rtol=1e-5)


def test_laws_by_name_mapping_and_instance():
    law = times.build("logit-normal", mean=1.0)
    assert build(times=law).times is law
    assert build(times={"name": "logit-normal", "mean": 2}).times.mean == 2
    with pytest.raises(UnknownNameError, match="unknown law of time 'logitnormal'; did you mean 'logit-normal'"):
        build(times="logitnormal")
    for mean, std in ((0.0, 0.0), (0.0, math.inf), (0.0, math.nan), (math.inf, 1.0)):
        with pytest.raises(InputError, match=f"got mean {mean} and std {std}"):
            times.build("logit-normal", mean=mean, std=std)


def test_bad_inputs():
    data, label = torch.randn(3, 2), torch.tensor([0, 1, 2])
    with pytest.raises(InputError, match="got NaN or infinite values in data"):
        build()(Recorder(), torch.full((3, 2), math.nan), label=label)
    with pytest.raises(InputError, match="got label 8, expected 0 to 7"):
        build()(Recorder(), data, label=torch.tensor([0, 8, 1]))
    with pytest.raises(InputError, match="got label -1, expected 0 to 7"):
        build()(Recorder(), data, label=torch.tensor([0, -1, 1]))
    with pytest.raises(InputTypeError, match="got data torch.int64"):
        build()(Recorder(), torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(InputError, match="got draws for 4 samples beside 3"):
        build()(Recorder(), data, Draws(0).at(range(4)), label=label)
    with pytest.raises(InputError, match="without a null label; set label_dropout=0"):
        build()(backbones.wrap(lambda x, t, label: x, num_classes=7), data, label=label)
    with pytest.raises(InputError, match=r"label_dropout 1.5, expected a probability"):
        build(label_dropout=1.5)
    with pytest.raises(InputTypeError, match=r"use interpolants.build\(name\)"):
        objectives.build("velocity", interpolant="linear")
    with pytest.raises(InputError, match=r"prediction of shape \(3, 1\)"):
        build()(backbones.wrap(lambda x, t: x[:, :1]), data)
    with pytest.raises(InputError, match="encoder features, which the velocity objective does not use"):
        build()(Recorder(), data, features=(torch.zeros(3, 2, 2),), label=label)
