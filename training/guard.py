"""Whether a step is taken or skipped: decided on the device, without reading it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pathline.core.sections import Guard as Settings

__all__ = ["Guard", "clipped_norm", "reason"]

HORIZON = 100  # steps over which the means of the loss run, and before which no jump is looked for
LARGEST = torch.finfo(torch.float32).max  # all but NaN and infinity are below


class Guard:
    """Decides over steps by their numbers, and follows the loss of those taken.

    It is done by a few tiny kernels on the device, alike in every process, since what they see is alike.

    Args:
        device: where the numbers lie.
        settings: how high a loss counts as a jump.
    """

    def __init__(self, device: torch.device, settings: Settings) -> None:
        self._follows = settings.spike is not None
        self._factors = torch.tensor([1.0, settings.spike or 0.0], device=device)
        self._bounds = torch.tensor([LARGEST, LARGEST, 0.0], device=device)
        self._bound = self._bounds[0]  # of the loss; a view
        self._means = torch.zeros(2, device=device)  # of the loss and of its size
        self._taken = torch.zeros((), device=device)
        self._never = torch.tensor(LARGEST, device=device)

    def verdict(self, loss: Tensor, norm: Tensor, unusable: Tensor) -> tuple[Tensor, Tensor]:
        """Return the three numbers as one tensor (3,), and 1 if the step is to be taken, 0 if skipped, ().

        Args:
            loss: mean over the global batch, ().
            norm: of the gradient, ().
            unusable: above 0 if values of the batch were not finite, ().
        """
        numbers = torch.stack((loss, norm, unusable))
        kept = (numbers.nan_to_num(math.inf, math.inf, math.inf) <= self._bounds).all()  # −∞ is no small loss
        if self._follows:
            self._follow(loss, kept)
        return numbers, kept.float()

    def _follow(self, loss: Tensor, kept: Tensor) -> None:
        weight = (self._taken + 1).clamp(max=HORIZON).reciprocal()
        moved = self._means.lerp(torch.stack((loss, loss.abs())), weight)
        self._means = torch.where(kept, moved, self._means)
        self._taken += kept
        bound = (self._means @ self._factors).clamp(max=LARGEST)
        torch.where(self._taken < HORIZON, self._never, bound, out=self._bound)

    def state(self) -> dict[str, Any]:
        """Return what a resume needs; reads the device."""
        return {"means": self._means.tolist(), "taken": self._taken.item(), "bound": self._bound.item()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        if state:
            self._means.copy_(torch.tensor(state["means"]))
            self._taken.fill_(state["taken"])
            self._bound.fill_(state["bound"] if self._follows else LARGEST)


def reason(numbers: Sequence[float], kept: float, scale: float | None) -> str:
    """Say why a step was skipped: data, loss, gradient, jump, or overflow of fp16; "" for a step taken.

    Args:
        numbers: loss, gradient norm, and unusable values of a verdict.
        kept: 1 for a step taken.
        scale: of the loss in fp16; as long as it can shrink, a gradient that overflows is no fault. None otherwise.
    """
    loss, norm, unusable = numbers
    if kept:
        return ""
    if unusable:
        return "data"
    if not abs(loss) <= LARGEST:
        return "loss"
    if not norm <= LARGEST:
        return "gradient" if scale is None or scale < 1 else "overflow"
    return "jump"


def clipped_norm(parameters: Sequence[Tensor], clip: float | None) -> Tensor:
    """Scale the gradients so that their norm is at most ``clip``, and return the norm before, ().

    Shards count as what they are parts of.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    # torch's own clip_grad_norm_ computes the same, but first sorts the tensors by device and type, twice
    norm: Any = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if clip is not None:
        torch._foreach_mul_(gradients, (clip / (norm + 1e-6)).clamp(max=1.0))
    return norm  # type: ignore[no-any-return]  # a tensor either way
