"""The guard against the same written out in numpy's float32, one number at a time, and clipping against torch's own."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pathline.core.sections import Guard as Settings
from pathline.training.guard import Guard, clipped_norm, reason

CPU = torch.device("cpu")
LARGEST = float(np.finfo(np.float32).max)


class ByHand:
    """What a step's numbers lead to, by the definition in the documentation of the section ``guard``."""

    def __init__(self, spike):
        self.spike, self.taken, self.mean, self.size = spike, 0, np.float32(0), np.float32(0)

    @property
    def bound(self):
        """Above this a loss has jumped."""
        if self.spike is None or self.taken < 100:
            return math.inf
        return float(self.mean + np.float32(self.spike) * self.size)

    def verdict(self, loss, norm, unusable):
        if not (math.isfinite(loss) and math.isfinite(norm)) or unusable or loss > self.bound:
            return 0
        self.taken += 1
        weight = np.float32(1) / np.float32(min(self.taken, 100))
        self.mean += weight * (np.float32(loss) - self.mean)
        self.size += weight * (abs(np.float32(loss)) - self.size)
        return 1


def decide(guard, numbers):
    """The guard's answer to (loss, norm, unusable): what it was given, and 1 or 0."""
    given, kept = guard.verdict(*(torch.tensor(float(value)) for value in numbers))
    assert given.dtype == kept.dtype == torch.float32 and given.shape == (3,) and kept.shape == ()
    return given, int(kept)


def sequence(seed, length, level):
    """Losses about a level of either sign, with jumps of both directions, NaN, infinities and unusable data."""
    random = np.random.default_rng(seed)
    numbers = np.empty((length, 3), np.float32)
    numbers[:, 0] = level + abs(level) * 0.4 * random.standard_normal(length)
    numbers[:, 1] = random.exponential(2.0, length)
    numbers[:, 2] = 0
    for row in range(length):
        kind = random.integers(40)
        if kind < 3:
            numbers[row, random.integers(2)] = (math.nan, math.inf, -math.inf)[kind]
        elif kind == 3:
            numbers[row, 2] = random.integers(1, 7)
        elif kind < 7:
            numbers[row, 0] += (-1) ** kind * 10 ** random.uniform(1.3, 4) * abs(level)
    numbers[:, 1] = np.abs(numbers[:, 1])  # a norm is never negative
    return numbers


@pytest.mark.parametrize("spike", [10.0, 2.5, None])
@pytest.mark.parametrize("level", [0.8, -3.0, 1e-4])
def test_decisions_are_those_written_out(spike, level):
    guard, ours, skipped = Guard(CPU, Settings(spike=spike)), ByHand(spike), {"jump": 0, "other": 0}
    for numbers in sequence(int(abs(level) * 1e4), 700, level):
        near = math.isfinite(ours.bound) and abs(numbers[0] / ours.bound - 1) < 1e-4  # a matter of rounding
        bound = ours.bound
        given, kept = decide(guard, numbers)
        assert np.array_equal(given.numpy(), numbers, equal_nan=True)
        assert not near and kept == ours.verdict(*numbers), (numbers, bound)
        if not kept:
            skipped["jump" if reason(given.tolist(), kept, None) == "jump" else "other"] += 1
        if spike is not None and ours.taken:
            mean, size = guard.state()["means"]
            assert mean == pytest.approx(ours.mean, rel=1e-4, abs=1e-5 * abs(level))
            assert size == pytest.approx(ours.size, rel=1e-4)
            assert guard.state()["taken"] == ours.taken
    assert skipped["other"] > 40 and (skipped["jump"] > 10 if spike else skipped["jump"] == 0)


def test_no_jump_is_looked_for_before_a_hundred_steps_were_taken():
    """Skipped ones do not count; the first bound is the mean of a hundred losses times 1 + spike."""
    guard = Guard(CPU, Settings(spike=3.0))
    for step in range(99):
        assert decide(guard, (1 + step % 2, 0.5, 0))[1] == 1
        assert decide(guard, (1.0, math.nan, 0))[1] == 0
    assert decide(guard, (1e6, 0.5, 0))[1] == 1  # the hundredth, whatever it is
    losses = [1 + step % 2 for step in range(99)] + [1e6]
    assert guard.state()["taken"] == 100
    assert guard.state()["bound"] == pytest.approx(4 * math.fsum(losses) / 100, rel=1e-5)
    assert decide(guard, (4.1 * math.fsum(losses) / 100, 0.5, 0))[1] == 0
    assert decide(guard, (3.9 * math.fsum(losses) / 100, 0.5, 0))[1] == 1


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spike", [5.0, None])
@pytest.mark.parametrize("before", [0, 103])
def test_what_is_not_finite_is_skipped_and_forgotten(place, value, spike, before):
    guard = Guard(CPU, Settings(spike=spike))
    for _ in range(before):
        decide(guard, (2.0, 1.0, 0))
    numbers = [2.0, 1.0, 0.0]
    numbers[place] = value
    state = guard.state()
    assert decide(guard, numbers)[1] == 0 and guard.state() == state
    assert decide(guard, (2.0, 1.0, 0))[1] == 1


@pytest.mark.parametrize("loss", [0.0, LARGEST, -LARGEST, 1e-45])
def test_what_is_finite_is_taken(loss):
    """Also again and again: a loss that stays as it is never jumps."""
    guard = Guard(CPU, Settings(spike=0.5))
    assert [decide(guard, (loss, LARGEST, 0))[1] for _ in range(205)] == [1] * 205


def test_a_bound_beyond_all_numbers_lets_no_infinity_pass():
    guard = Guard(CPU, Settings(spike=1e6))
    for _ in range(101):
        decide(guard, (1e33, 1.0, 0))
    assert decide(guard, (LARGEST, 1.0, 0))[1] == 1
    assert decide(guard, (math.inf, 1.0, 0))[1] == 0


@pytest.mark.parametrize("spike", [7.0, None])
@pytest.mark.parametrize("stop", [0, 41, 99, 100, 133])
def test_a_restored_guard_decides_as_if_nothing_had_been(spike, stop):
    """Through JSON, bit for bit."""
    settings, numbers = Settings(spike=spike), sequence(5, 300, 1.3)
    unbroken, first, second = (Guard(CPU, settings) for _ in range(3))
    decisions = [decide(unbroken, row)[1] for row in numbers]
    ours = [decide(first, row)[1] for row in numbers[:stop]]
    second.restore(json.loads(json.dumps(first.state())))
    ours += [decide(second, row)[1] for row in numbers[stop:]]
    assert ours == decisions and second.state() == unbroken.state()


def test_a_state_of_none_begins_anew():
    guard = Guard(CPU, Settings())
    fresh = guard.state()
    guard.restore({})
    assert guard.state() == fresh and fresh["taken"] == 0


@pytest.mark.parametrize(
    ("numbers", "kept", "scale", "why"),
    [
        ((1.0, 2.0, 0.0), 1, None, ""),
        ((1.0, 2.0, 0.0), 0, None, "jump"),
        ((math.nan, math.nan, 3.0), 0, None, "data"),
        ((math.nan, math.nan, 0.0), 0, None, "loss"),
        ((-math.inf, 2.0, 0.0), 0, None, "loss"),
        ((math.inf, math.inf, 0.0), 0, 65536.0, "loss"),
        ((1.0, math.inf, 0.0), 0, None, "gradient"),
        ((1.0, math.nan, 0.0), 0, 65536.0, "overflow"),
        ((1.0, math.inf, 0.0), 0, 1.0, "overflow"),
        ((1.0, math.inf, 0.0), 0, 0.5, "gradient"),
        ((1.0, math.inf, 2.0), 0, 0.5, "data"),
        ((LARGEST, LARGEST, 0.0), 0, 2.0, "jump"),
    ],
)
def test_reasons(numbers, kept, scale, why):
    assert reason(numbers, kept, scale) == why


# --- clipping --------------------------------------------------------------------------------------------------------


def network(factor=1.0, shard=lambda layers: layers):
    """Two layers with gradients of one fixed batch; the last bias has none."""
    torch.manual_seed(3)
    layers, x = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), torch.randn(2, 5)
    layers[1].bias.requires_grad_(False)
    (shard(layers)(x).square().sum() * factor).backward()
    return layers


@pytest.mark.parametrize("clip", [0.3, 1e3, None])
@pytest.mark.parametrize("factor", [1.0, 0.0, 1e-12])
def test_gradients_are_clipped_as_by_torch_and_by_hand(clip, factor):
    ours, theirs = network(factor), network(factor)
    before = [p.grad.double() for p in theirs.parameters() if p.grad is not None]
    by_hand = math.sqrt(sum(float(g.square().sum()) for g in before))
    norm = clipped_norm(list(ours.parameters()), clip)
    assert norm.shape == () and float(norm) == pytest.approx(by_hand, rel=1e-6)
    if clip is not None:
        assert torch.equal(norm, nn.utils.clip_grad_norm_(theirs.parameters(), clip))
    scale = 1.0 if clip is None else min(1.0, clip / (by_hand + 1e-6))  # torch's guard against division by 0
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    assert all(torch.equal(p.grad, q.grad) for p, q in pairs if q.grad is not None)
    for gradient, old in zip((p.grad for p in ours.parameters() if p.grad is not None), before, strict=True):
        assert torch.allclose(gradient.double(), old * scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_wrong_gradient_is_seen_in_the_norm(value):
    layers = network()
    layers[0].weight.grad[4, 2] = value
    norm = clipped_norm(list(layers.parameters()), 1.0)
    assert not math.isfinite(norm) and decide(Guard(CPU, Settings()), (1.0, norm, 0))[1] == 0


def test_shards_are_clipped_as_what_they_are_parts_of(processes):
    """Two processes of one half each: 7 rows are cut into 4 and 3, 3 rows into 2 and 1."""
    expected = network()
    norm = float(clipped_norm(list(expected.parameters()), 0.3))
    wanted = [p.grad.tolist() for p in expected.parameters() if p.grad is not None]

    def half():
        torch.distributed.init_process_group("gloo")
        cut = network(shard=lambda layers: fully_shard(layers, mesh=init_device_mesh("cpu", (2,))))
        ours = clipped_norm(list(cut.parameters()), 0.3)
        gradients = [p.grad.full_tensor().tolist() for p in cut.parameters() if p.grad is not None]
        torch.distributed.destroy_process_group()
        return [float(ours), gradients]

    for ours, gradients in processes(2, half, timeout=60).checked():
        assert ours == pytest.approx(norm, rel=1e-6)
        for mine, theirs in zip(gradients, wanted, strict=True):
            assert np.allclose(mine, theirs, rtol=1e-5)
