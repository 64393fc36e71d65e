from __future__ import annotations

import math

import pytest
import torch

from pathline import Flow, InputError, backbones, interpolants, solvers
from pathline.solvers import guidance

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
    for interval in ((0.7, 0.1), (-0.1, 0.5), (0.1, 1.5), (0.2,), (0.1, 0.2, 0.3)):
        with pytest.raises(InputError, match="guidance interval"):
            guidance.build("classifier-free", interval=interval)
