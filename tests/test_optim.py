"""Optimizers against torch's own and against formulas; a skipped step changes no bit and reads no device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pathline import backbones
from pathline.core.errors import ConfigurationError
from pathline.core.sections import Optim
from pathline.training.optim import Optimizers

TAKEN, SKIPPED = torch.ones(()), torch.zeros(())
SMALL = {"input_size": 4, "patch_size": 2, "in_channels": 3, "hidden_size": 12, "num_heads": 3, "num_classes": 5}


class Blocks(nn.Module):
    """Matrices inside and outside a list of modules, a table, a convolution, gains."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.convolution = nn.Conv1d(3, 2, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 7), nn.LayerNorm(7), nn.Linear(7, 3)) for _ in range(2))
        self.head = nn.Linear(3, 2)


def set_gradients(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def copies(optimizers: Optimizers) -> dict[str, Tensor]:
    weights = {f"weight {i}": p.detach().clone() for i, p in enumerate(optimizers.parameters)}
    return weights | {name: tensor.clone() for name, tensor in optimizers.tensors().items()}


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value.view(torch.int32), second[name].view(torch.int32)) for name, value in first.items()
    )


def decayed(network: nn.Module, optimizers: Optimizers) -> set[str]:
    """Names of the parameters that a step without gradient would shrink."""
    names = {p: name for name, p in network.named_parameters()}
    groups = [group for optimizer in optimizers.all for group in optimizer.param_groups]
    assert sum(len(group["params"]) for group in groups) == len(names)
    return {names[p] for group in groups if group["weight_decay"] for p in group["params"]}


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


# --- AdamW -----------------------------------------------------------------------------------------------------------


def test_adamw_is_the_written_out_formula():
    """arXiv:1711.05101, algorithm 2, in float64; gains, biases and tables are not decayed."""
    network = Blocks()
    settings = Optim(lr=0.03, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.4)
    optimizers = Optimizers(network, settings)
    spared = {"table.weight"} | {name for name, p in network.named_parameters() if p.ndim == 1}
    expected = {name: p.detach().double().clone() for name, p in network.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step in range(1, 4):
        lr = 0.03 / step
        set_gradients(network, step)
        optimizers.set_lr(lr)
        optimizers.step(TAKEN)
        for name, p in network.named_parameters():
            g = p.grad.double()
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.95 * second[name] + 0.05 * g * g
            corrected = first[name] / (1 - 0.8**step), second[name] / (1 - 0.95**step)
            decay = 0.0 if name in spared else 0.4
            expected[name] -= lr * (corrected[0] / (corrected[1].sqrt() + 1e-3) + decay * expected[name])
    for name, p in network.named_parameters():
        assert float((p.detach().double() - expected[name]).abs().max()) < 1e-6, name
        moment = optimizers.tensors()[f"{name}.exp_avg"].double()
        assert float((moment - first[name]).abs().max()) < 1e-6, name


def test_adamw_is_torchs_unfused_one():
    network, other = Blocks(), Blocks()
    other.load_state_dict(network.state_dict())
    optimizers = Optimizers(network, Optim(lr=0.02, weight_decay=0.3, decay="all"))
    reference = torch.optim.AdamW(other.parameters(), lr=0.02, weight_decay=0.3, fused=False, foreach=False)
    for step in range(5):
        for each in (network, other):
            set_gradients(each, step)
        optimizers.step(TAKEN)
        reference.step()
    for p, q in zip(network.parameters(), other.parameters(), strict=True):
        assert float((p - q).detach().abs().max()) < 1e-6


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3.0])
def test_a_skipped_step_changes_no_bit_and_no_value_is_read(name, bad):
    """Three skipped between taken ones: as if they had not been; also with gradients that are finite."""
    network, other = Blocks(), Blocks()
    other.load_state_dict(network.state_dict())
    settings = Optim(name=name, lr=0.02, weight_decay=0.3)
    ours, unbroken = Optimizers(network, settings), Optimizers(other, settings)
    plan = [(True, 0), (False, 1), (False, 2), (True, 3), (False, 4), (True, 5)]
    with unread():
        for taken, seed in plan:
            set_gradients(network, seed)
            if not taken:
                for p in network.parameters():
                    p.grad.view(-1)[:: 2 if seed == 1 else 1] = bad
            ours.step(TAKEN if taken else SKIPPED)
            if taken:
                set_gradients(other, seed)
                unbroken.step(TAKEN)
    assert same_bits(copies(ours), copies(unbroken))
    assert {float(t) for key, t in ours.tensors().items() if key.endswith(".step")} == {3.0}


def test_the_rate_of_learning_reaches_every_group():
    optimizers = Optimizers(Blocks(), Optim(name="muon", weight_decay=0.1))
    optimizers.set_lr(0.5)
    assert [group["lr"] for optimizer in optimizers.all for group in optimizer.param_groups] == [0.5] * 3


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_are_there_before_the_first_step(name):
    network = Blocks()
    optimizers = Optimizers(network, Optim(name=name))
    before = optimizers.tensors()
    assert not any(tensor.any() for tensor in before.values())
    set_gradients(network, 0)
    optimizers.step(TAKEN)
    after = optimizers.tensors()
    assert before.keys() == after.keys() and all(before[key] is tensor for key, tensor in after.items())
    assert all(tensor.any() for tensor in after.values())
    optimizers.zero_grad()
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_resumed_optimizer_goes_on_bit_for_bit(name):
    """Moments copied into those of a fresh one, weights into those of its network."""
    networks = Blocks(), Blocks()
    settings = Optim(name=name, lr=0.02, weight_decay=0.3)
    unbroken, resumed = (Optimizers(network, settings) for network in networks)
    for step in range(5):
        if step == 2:
            networks[1].load_state_dict(networks[0].state_dict())
            for key, tensor in resumed.tensors().items():
                tensor.copy_(unbroken.tensors()[key])
        for network, optimizers in zip(networks, (unbroken, resumed), strict=True):
            if step >= 2 or optimizers is unbroken:
                set_gradients(network, step)
                optimizers.step(TAKEN)
    assert same_bits(copies(unbroken), copies(resumed))


def test_a_loss_scaler_unscales_every_gradient():
    network, other = Blocks(), Blocks()
    optimizers, scaler = Optimizers(network, Optim(name="muon")), torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    for each in (network, other):
        set_gradients(each, 0)
    for p in network.parameters():
        p.grad *= 8
    for optimizer in optimizers.all:
        scaler.unscale_(optimizer)
    for p, q in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_frozen_parameters_have_no_moments_and_stay():
    network = Blocks()
    network.head.requires_grad_(False)
    optimizers = Optimizers(network, Optim(weight_decay=0.1))
    names = [name for name, _ in network.named_parameters() if not name.startswith("head")]
    assert [name.removesuffix(".exp_avg") for name in optimizers.tensors() if name.endswith(".exp_avg")] == names
    assert len(optimizers.parameters) == len(names)
    before = network.head.weight.clone()
    set_gradients(network, 0)
    optimizers.step(TAKEN)
    assert torch.equal(network.head.weight, before)


# --- what is decayed, what is orthogonalised -------------------------------------------------------------------------


def network_of(name: str) -> nn.Module:
    options = {"depth": 2, "align_dims": (7,), "align_width": 5}
    if name == "sit":
        return backbones.build("sit", **SMALL, **options, align_layer=1, takes_gap=True)
    return backbones.build("deepflow", **SMALL, **options, cuts=(1,), acceleration_width=9)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("backbone", ["sit", "deepflow"])
def test_matrices_alone_are_decayed(backbone, optimizer):
    """By name: weights of the projections are, biases, gains of norms and the table of labels are not."""
    network = network_of(backbone)
    names = [name for name, _ in network.named_parameters()]
    gains = {name for name in names if "norm" in name}
    expected = {name for name in names if name.endswith("weight")} - gains - {"labels.weight", "trunk.labels.weight"}
    settings = Optim(name=optimizer, weight_decay=0.1)
    assert decayed(network, Optimizers(network, settings)) == expected and len(expected) > 15
    everything = settings.model_copy(update={"decay": "all"})
    assert decayed(network, Optimizers(network, everything)) == set(names)
    assert decayed(network, Optimizers(network, Optim(name=optimizer))) == set()


@pytest.mark.parametrize(
    ("backbone", "lists"),
    [("sit", ("blocks.", "projectors.")), ("deepflow", ("trunk.blocks.", "refiners.", "projectors."))],
)
def test_muon_takes_the_matrices_of_the_blocks(backbone, lists):
    network = network_of(backbone)
    names = {p: name for name, p in network.named_parameters()}
    adamw, muon = Optimizers(network, Optim(name="muon")).all
    matrices = {name for p, name in names.items() if name.startswith(lists) and p.ndim == 2}
    taken = {names[p] for group in muon.param_groups for p in group["params"]}
    assert isinstance(muon, torch.optim.Muon) and taken == matrices and len(matrices) > 8
    assert {names[p] for group in adamw.param_groups for p in group["params"]} == set(names.values()) - matrices


def test_muon_is_torchs():
    """Its own optimizers on a copy, each on its half of the parameters."""
    network, other = Blocks(), Blocks()
    other.load_state_dict(network.state_dict())
    ours = Optimizers(network, Optim(name="muon", lr=0.02, weight_decay=0.3, decay="all", muon_momentum=0.8))
    matrices = [p for p in other.blocks.parameters() if p.ndim == 2]
    rest = [p for p in other.parameters() if not any(p is q for q in matrices)]
    references = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.3, momentum=0.8, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.02, weight_decay=0.3, fused=False, foreach=False),
    ]
    for step in range(3):
        for each in (network, other):
            set_gradients(each, step)
        ours.step(TAKEN)
        for reference in references:
            reference.step()
    for p, q in zip(network.parameters(), other.parameters(), strict=True):
        assert float((p - q).detach().abs().max()) < 1e-6


def test_a_step_of_muon_is_as_large_as_one_of_adamw():
    """Singular values of the update lie about 0.2·√(larger side)·lr, which makes its root mean square 0.2·lr."""
    network = nn.ModuleList([nn.Linear(70, 30, bias=False)])
    before = network[0].weight.detach().clone()
    optimizers = Optimizers(network, Optim(name="muon", lr=0.5))
    set_gradients(network, 3)
    optimizers.step(TAKEN)
    step = before - network[0].weight.detach()
    singular = torch.linalg.svdvals(step) / (0.5 * 0.2 * math.sqrt(70))
    assert 0.6 < float(singular.min()) and float(singular.max()) < 1.3  # the polynomial's band about 1
    assert float((step * network[0].weight.grad).sum()) > 0  # downhill
    assert len(optimizers.all) == 1


def test_muon_is_refused_without_blocks():
    with pytest.raises(ConfigurationError, match=r"got muon for a network without .* use adamw"):
        Optimizers(nn.Sequential(nn.Linear(2, 3), nn.ModuleList([nn.LayerNorm(3)])), Optim(name="muon"))


# --- cut up over processes -------------------------------------------------------------------------------------------


def after_three_steps(*, shard: bool) -> list[list[float]]:
    """Weights after taken, skipped, taken; each process sees the same gradient."""
    torch.manual_seed(5)
    network = Blocks()
    if shard:
        torch.distributed.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for block in network.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(network, mesh=mesh)
    optimizers = Optimizers(network, Optim(lr=0.02, weight_decay=0.3))
    for step, kept in enumerate((TAKEN, SKIPPED, TAKEN)):
        generator = torch.Generator().manual_seed(step)
        for p in optimizers.parameters:
            gradient = torch.randn(p.shape, generator=generator)
            if not kept:
                gradient.fill_(math.nan)
            p.grad = distribute_tensor(gradient, p.device_mesh, p.placements) if shard else gradient
        optimizers.step(kept)
    tensors = [*optimizers.parameters, *optimizers.tensors().values()]
    whole = [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return [tensor.detach().flatten().tolist() for tensor in whole]


def test_cut_up_over_two_processes_it_is_the_same(processes):
    """FSDP2 on gloo; rows that do not divide by two."""
    alone = after_three_steps(shard=False)
    for cut_up in processes(2, lambda: after_three_steps(shard=True), timeout=60).checked():
        for ours, expected in zip(cut_up, alone, strict=True):
            assert ours == pytest.approx(expected, abs=1e-6)
