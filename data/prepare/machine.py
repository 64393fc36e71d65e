"""The processes that prepare data, and how they compute: the same bits on every machine of a kind."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.utilities.exceptions import MisconfigurationException

from pathline.core.errors import ConfigurationError, ProcessError

__all__ = ["cores", "launched", "settle", "terminated_as_interrupted"]


def settle(device: torch.device) -> None:
    """Let networks give the same bits on every process and machine of a kind."""
    if device.type == "cpu":
        torch.set_num_threads(1)  # sums are cut up by threads; --devices brings more cores to work
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Take SIGTERM, which a cluster sends, as Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():  # handlers can be set nowhere else
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def launched(devices: int, accelerator: str) -> Fabric:
    """Return Fabric with the processes that were asked for, or those that ``torchrun`` started.

    Raises:
        ConfigurationError: there are no such devices.
        ProcessError: the others did not come.
    """
    nodes = 1
    if TorchElasticEnvironment.detect():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    # processes only wait for one another, by way of the hosts: for as long as the slowest one takes
    several = DDPStrategy(process_group_backend="gloo", timeout=timedelta(days=7))
    try:
        strategy = several if devices * nodes > 1 else "auto"
        fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=nodes, strategy=strategy)
        _launch(fabric)
    except (ValueError, MisconfigurationException) as error:
        raise ConfigurationError(
            f"got --devices {devices} --accelerator {accelerator}, of which Fabric says: {error}"
        ) from error
    except RuntimeError as error:
        raise ProcessError(f"got no contact with the other processes: {error}; start all of them") from error
    return fabric


def _launch(fabric: Fabric) -> None:
    try:
        fabric.launch()
    except BaseException:  # processes that were started wait for this one, for as long as they may
        for child in getattr(fabric.strategy.launcher, "procs", []):
            child.terminate()
        raise
