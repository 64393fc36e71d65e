"""The processes that draw or measure samples, one a device: what each does alone, and where they meet."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.utilities.exceptions import MisconfigurationException

from pathline.core.config import Configuration
from pathline.core.errors import ConfigurationError, DataError, PathlineError, ProcessError
from pathline.training.devices import Agreement, launch

__all__ = ["Told", "Workers", "settle"]

PATIENCE = 7 * 24 * 3600.0  # seconds: a process that is gone is told by its connection, and a slow one is waited for
T = TypeVar("T")


class Told(PathlineError):
    """Something went wrong in the first process, which says what."""


class Workers:
    """Processes that draw or measure the same samples, each some of them.

    Args:
        devices: processes to start, on as many devices; under ``torchrun`` those that it started, and no other number.
        accelerator: of the devices, as ``train.accelerator``.
        entry: what the number of devices is called, for what is wrong with it.

    Attributes:
        device: of this process.
        rank: of this process among ``count``.

    Raises:
        ConfigurationError: another number than there are, or fewer devices.
        ProcessError: the others did not come.
    """

    def __init__(self, devices: int, accelerator: str = "auto", entry: str = "sample.devices") -> None:
        world, local = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        if not torch.distributed.is_torchelastic_launched():
            world = local = devices
        elif devices not in (1, world):
            raise ConfigurationError(f"{entry}: got {devices}, and torchrun started {world}; leave it out")
        fabric = _fabric(accelerator, local, world // local, entry)
        launch(fabric)
        self.device, self.rank, self.count = fabric.device, fabric.global_rank, fabric.world_size
        self._agreement = Agreement(fabric, PATIENCE)
        environment = getattr(fabric.strategy, "cluster_environment", None)
        self._started = isinstance(environment, LightningEnvironment) and fabric.local_rank > 0
        self._parent = os.getppid()

    @property
    def orphaned(self) -> bool:
        """Whether the process that started this one is gone."""
        return self._started and os.getppid() != self._parent

    def first(self, make: Callable[[], T]) -> T:
        """Call a function in the first process alone; return to all what it returns, or raise what it raises.

        Raises:
            Told: in the other processes, in the place of what the first one raises.
        """
        try:
            return self._meet(lambda: self._agreement.first(make))
        except (PathlineError, OSError) as error:
            if self.rank and not isinstance(error, ProcessError):
                raise Told(str(error)) from error
            raise

    def every(self, make: Callable[[], T]) -> T:
        """Call a function in every process and return what it returns there; raise what it raises in any.

        Raises:
            Told: in all processes but the first, which raises in their place.
        """
        failure: PathlineError | OSError | None = None
        try:
            made = make()
        except (PathlineError, OSError) as error:
            failure = error
        if self.largest(int(failure is not None)):
            told = [words.decode() for words in self.collect(str(failure or "").encode()) if words]
            raise (failure or DataError(told[0])) if self.rank == 0 else Told(str(failure))
        return made

    def collect(self, content: bytes) -> list[bytes]:
        """Return the bytes of all processes, in their order, in the first one; nothing in the others."""
        return self._meet(lambda: self._agreement.collect(content))

    def largest(self, value: int) -> int:
        """Return the largest of all processes' values."""
        return self._meet(lambda: self._agreement.largest(value))

    def code(self, code: int) -> int:
        """Return the exit code of this process where all end alike.

        Fabric kills the first process soon after one that it started left with another code than 0.
        """
        return 0 if self._started else code

    @staticmethod
    def _meet(call: Callable[[], T]) -> T:
        try:
            return call()
        except ProcessError as error:  # whose words are training's
            raise ProcessError(
                "lost contact with another process; look at its last words, then give the same command again"
            ) from error


def settle(configuration: Configuration) -> None:
    """Set threads and the arithmetic of matrix products as the configuration says."""
    if configuration.train.threads is not None:
        torch.set_num_threads(configuration.train.threads)
    torch.set_float32_matmul_precision("high" if configuration.train.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = configuration.train.tf32


def _fabric(accelerator: str, devices: int, nodes: int, entry: str) -> Fabric:
    """Return Fabric, not launched; processes meet on the host alone."""
    cuda = torch.cuda.device_count() if accelerator in ("auto", "cuda") else 0
    if 0 < cuda < devices:
        raise ConfigurationError(f"{entry}: got {devices}, of {cuda} CUDA devices; set it lower")
    alone = devices * nodes == 1
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=PATIENCE))
    try:
        return Fabric(accelerator=accelerator, devices=devices, num_nodes=nodes, strategy="auto" if alone else strategy)
    except (RuntimeError, ValueError, MisconfigurationException) as error:
        raise ConfigurationError(
            f"got {entry} {devices} and train.accelerator {accelerator}, of which Fabric says: {error}"
        ) from error
