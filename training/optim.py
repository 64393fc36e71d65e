"""The optimizers, which skip a step on the device, and the schedule of the learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from pathline.core.errors import ConfigurationError
from pathline.core.sections import Optim
from pathline.training.network import local

__all__ = ["Optimizers", "learning_rate", "matrices_of_blocks"]


class Optimizers:
    """AdamW, or Muon for the matrices of the blocks and AdamW for the rest, as one.

    Moments are made at once, zero, so that a checkpoint of any step holds the same names.

    Args:
        network: on its device, and cut up already if it will be.
        settings: which optimizer, and its numbers.

    Raises:
        ConfigurationError: muon for a network without a matrix in a block.

    Attributes:
        parameters: the trainable ones, in the network's order.
        all: one torch optimizer, or Muon's after AdamW's.
    """

    def __init__(self, network: nn.Module, settings: Optim) -> None:
        self._names = {p: name for name, p in network.named_parameters() if p.requires_grad}
        self.parameters = list(self._names)
        matrices = matrices_of_blocks(network) if settings.name == "muon" else set()
        orthogonal = [p for p in self.parameters if p in matrices]
        others = [p for p in self.parameters if p not in matrices]
        self.all: list[Optimizer] = [_adamw(network, others, settings)] if others else []
        self._states = [(group, _states(self.all[0], group)) for group in self.all[0].param_groups] if others else []
        self._muon = _muon(orthogonal, settings) if settings.name == "muon" else None
        if self._muon is not None:
            self.all.append(self._muon)
            momenta = [self._muon.state[p]["momentum_buffer"] for p in orthogonal]
            self._undone = [local(tensor) for tensor in (*orthogonal, *momenta)]

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = lr

    @torch.no_grad()
    def step(self, kept: Tensor) -> None:
        """Take a step, or none; the host never waits to know which.

        Muon's matrices and momenta are copied before, and taken back where the step is skipped.

        Args:
            kept: 0-dimensional, float32, on the device: 1 takes the step; 0 changes no bit of parameters and moments,
                whatever the gradients hold.
        """
        skipped = 1 - kept
        for group, states in self._states:
            _adamw_step(group, states, skipped)
        if self._muon is not None:
            before = [tensor.clone() for tensor in self._undone]
            self._muon.step()
            taken = kept.bool()
            for tensor, old in zip(self._undone, before, strict=True):
                torch.where(taken, tensor, old, out=tensor)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the live moments and step counts by name, as ``head.weight.exp_avg``."""
        states = [(name, opt.state[p]) for p, name in self._names.items() for opt in self.all if p in opt.state]
        return {f"{name}.{key}": value for name, state in states for key, value in state.items()}


def _adamw(network: nn.Module, parameters: list[nn.Parameter], settings: Optim) -> AdamW:
    """Return fused AdamW; what is not decayed is a group of its own."""
    tables = {module.weight for module in network.modules() if isinstance(module, nn.Embedding)}
    spared = settings.weight_decay > 0 and settings.decay == "matrices"
    bare = [p for p in parameters if spared and (p.ndim < 2 or p in tables)]
    decayed = [p for p in parameters if not spared or (p.ndim >= 2 and p not in tables)]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": bare, "weight_decay": 0.0}]
    optimizer = AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    for p in parameters:
        optimizer.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer


def _states(optimizer: Optimizer, group: dict[str, Any]) -> list[tuple[Tensor, ...]]:
    """Return parameter, moments and step count of each parameter of a group."""
    held = [(p, optimizer.state[p]) for p in group["params"]]
    return [(p, state["exp_avg"], state["exp_avg_sq"], state["step"]) for p, state in held]


def _adamw_step(group: dict[str, Any], states: list[tuple[Tensor, ...]], skipped: Tensor) -> None:
    """Take AdamW's fused step as torch does, without sorting the tensors by device and type each time.

    The sorting takes longer than the rest of the step of a small network.
    """
    trained = [state for state in states if state[0].grad is not None]
    if not trained:
        return
    parameters, means, squares, counts = map(list, zip(*trained, strict=True))
    torch._foreach_add_(counts, 1)
    torch._fused_adamw_(
        parameters,
        [p.grad for p in parameters],
        means,
        squares,
        [],
        counts,
        amsgrad=False,
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
        found_inf=skipped,
    )
    torch._foreach_sub_(counts, [skipped] * len(counts))


def _muon(parameters: list[nn.Parameter], settings: Optim) -> Optimizer:
    """Return Muon, its update scaled to the size of AdamW's (arXiv:2502.16982, 2.2)."""
    if not parameters:
        raise ConfigurationError(
            "optim.name: got muon for a network without a weight of nn.Linear in an nn.ModuleList; use adamw"
        )
    optimizer = torch.optim.Muon(
        parameters,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        momentum=settings.muon_momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    for p in parameters:
        optimizer.state[p] = {"momentum_buffer": torch.zeros_like(p)}
    return optimizer


def matrices_of_blocks(network: nn.Module) -> set[Tensor]:
    """Return the weights of linear layers inside the network's lists of modules."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    inside = (module for blocks in lists for module in blocks.modules())
    return {module.weight for module in inside if isinstance(module, nn.Linear)}


def learning_rate(settings: Optim, step: int, steps: int) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up, then constant or half a cosine.

    It is a function of the step alone, so that there is nothing to save. The cosine goes from ``lr`` to
    ``final_lr_fraction``·``lr``, which it would reach one step after the last.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    progress = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    share = settings.final_lr_fraction + (1 - settings.final_lr_fraction) * 0.5 * (
        1 + math.cos(math.pi * min(1.0, progress))
    )
    return settings.lr * share
