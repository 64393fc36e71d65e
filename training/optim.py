"""The optimizer and its schedule."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import AdamW

from pathline.core.sections import Optim

__all__ = ["build_optimizer", "learning_rate"]


def build_optimizer(network: nn.Module, settings: Optim) -> AdamW:
    """Return fused AdamW over the network's trainable parameters, its moments zero.

    AdamW itself would make them at the first step; made here, a checkpoint of any step holds the same names.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = AdamW(
        parameters,
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
