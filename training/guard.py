"""One optimizer step, or none: a gradient that is not finite changes nothing, and no device is read to know it."""

from __future__ import annotations

from lightning_fabric import Fabric
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW

__all__ = ["guarded_step"]


def guarded_step(fabric: Fabric, optimizer: AdamW, clip: float | None) -> tuple[Tensor, Tensor]:
    """Clip and step, unless the gradient's norm is not finite.

    After a data-parallel backward every rank holds the same gradient, so that all decide alike.

    Args:
        fabric: knows the precision, and with fp16 the loss scale.
        optimizer: a fused one, which skips its step on the device by ``found_inf``.
        clip: largest norm; None does not clip.

    Returns:
        The norm before clipping, and 1 if the step was taken, 0 if it was skipped; both 0-dimensional, on the device.
    """
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    if scaler is not None:
        scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters], foreach=True)
    if clip is not None:
        clip_grads_with_norm_(parameters, clip, norm, foreach=True)
    kept = norm.isfinite().float()
    if scaler is not None:  # finds what is not finite by itself
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.found_inf, optimizer.grad_scale = 1 - kept, None  # type: ignore[attr-defined]
        optimizer.step()
    return norm, kept
