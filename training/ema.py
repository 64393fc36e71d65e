"""An exponential moving average of weights, in float32."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from pathline.core.sections import Ema

__all__ = ["Average"]


class Average:
    """A copy of a network whose weights follow the trained ones slowly; it is what one samples with.

    Args:
        network: the trained network, not wrapped for data parallelism; it must hold its first weights already.
        settings: decay and warm-up.

    Attributes:
        network: the averaged copy, in evaluation mode.
    """

    def __init__(self, network: nn.Module, settings: Ema) -> None:
        self.settings = settings
        self.network = deepcopy(network).float().eval().requires_grad_(False)
        self._averaged: list[Tensor] = list(self.network.parameters())
        self._trained: list[Tensor] = list(network.parameters())
        self._buffers = list(zip(self.network.buffers(), network.buffers(), strict=True))

    def decay(self, update: int) -> float:
        """Decay at an update, counted from 0: min(decay, (1 + i)/(10 + i)) with warm-up."""
        decay = self.settings.decay
        return min(decay, (1 + update) / (10 + update)) if self.settings.warmup else decay

    @torch.no_grad()
    def update(self, update: int, kept: Tensor) -> None:
        """Move towards the trained weights.

        Args:
            update: number of the update, from 0.
            kept: 0-dimensional flag on the device: 0 leaves the average as it is, without reading the device.
        """
        weight = kept.float() * (1 - self.decay(update))
        trained = [p.detach().float() for p in self._trained]
        torch._foreach_lerp_(self._averaged, trained, [weight] * len(trained))
        for averaged, buffer in self._buffers:
            averaged.copy_(buffer)
