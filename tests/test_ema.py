"""Averages of weights against closed forms in float64; a skipped update changes no bit and reads no device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from pathline import backbones
from pathline.core.errors import InputError, UnknownNameError
from pathline.core.sections import Ema
from pathline.training.ema import Averages, exponent

TAKEN, SKIPPED = torch.ones(()), torch.zeros(())
READERS = ["item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__"]


@contextmanager
def unread() -> Iterator[None]:
    """A tensor whose value comes to Python raises."""

    def refuse(*arguments, **options):
        raise AssertionError("a value was read")

    with pytest.MonkeyPatch.context() as patch:
        for name in READERS:
            patch.setattr(Tensor, name, refuse)
        yield


class Small(nn.Module):
    """Parameters of several shapes, buffers of several types, one weight used under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)
        self.last = nn.Linear(3, 2)
        self.again = self.last
        self.register_buffer("positions", torch.arange(5.0))


@torch.no_grad()
def walk(network: nn.Module, step: int) -> None:
    """Move weights and float buffers to values that are a function of the step."""
    generator = torch.Generator().manual_seed(step)
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.copy_((10 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype))


def copies(averages: Averages) -> dict[str, Tensor]:
    tensors = {f"{name}.{key}": t.clone() for name, track in averages.tensors().items() for key, t in track.items()}
    return tensors | {"updates": averages.updates.clone()}


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[key].numpy().tobytes() == second[key].numpy().tobytes() for key in first
    )


def averaged(settings: Ema, values: list[float]) -> dict[str, float]:
    """Average of one weight that is zero at first and takes these values, by track."""
    network = nn.Linear(2, 3, bias=False)
    nn.init.zeros_(network.weight)
    averages = Averages(network, settings)
    for value in values:
        with torch.no_grad():
            network.weight.fill_(value)
        averages.update(TAKEN)
    for track in averages.tracks.values():
        assert float(track.weight.min()) == float(track.weight.max())
    return {name: float(track.weight[2, 1]) for name, track in averages.tracks.items()}


# --- closed forms ----------------------------------------------------------------------------------------------------


def test_a_ramp_lags_by_the_decay():
    """Weights that grow by one an update from 0: the average lags by d/(1 − d)·(1 − d^n)."""
    found = averaged(Ema(decay=0.8, warmup=False), [float(n) for n in range(1, 8)])
    assert found == {"ema": pytest.approx(7 - 0.8 / 0.2 * (1 - 0.8**7), rel=1e-6)}


def test_warm_up_is_a_decay_that_grows():
    """min(decay, (1 + i)/(10 + i)) at update i; the cap of 0.4 is reached at i = 5."""
    values = [3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0, 6.0]
    expected = 0.0
    for i, value in enumerate(values):
        decay = min(0.4, (1 + i) / (10 + i))
        expected = decay * expected + (1 - decay) * value
    assert averaged(Ema(decay=0.4), values)["ema"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.28])
@pytest.mark.parametrize("count", [1, 2, 300])
def test_a_power_function_average_is_its_definition(length, count):
    """Update m of n is weighed by ∫ t^γ dt over (m − 1, m), over the integral to n; what came before, by nothing."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    times = torch.arange(count + 1, dtype=torch.float64) / count
    weights = (times ** (exponent(length) + 1)).diff()
    assert float(weights.sum()) == pytest.approx(1.0, rel=1e-12)
    found = averaged(Ema(decay=None, lengths=(length,)), values.tolist())
    assert found == {f"ema-{length:.3f}": pytest.approx(float(weights @ values), abs=2e-6)}


def test_late_updates_of_a_long_run_move_by_the_right_weight():
    """At update 10⁷ the weight is 1 − (1 − 10⁻⁷)^(γ + 1), of which 1 − 10⁻⁷ in float32 would leave one digit."""
    network = nn.Linear(2, 3, bias=False)
    averages = Averages(network, Ema(decay=None, lengths=(0.05,)))
    averages.restore({"updates": 10**7 - 1})
    with torch.no_grad():
        averages.tracks["ema-0.050"].weight.zero_()
        network.weight.fill_(1.0)
    averages.update(TAKEN)
    expected = -math.expm1((exponent(0.05) + 1) * math.log1p(-1e-7))
    assert float(averages.tracks["ema-0.050"].weight[0, 0]) == pytest.approx(expected, rel=1e-6)
    assert averages.state() == {"updates": 10**7}


@pytest.mark.parametrize(("length", "gamma"), [(0.05, 16.97), (0.10, 6.94), (0.15, 3.56), (0.20, 1.83), (0.25, 0.72)])
def test_exponents(length, gamma):
    """Values of EDM2, and the width of t^γ on (0, 1) by numerical integration."""
    found = exponent(length)
    assert found == pytest.approx(gamma, abs=0.006)
    t = (torch.arange(10**6, dtype=torch.float64) + 0.5) / 10**6
    weights = t**found
    weights /= weights.sum()
    mean = (weights * t).sum()
    assert float((weights * (t - mean) ** 2).sum().sqrt()) == pytest.approx(length, rel=1e-6)


def test_bf16_weights_are_averaged_in_float32():
    """Steps of 10⁻⁴ that bfloat16 would lose: from 1 towards 1.5, 63 updates of weight 10⁻⁴."""
    network = nn.Linear(2, 3, bias=False).to(torch.bfloat16)
    nn.init.ones_(network.weight)
    averages = Averages(network, Ema(decay=0.9999, warmup=False))
    nn.init.constant_(network.weight, 1.5)
    for _ in range(63):
        averages.update(TAKEN)
    weight = averages.network().weight
    assert weight.dtype == torch.float32
    assert float(weight[0, 0]) == pytest.approx(1.5 - 0.5 * 0.9999**63, rel=1e-6)


# --- what is copied, counted, skipped --------------------------------------------------------------------------------

THREE = Ema(decay=0.7, lengths=(0.05, 0.12))


def test_skipped_updates_change_no_bit_and_no_value_is_read():
    """Also where the trained weights are not finite: as if they had not been, buffers and count included."""
    network = Small()
    ours, unbroken = Averages(network, THREE), Averages(network, THREE)
    plan = [(False, 1), (True, 2), (True, 3), (False, 4), (False, 5), (True, 7), (False, 11)]
    for taken, step in plan:
        walk(network, step)
        if not taken:
            with torch.no_grad():
                network.first.weight.fill_(math.nan)
                network.norm.running_mean.fill_(math.inf)
        with unread():
            ours.update(TAKEN if taken else SKIPPED)
        if taken:
            unbroken.update(TAKEN)
    assert same_bits(copies(ours), copies(unbroken))
    assert ours.state() == {"updates": 3} and all(tensor.isfinite().all() for tensor in copies(ours).values())


def test_buffers_are_copied():
    network = Small()
    averages = Averages(network, THREE)
    walk(network, 1)
    averages.update(TAKEN)
    for track in averages.tracks.values():
        for name, buffer in network.named_buffers():
            assert torch.equal(track.get_buffer(name), buffer) and track.get_buffer(name).dtype == buffer.dtype
        assert track.norm.num_batches_tracked.dtype == torch.int64 and track.again is track.last


def test_several_tracks_equal_each_alone():
    network = Small()
    together = Averages(network, THREE)
    alone = [
        Averages(network, Ema(decay=0.7)),
        Averages(network, Ema(decay=None, lengths=(0.05,))),
        Averages(network, Ema(decay=None, lengths=(0.12,))),
    ]
    for step in range(5):
        walk(network, step)
        for averages in (together, *alone):
            averages.update(TAKEN)
    assert list(together.tracks) == ["ema", "ema-0.050", "ema-0.120"]
    separate = {name: tensors for averages in alone for name, tensors in averages.tensors().items()}
    for name, tensors in together.tensors().items():
        assert same_bits(tensors, separate[name])


def test_a_resumed_average_goes_on_bit_for_bit():
    network = Small()
    unbroken = Averages(network, THREE)
    for step in range(3):
        walk(network, step)
        unbroken.update(TAKEN)
    resumed = Averages(Small(), THREE)
    with torch.no_grad():
        for name, tensors in resumed.tensors().items():
            for key, tensor in tensors.items():
                tensor.copy_(unbroken.tensors()[name][key])
    resumed.restore(unbroken.state())
    resumed.follow(network)
    for step in range(3, 7):
        walk(network, step)
        for averages in (unbroken, resumed):
            averages.update(TAKEN)
    assert same_bits(copies(resumed), copies(unbroken)) and resumed.state() == {"updates": 7}


def test_tracks_are_networks_to_sample_with():
    network = backbones.build("mlp", hidden_size=7, depth=2).train()
    averages = Averages(network, THREE)
    assert averages.network() is averages.network(None) is averages.tracks["ema"]
    assert averages.network("ema-0.120") is averages.tracks["ema-0.120"]
    for track in averages.tracks.values():
        assert not track.training and not any(p.requires_grad for p in track.parameters())
        assert torch.equal(track(torch.ones(3, 2), torch.ones(())), network(torch.ones(3, 2), torch.ones(())))
    assert network.training and all(p.requires_grad for p in network.parameters())
    with pytest.raises(UnknownNameError, match=r"got average 'ema-0.05', .*did you mean 'ema-0.050'\?"):
        averages.network("ema-0.05")
    none = Averages(network, Ema(decay=None))
    none.update(TAKEN)
    with pytest.raises(UnknownNameError, match="got a run without averages"):
        none.network()


def test_a_network_whose_tensors_were_replaced_is_followed_anew():
    """As a change of type or device does; the count stays. Another network is refused by the names that differ."""
    network = Small()
    averages = Averages(network, Ema(decay=0.5, warmup=False))
    averages.update(TAKEN)
    network.to(torch.float64)
    averages.follow(network)
    with torch.no_grad():
        before = averages.network().first.bias.clone()
        network.first.bias.add_(8)
    averages.update(TAKEN)
    assert float((averages.network().first.bias - before - 4).abs().max()) < 1e-6
    assert averages.state() == {"updates": 2} and averages.network().first.bias.dtype == torch.float32
    with pytest.raises(
        InputError, match=r"parameters differ from those of its averages in 0\.bias \(3,\), 0\.weight \(3, 2\), "
    ):
        averages.follow(nn.Sequential(network.first, network.norm, network.last))
    network.first = nn.Linear(2, 5)
    with pytest.raises(InputError, match=r"in first\.bias \(3,\), first\.bias \(5,\), first\.weight"):
        averages.follow(network)


# --- cut up over processes -------------------------------------------------------------------------------------------


def after_five_updates(make: Callable[[], nn.Module], *, shard: bool) -> dict[str, list[float]]:
    """Averages of a network that learns the same batch, with one update skipped."""
    torch.manual_seed(5)
    network = make()
    averages = Averages(network, Ema(decay=0.6, lengths=(0.05,)))
    if shard:
        torch.distributed.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for each in (network, *averages.tracks.values()):
            for block in each.hidden:
                fully_shard(block, mesh=mesh)
            fully_shard(each, mesh=mesh)
        averages.follow(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    x, t = torch.randn(11, 2), torch.rand(11)
    for step in range(5):
        network(x, t).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        averages.update(SKIPPED if step == 2 else TAKEN)
        averages.network("ema-0.050")(x, t)  # as a picture does: gathers and frees the weights
    whole = {
        f"{name}.{key}": tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensors in averages.tensors().items()
        for key, tensor in tensors.items()
    }
    assert not shard or any(isinstance(p, DTensor) for p in averages.network().parameters())
    return {key: tensor.flatten().tolist() for key, tensor in whole.items()} | {"updates": [averages.updates.item()]}


def test_cut_up_over_two_processes_they_are_the_same(processes):
    """FSDP2 on gloo, training and averages; rows that do not divide by two."""
    make = lambda: backbones.build("mlp", hidden_size=7, depth=3)  # noqa: E731  # handed to the processes
    alone = after_five_updates(make, shard=False)
    for cut_up in processes(2, lambda: after_five_updates(make, shard=True), timeout=60).checked():
        assert cut_up.keys() == alone.keys()
        for key, values in cut_up.items():
            assert values == pytest.approx(alone[key], abs=1e-6), key
