"""One optimizer step: micro-batches, then one commit that is taken as a whole or skipped as a whole."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pathline.data import Batch
from pathline.training.guard import clipped_norm
from pathline.training.loading import Visit
from pathline.training.optim import learning_rate
from pathline.training.state import State

__all__ = ["take_step"]


def take_step(state: State) -> None:
    """Try one optimizer step on the next global batch; the host reads no device.

    Each device takes its part of the global batch, in micro-batches whose gradients add up; gradients are reduced over
    devices once, with the last of them.
    """
    fabric, visits = state.fabric, state.loader.stream.visits(state.step + state.passed)
    ddp = state.module._forward_module
    if isinstance(ddp, DistributedDataParallel):
        ddp.reducer._rebuild_buckets()  # else when the network is called, which may be within torch.func.jvp
    parts = []  # of the loss, and of the samples that cannot be used
    for visit in visits:
        with fabric.no_backward_sync(state.module, enabled=visit != visits[-1]):
            parts.append(_accumulate(state, visit))
    sums = reduce(torch.add, parts)
    if fabric.world_size > 1:
        dist.all_reduce(sums)  # Fabric's own would first wait for the other processes, and so for the devices
        sums /= fabric.world_size
    _commit(state, visits[0].positions.start, sums)


def _accumulate(state: State, visit: Visit) -> Tensor:
    """Add the gradient of a visit's samples; return their part of the sums."""
    parts, stream = state.parts, state.loader.stream
    share = len(visit.positions) / stream.share
    with state.window.spending("data"):
        batch = state.loader.take(visit)
    # what is not finite is left out of the network and makes the guard skip the step
    data, usable = _finite(batch["data"])
    features = []
    for tokens in _encoded(state, batch):
        finite, whole = _finite(tokens)
        features.append(finite)
        usable = usable * whole
    given = parts.conditions(batch["label"])
    loss = parts.objective(_called(state), data, stream.draws(visit), features=features, **given)
    total = loss.total if share == 1 else loss.total * share
    state.fabric.backward(total)
    state.window.add_batch(loss, usable)
    return torch.stack((total.detach(), (1 - usable).sum()))


def _finite(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return values with 0 for those that are not finite, and 1 for each sample without such, (N,)."""
    finite = values.nan_to_num(0.0, 0.0, 0.0)
    return finite, (finite == values).flatten(1).all(1).float()


def _encoded(state: State, batch: Batch) -> tuple[Tensor, ...]:
    """Return the encoders' tokens, computed in the precision of the run."""
    if not state.parts.encoders:
        return ()
    with state.fabric.autocast():
        return state.parts.features(batch, state.fabric.device)


def _called(state: State) -> nn.Module:
    """Return the network as one calls it: without Fabric's wrapper where that has nothing to do but takes its time."""
    plain = state.fabric.world_size == 1 and state.parts.configuration.train.precision == "fp32"
    return state.network if plain else state.module


def _commit(state: State, first: int, sums: Tensor) -> None:
    """Clip, step, average and count: or, if a number is wrong, only count."""
    c, optimizers = state.parts.configuration, state.optimizers
    loss, unusable = sums.unbind()
    scaler: Any = getattr(state.fabric.strategy.precision, "scaler", None)
    if scaler is not None:
        for optimizer in optimizers.all:
            scaler.unscale_(optimizer)
    norm = clipped_norm(optimizers.parameters, c.optim.clip)
    numbers, kept = state.guard.verdict(loss, norm, unusable)
    optimizers.set_lr(learning_rate(c.optim, state.step, c.train.steps))
    optimizers.step(kept)
    if scaler is not None:
        scaler.update()  # by what unscaling found
    optimizers.zero_grad()
    state.averages.update(kept)
    state.step += 1
    state.window.add_step(state.step, first, numbers, kept)
