"""A small flow of the digits, trained in half a minute: what the other examples start from."""

from __future__ import annotations

import torch

from pathline import Draws, Flow, backbones, data, interpolants, objectives
from pathline.solvers.likelihood import Dequantization


def train(steps: int, dequantization: Dequantization | None = None, batch: int = 32) -> Flow:
    """Train a small transformer on digits and their labels; with a dequantization on levels filled up with noise."""
    torch.manual_seed(0)
    interpolant = interpolants.build("linear")
    backbone = backbones.build(
        "sit", input_size=8, patch_size=2, in_channels=1, hidden_size=48, depth=2, num_heads=4, num_classes=10
    )
    objective = objectives.build("velocity", interpolant=interpolant)
    optimizer = torch.optim.Adam(backbone.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step, images in enumerate(data.build("digits", split="train").batches(batch, steps=steps, seed=0)):
        ids, x = range(step * batch, (step + 1) * batch), images["data"]
        x = x if dequantization is None else dequantization.apply(x, 0, ids)
        loss = objective(backbone, x, Draws(0).at(ids), label=images["label"])
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        schedule.step()
    return Flow(backbone.eval(), interpolant)
