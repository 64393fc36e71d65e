"""What is done to a network for scale: recomputed activations, compiled blocks, shards. Names stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from pathline.core.errors import ConfigurationError

__all__ = ["checkpoint_activations", "compile_units", "local", "shard", "units"]

# what selective checkpointing keeps: the results that cost most to compute again
KEPT: set[Any] = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def units(network: nn.Module) -> list[nn.Module]:
    """Return the repeated parts of a network, as its blocks: the members of its outermost module lists."""
    return list(_units(network))


def _units(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (member for member in child if not isinstance(member, nn.ModuleList))
            yield from (unit for member in child if isinstance(member, nn.ModuleList) for unit in member)
        else:
            yield from _units(child)


def checkpoint_activations(network: nn.Module, kind: Literal["selective"] | int) -> None:
    """Let units compute their activations again in the backward pass; results are the same.

    Args:
        network: changed in place.
        kind: k for every k-th unit, from the first; ``selective`` for all of them, results of matrix products and
            attention kept.

    Raises:
        ConfigurationError: the network has no units.
    """
    found = _found(network, "train.activation_checkpointing")
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # a backbone draws nothing
    if kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    def recomputed(unit: nn.Module, *inputs: Any, **conditions: Any) -> Any:
        return checkpoint(type(unit).forward, unit, *inputs, **conditions, **options)

    for unit in found if kind == "selective" else found[::kind]:
        # a method: of a unit whose forward is a partial torch.compile would compile nothing, without a word
        unit.forward = MethodType(recomputed, unit)


def _policy(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def compile_units(network: nn.Module) -> None:
    """Compile each unit in place: equal units share their code, and no name changes."""
    for unit in _found(network, "train.compile"):
        unit.compile()


def shard(network: nn.Module, mesh: DeviceMesh, *, trained: bool = True) -> nn.Module:
    """Cut every unit, and what is left, up over a one-dimensional mesh (FSDP2); in place.

    Args:
        network: whole.
        mesh: of the devices.
        trained: whether a backward pass follows each forward one. Where none does, what the forward pass gathered
            outside of units would be used again by the next one, however its shards have changed meanwhile.
    """
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": None if trained else True}
    for unit in units(network):
        if any(True for _ in unit.parameters()):
            fully_shard(unit, **options)
    fully_shard(network, **options)
    return network


def _found(network: nn.Module, entry: str) -> list[nn.Module]:
    found = units(network)
    if not found:
        raise ConfigurationError(
            f"{entry}: got a {type(network).__name__} without blocks in a ModuleList, expected some; leave it out"
        )
    return found


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor that may be cut up over several, without its graph."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
