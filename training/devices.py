"""Devices and processes: Fabric as configured, and what processes agree on among themselves, on the host."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from lightning_fabric.strategies.strategy import Strategy
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from pathline.core.errors import ConfigurationError, PathlineError, ProcessError
from pathline.core.sections import Train
from pathline.training.network import shard

__all__ = ["Agreement", "check_machine", "garbage_on_schedule", "launch", "losses_named", "make_fabric"]

T = TypeVar("T")
PRECISIONS: dict[str, Literal["32-true", "bf16-mixed", "16-mixed"]] = {
    "fp32": "32-true",
    "bf16": "bf16-mixed",
    "fp16": "16-mixed",
}


def check_machine(train: Train) -> None:
    """Check that this machine can train as configured; a model can be read and sampled from on any other.

    Raises:
        ConfigurationError: fp16 without a CUDA device (Fabric would silently take bf16), or too few devices.
    """
    cuda = torch.cuda.device_count() if train.accelerator in ("auto", "cuda") else 0
    if train.precision == "fp16" and not cuda:
        raise ConfigurationError("train.precision: got fp16 without a CUDA device, expected fp32 or bf16 there")
    if cuda < train.devices and (train.accelerator == "cuda" or cuda):
        raise ConfigurationError(f"train.devices: got {train.devices}, of {cuda} CUDA devices; set train.devices lower")


def make_fabric(train: Train) -> Fabric:
    """Return Fabric for the configured devices, strategy and precision, not launched; raises as ``check_machine``."""
    check_machine(train)
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    torch.set_float32_matmul_precision("high" if train.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = train.tf32
    try:
        return Fabric(
            accelerator=train.accelerator,
            devices=train.devices,
            num_nodes=train.num_nodes,
            strategy=_strategy(train),
            precision=PRECISIONS[train.precision],
        )
    except (RuntimeError, ValueError, MisconfigurationException) as error:
        raise ConfigurationError(
            f"train.accelerator: got {train.accelerator}, of which Fabric says: {error}"
        ) from error


def launch(fabric: Fabric) -> None:
    """Start the other processes, or join those that ``torchrun`` started.

    Raises:
        ConfigurationError: another number of processes than the configuration says.
        ProcessError: the others did not come in time.
    """
    try:
        fabric.launch()
    except (ValueError, MisconfigurationException) as error:
        raise ConfigurationError(f"train.devices: {error}") from error
    except dist.DistError as error:
        raise ProcessError(f"got no contact with the other processes: {error}; start all of them") from error


def _strategy(train: Train) -> str | Strategy:
    workers, timeout = train.devices * train.num_nodes, timedelta(seconds=train.timeout)
    if workers == 1:
        return "auto"
    if train.strategy == "fsdp":
        return ModelParallelStrategy(_shard, data_parallel_size=workers, tensor_parallel_size=1, timeout=timeout)
    # gradients are views into what is reduced, so that there is no copy of them; buffers are the same in all processes
    options: dict[str, Any] = {"gradient_as_bucket_view": True}
    known = inspect.signature(DistributedDataParallel).parameters
    options["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False  # by version
    return DDPStrategy(timeout=timeout, **options)


def _shard(network: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return shard(network, mesh["data_parallel"])


@contextmanager
def garbage_on_schedule() -> Iterator[None]:
    """Let Python collect garbage only when told to: by itself, each process would pause at times of its own."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Agreement:
    """What all processes agree on, over a group of their own between the hosts: no device is waited for.

    Args:
        fabric: launched.
        timeout: seconds to wait for the others.

    Attributes:
        group: of the processes, on gloo; None for one process.
    """

    def __init__(self, fabric: Fabric, timeout: float) -> None:
        self._first = fabric.is_global_zero
        self.group: Any = None
        if fabric.world_size > 1:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def largest(self, value: int) -> int:
        """Return the largest of all processes' values."""
        if self.group is None:
            return value
        return int(self._reduced(torch.tensor([value]))[0])

    def same(self, value: int) -> bool:
        """Whether all processes hold this value."""
        if self.group is None:
            return True
        high, low = self._reduced(torch.tensor([value, -value])).tolist()
        return bool(high == -low)

    def gather(self, values: Tensor) -> Tensor:
        """Return the values (N, …) of all processes, of one shape, one process after the other."""
        if self.group is None:
            return values
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size(self.group))]
        self._guarded(lambda: dist.all_gather(parts, values.contiguous(), group=self.group))
        return torch.cat(parts)

    def first(self, make: Callable[[], T]) -> T:
        """Call a function in the first process alone, and return to all what it returns, or raise what it raises.

        Raises:
            PathlineError, OSError: as the function does; in the other processes with the same words.
        """
        if self.group is None:
            return make()
        outcome: list[Any] = [None, None]
        if self._first:
            try:
                outcome[0] = make()
            except (PathlineError, OSError) as error:
                outcome[1] = error
        self._guarded(lambda: dist.broadcast_object_list(outcome, src=0, group=self.group))
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]  # type: ignore[no-any-return]  # as broadcast

    def collect(self, content: bytes) -> list[bytes]:
        """Return the bytes of all processes, in their order, in the first one; nothing in the others."""
        if self.group is None:
            return [content]
        sizes = self.gather(torch.tensor([len(content)])).tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else 0
        parts = [torch.empty_like(padded) for _ in sizes] if self._first else None
        self._guarded(lambda: dist.gather(padded, parts, dst=0, group=self.group))
        return [part[:size].numpy().tobytes() for part, size in zip(parts or (), sizes, strict=False)]

    def wait(self) -> None:
        """Wait for all processes."""
        self.largest(0)

    def _reduced(self, values: Tensor) -> Tensor:
        self._guarded(lambda: dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group))
        return values

    @staticmethod
    def _guarded(call: Callable[[], Any]) -> None:
        try:
            call()
        except RuntimeError as error:  # what gloo raises of a process that is gone, or silent for too long
            raise _lost(error) from error


@contextmanager
def losses_named() -> Iterator[None]:
    """Turn what torch raises, as in the backward pass, of a process that is gone or silent into ProcessError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, ProcessError) or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise _lost(error) from error


def _lost(error: RuntimeError) -> ProcessError:
    return ProcessError(
        f"lost contact with another process ({str(error).splitlines()[0]}); look at its last words, then go on with "
        "--resume auto"
    )
