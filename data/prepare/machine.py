"""The processes that prepare data, and how they compute: the same bits on every machine of a kind."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.utilities.exceptions import MisconfigurationException

from pathline.core.errors import ConfigurationError, ProcessError

__all__ = ["launched", "settle"]


def settle(device: torch.device) -> None:
    """Let networks give the same bits on every process and machine of a kind."""
    if device.type == "cpu":
        torch.set_num_threads(1)  # sums are cut up by threads; --devices brings more cores to work
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True


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
        fabric.launch()
    except (ValueError, MisconfigurationException) as error:
        raise ConfigurationError(
            f"got --devices {devices} --accelerator {accelerator}, of which Fabric says: {error}"
        ) from error
    except RuntimeError as error:
        raise ProcessError(f"got no contact with the other processes: {error}; start all of them") from error
    return fabric
