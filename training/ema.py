"""Averages of weights over training, in float32, several at once, updated on the device."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pathline.core.errors import InputError, UnknownNameError, suggest
from pathline.core.sections import Ema
from pathline.training.network import local

__all__ = ["Averages", "exponent"]


class Averages:
    """Copies of a network whose weights follow the trained ones; one samples with them.

    At the n-th update, from 1, each moves by a weight w towards the trained weights: p ← p + w·(trained − p). The track
    ``ema`` has w = max(1 − decay, 9/(n + 9)), which is a decay of min(decay, (1 + i)/(10 + i)) at i = n − 1; a track of
    relative width σ has w = 1 − (1 − 1/n)^(γ + 1), which weighs the weights of update m by ∫ t^γ dt from m − 1 to m
    (arXiv:2312.02696, 3.1). The first update of such a track forgets what it held.

    Args:
        network: bare; it may still lie on the host, and its weights need not be the first ones yet.
        settings: which averages.

    Attributes:
        tracks: the averaged copies by name, in evaluation mode; what moves the network or cuts it up has to do the
            same to them, and then to call ``follow``.
        updates: number of updates taken, 0-dimensional, on the device.
    """

    def __init__(self, network: nn.Module, settings: Ema) -> None:
        self.settings = settings
        self.tracks: dict[str, nn.Module] = {
            name: deepcopy(network).float().eval().requires_grad_(False) for name in settings.names
        }
        self.updates = torch.zeros(())
        self.follow(network)

    @torch.no_grad()
    def follow(self, network: nn.Module) -> None:
        """Bind the trained tensors, after network and tracks have come to their device, or have been cut up.

        The count stays.

        Raises:
            InputError: its parameters have other names or shapes than the tracks'.
        """
        trained = {name: local(p) for name, p in network.named_parameters()}
        self._trained = list(trained.values())
        self._float32 = all(p.dtype == torch.float32 for p in self._trained)
        self._averaged = [self._paired(track, trained) for track in self.tracks.values()]
        self._buffers = [
            (averaged, buffer)
            for track in self.tracks.values()
            for averaged, buffer in zip(track.buffers(), network.buffers(), strict=True)
        ]
        device = self._trained[0].device
        wide = torch.float32 if device.type == "mps" else torch.float64  # which has none wider
        self.updates = self.updates.to(device, wide)
        exponents = [exponent(length) + 1 for length in self.settings.lengths]
        self._exponents = torch.tensor(exponents, dtype=wide, device=device)
        self._least = None if self.settings.decay is None else torch.tensor(1 - self.settings.decay, device=device)

    def _paired(self, track: nn.Module, trained: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the averaged tensors in the order of the trained ones; the fused update checks no shapes."""
        averaged = {name: local(p) for name, p in track.named_parameters()}
        ours, theirs = ({(name, *p.shape) for name, p in each.items()} for each in (averaged, trained))
        if ours != theirs:
            different = ", ".join(sorted({f"{name} {tuple(shape)}" for name, *shape in ours ^ theirs})[:4])
            raise InputError(
                f"got a network whose parameters differ from those of its averages in {different}; follow the network "
                "that they are copies of, without a wrapper, and cut all up alike"
            )
        return [averaged[name] for name in trained]

    @torch.no_grad()
    def update(self, kept: Tensor) -> None:
        """Move every track towards the trained weights and copy the buffers, or leave all as it is.

        The host never waits to know which.

        Args:
            kept: 0-dimensional, float32, on the device: 1 updates; 0 changes nothing, the count included.
        """
        self.updates += kept
        trained = self._trained if self._float32 else [p.float() for p in self._trained]
        skipped = 1 - kept
        for averaged, weight in zip(self._averaged, self._weights(), strict=True):
            # a step of gradient descent on |p − trained|²/2 is p − w·(p − trained), in one kernel that can be skipped
            torch._fused_sgd_(
                averaged,
                trained,
                [],
                weight_decay=1.0,
                momentum=0.0,
                lr=weight,
                dampening=0.0,
                nesterov=False,
                maximize=True,
                is_first_step=False,
                found_inf=skipped,
            )
        taken = kept.bool()
        for copy, buffer in self._buffers:
            torch.where(taken, buffer.to(copy.dtype), copy, out=copy)

    def _weights(self) -> list[Tensor]:
        """Return the weight of the trained weights in each track at the present update."""
        weights: list[Tensor] = []
        if self._least is not None:
            weights.append(
                (9 / (self.updates + 9)).float().maximum(self._least) if self.settings.warmup else self._least
            )
        if len(self._exponents):  # 1 − (1 − 1/n)^(γ + 1) without cancellation
            powers = torch.log1p(-1 / self.updates).mul(self._exponents).expm1().neg().float()
            weights += powers.unbind()
        return weights

    def network(self, name: str | None = None) -> nn.Module:
        """Return the averaged network of a name; None is the first.

        Raises:
            UnknownNameError: there is none of this name, or none at all.
        """
        if not self.tracks:
            raise UnknownNameError("got a run without averages; set ema.decay or ema.lengths")
        name = next(iter(self.tracks)) if name is None else name
        if name not in self.tracks:
            raise UnknownNameError(f"got average {name!r}, {suggest(name, self.tracks)}")
        return self.tracks[name]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the live tensors of each track."""
        return {name: track.state_dict() for name, track in self.tracks.items()}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs besides the tensors; waits for the device."""
        return {"updates": int(self.updates.item())}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the count of a checkpoint, whose tensors have been copied into the tracks."""
        self.updates.fill_(int(state["updates"]))


def exponent(length: float) -> float:
    """Return γ of the average of relative width σ, whose weights are ~ t^γ.

    The width is the standard deviation of t under these weights over the averaged time: σ² = (γ + 1)/((γ + 2)²(γ + 3));
    γ is the largest root of γ³ + 7γ² + (16 − σ⁻²)γ + 12 − σ⁻² (arXiv:2312.02696, appendix C).
    """
    square = float(length) ** -2
    return float(np.roots([1.0, 7.0, 16.0 - square, 12.0 - square]).real.max())
