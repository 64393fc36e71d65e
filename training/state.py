"""All that a resume needs: counters, weights, their average, the optimizer, the loss scale, the open log window."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricModule
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pathline import __version__
from pathline.core.config import Configuration, differences, resolve
from pathline.core.errors import CheckpointError
from pathline.training import checkpoints
from pathline.training.checkpoints import Snapshot, check_tensors
from pathline.training.ema import Average
from pathline.training.optim import build_optimizer
from pathline.training.parts import Parts
from pathline.training.window import Window

__all__ = ["State", "check_same_run", "load_weights"]

# what may change between a checkpoint and the run that goes on from it: nothing that moves a weight but by rounding
FREE = (
    "train.stop_at train.folder train.threads train.accelerator train.devices train.num_nodes "
    "train.micro_batch train.initialize_from log. checkpoint. solver. guidance sample."
).split()


class State:
    """A run in memory. Randomness has no state here: it is a function of seed and position.

    Args:
        parts: what the configuration names; the backbone moves to the device.
        fabric: launched.

    Attributes:
        step: optimizer steps tried so far, skipped ones included.
        skipped: steps skipped up to the last row of the log, their gradients not finite.
        module: the network as one calls it in training.
        network: the network itself.
    """

    def __init__(self, parts: Parts, fabric: Fabric) -> None:
        configuration = parts.configuration
        self.parts, self.fabric = parts, fabric
        self.step = self.skipped = 0
        self.network: nn.Module = parts.backbone.train()
        self.module: _FabricModule = fabric.setup_module(self.network)
        self.average = Average(self.network, configuration.ema)  # after every rank has the first one's weights
        self.optimizer = build_optimizer(self.network, configuration.optim)
        self.window = Window(fabric.device, configuration.log.time_bins)

    @property
    def position(self) -> int:
        """Samples used so far: the next one's place in the training stream."""
        return self.step * self.parts.configuration.train.global_batch

    def snapshot(self) -> Snapshot:
        """Return the tensors and scalars of a checkpoint; every process must call this."""
        scalars = {
            "version": __version__,
            "position": self.position,
            "skipped": self.skipped,
            "scaler": self.fabric.strategy.precision.state_dict(),
            "window": self.window.state(self.fabric),
            "configuration": self.parts.configuration.model_dump(mode="json"),
            "data": self.parts.dataset.manifest,
        }
        return Snapshot(self._tensors(), scalars)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint; everything is checked before anything is written.

        Raises:
            CheckpointError: it is damaged, of another configuration or data set, or of another network.
        """
        saved = checkpoints.read(path)
        check_same_run(saved.state, self.parts, path)
        ours = self._tensors()
        for name, tensors in ours.items():
            check_tensors(tensors, saved.tensors.get(name, {}), f"{name} tensors in {path}")
        with torch.no_grad():
            for name, tensors in ours.items():
                for key, tensor in tensors.items():
                    tensor.copy_(saved.tensors[name][key])
        self.step, self.skipped = int(saved.state["step"]), int(saved.state["skipped"])
        self.fabric.strategy.precision.load_state_dict(saved.state["scaler"])
        self.window.restore(saved.state["window"])

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        moments = {
            f"{name}.{key}": value
            for name, parameter in self.network.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        return {"model": self.network.state_dict(), "ema": self.average.network.state_dict(), "optim": moments}


def check_same_run(saved: Mapping[str, Any], parts: Parts, path: Path) -> None:
    """Raise CheckpointError if the checkpoint's configuration or data differ in what the weights depend on."""
    before: Configuration = resolve(saved["configuration"])
    constant = parts.configuration.optim.schedule == "constant"  # only then is a longer run the same so far
    free = (*FREE, "train.steps") if constant else tuple(FREE)
    changed = [line for line in differences(before, parts.configuration) if not line.startswith(free)]
    manifest = parts.dataset.manifest
    changed += [
        f"the data's {key}: {saved['data'].get(key)!r} -> {manifest.get(key)!r}"
        for key in sorted(saved["data"].keys() | manifest.keys())
        if saved["data"].get(key) != manifest.get(key)
    ]
    if changed:
        raise CheckpointError(
            f"got {path} of another configuration; give these back their values, or start anew in another "
            "train.folder:\n  " + "\n  ".join(changed)
        )


def load_weights(state: State, path: Path) -> None:
    """Start from weights: a safetensors file in our layout, or the averaged weights of a checkpoint or a run.

    Raises:
        CheckpointError: nothing there, damaged, or of another network.
    """
    if path.suffix == ".safetensors" and path.is_file():
        try:
            weights: Mapping[str, Tensor] = load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"got {path}, which is no safetensors file: {error}") from error
    else:
        weights = checkpoints.read(checkpoints.find(path)).tensors["ema"]
    check_tensors(state.network.state_dict(), weights, f"weights in {path}")
    state.network.load_state_dict(dict(weights))
    state.average.network.load_state_dict(dict(weights))
