"""Metrics of samples that two processes share, against those of one that sees all."""

from __future__ import annotations

import os
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist

from pathline import Draws, metrics
from pathline.metrics import features
from pathline.metrics.base import Real
from pathline.metrics.evaluation import Evaluation

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

COUNT = 61


class Several(features.Features):
    """A feature space of three outputs, by fixed projections of the pixels, bit for bit the same in any batch."""

    name = "several"
    sizes: ClassVar = {"features": 6, "spatial": 7, "logits": 5}
    manifest: ClassVar = {"name": "several", "sizes": sizes}

    def __call__(self, images):
        return self.outputs(images)["features"]

    def outputs(self, images):
        x = features.as_floats(images).flatten(1).double()
        axes = {name: Draws(i).normal("axes", range(64), (size,)) for i, (name, size) in enumerate(self.sizes.items())}
        return {name: (x[:, :, None] * a.double()).sum(1) for name, a in axes.items()}


def evaluation():
    space = Several()
    asked = [
        {"name": "fid", "features": space},
        {"name": "sfid", "features": space, "groups": 4},
        {"name": "inception-score", "features": space, "splits": 3},
        {"name": "kid", "features": space, "subsets": 4, "size": 20},
        {"name": "precision-recall", "features": space},
        "memorisation",
    ]
    return Evaluation(asked, Real.of("digits"))


def images():
    return (0.5 * Draws(3).normal("images", range(COUNT), (1, 8, 8))).clamp(-1, 1)


def told(records):
    return [[r.metric, r.count, dict(r.values), dict(r.real), dict(r.uncertainty)] for r in records]


def feed(measured, numbers, size):
    x = images()
    for part in numbers.split(size):
        measured.update(x[part], part % 10, part)


def close(found, expected):
    """Equal in all words and counts, and in numbers to 1e-12."""
    for (metric, count, *ours), (name, number, *theirs) in zip(found, expected, strict=True):
        assert (metric, count) == (name, number)
        for one, other in zip(ours, theirs, strict=True):
            assert one == pytest.approx(other, rel=1e-12, abs=1e-12)


@pytest.fixture(scope="module")
def expected():
    whole = evaluation()
    feed(whole, torch.arange(COUNT), COUNT)
    return told(whole.compute())


def work():
    dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=2)
    mine = evaluation()
    rank = dist.get_rank()
    feed(mine, torch.arange(rank, COUNT, 2), 7 + rank)
    states = [None, None]
    dist.all_gather_object(states, mine.state())
    merged = mine.fresh()
    for state in states[:: 1 - 2 * rank]:  # in either order
        merged.merge_state(state)
    dist.destroy_process_group()
    return told(merged.compute())


def test_two_processes_equal_one(processes, expected):
    for found in processes(2, work, timeout=90).checked():
        close(found, expected)


@pytest.mark.parametrize("size", [1, 13])
def test_batches_of_any_size_and_order_equal_one(size, expected):
    measured = evaluation()
    feed(measured, torch.from_numpy(Draws(1).permutation("order", COUNT)), size)
    close(told(measured.compute()), expected)


def test_a_process_without_samples_adds_nothing(expected):
    measured, empty = evaluation(), evaluation()
    feed(measured, torch.arange(COUNT), 20)
    measured.merge_state(empty.state())
    close(told(measured.compute()), expected)
    empty.merge_state(measured.state())
    close(told(empty.compute()), expected)


def test_states_are_plain_tensors_that_share_nothing():
    measured = evaluation()
    feed(measured, torch.arange(20), 20)
    state = measured.state()
    assert all(type(value) is torch.Tensor and value.device.type == "cpu" for value in state.values())
    other = measured.fresh()
    assert [metric.count for metric in other.metrics] == [0] * 6
    other.merge_state(state)
    before = {key: value.clone() for key, value in state.items()}
    feed(other, torch.arange(20, 40), 20)
    assert [metric.count for metric in measured.metrics] == [20] * 6
    assert all(torch.equal(value, before[key]) for key, value in state.items())


def test_every_metric_of_the_registry_is_here():
    named = {component["name"] for component in evaluation()._components}
    assert named | {"frechet", "label-agreement"} == set(metrics.names())  # one is fid's base, one the memorisation's
