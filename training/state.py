"""All that a resume needs: counters, weights, their averages, the optimizer, the loss scale, the open log window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from pathline import __version__
from pathline.core.config import resolve
from pathline.core.errors import CheckpointError
from pathline.training import checkpoints, sharded
from pathline.training.checkpoints import Snapshot, check_tensors
from pathline.training.described import Described, samples_of
from pathline.training.devices import Agreement
from pathline.training.ema import Averages
from pathline.training.exported import read_weights
from pathline.training.guard import Guard
from pathline.training.latents import changes_of_samples
from pathline.training.loading import Loader, Stream
from pathline.training.manifest import parse
from pathline.training.network import checkpoint_activations, compile_units, shard
from pathline.training.optim import Optimizers
from pathline.training.parts import Parts
from pathline.training.same_run import check_same_run
from pathline.training.window import Window

__all__ = ["State", "load_weights"]

COUNTERS = ("step", "passed", "skipped", "streak", "rollbacks", "rolled_to")
MAPPINGS = ("scaler", "guard", "averages", "window", "configuration", "data")
SCALARS: dict[str, type] = {**dict.fromkeys(COUNTERS, int), **dict.fromkeys(MAPPINGS, dict), "encoders": list}


class State:
    """A run in memory. Randomness has no state here: it is a function of seed and position.

    Args:
        parts: what the configuration names; the backbone moves to the device.
        fabric: launched.
        agreement: of the processes.

    Attributes:
        step: optimizer steps tried so far, skipped ones included.
        passed: batches that roll-backs left behind: they are not seen again.
        skipped: steps skipped up to the last row of the log.
        streak: skipped steps in a row up to the last row of the log, those of a shrinking loss scale aside.
        rollbacks: roll-backs in a row to the same checkpoint.
        rolled_to: step of that checkpoint.
        module: the network as one calls it in training.
        network: the network itself.
        loader: of the batches.
    """

    def __init__(self, parts: Parts, fabric: Fabric, agreement: Agreement) -> None:
        configuration = parts.configuration
        train = configuration.train
        self.parts, self.fabric, self.agreement = parts, fabric, agreement
        self.step = self.passed = self.skipped = self.streak = self.rollbacks = self.rolled_to = 0
        self.network: nn.Module = parts.backbone.train()
        self.averages = Averages(self.network, configuration.ema)  # of the bare network
        if train.activation_checkpointing != "none":
            checkpoint_activations(self.network, train.activation_checkpointing)
        if train.compile:
            compile_units(self.network)
        self.module: _FabricModule = fabric.setup_module(self.network)
        for track in self.averages.tracks.values():
            track.to(fabric.device)
            if train.strategy == "fsdp":
                mesh = fabric.strategy.device_mesh["data_parallel"]  # type: ignore[attr-defined]  # of fsdp
                shard(track, mesh, trained=False)
        self.averages.follow(self.network)
        for source in parts.encoders:
            source.to(fabric.device)
        self.optimizers = Optimizers(self.network, configuration.optim)
        self.guard = Guard(fabric.device, configuration.guard)
        self.window = Window(fabric, agreement, configuration.log.time_bins)
        share = train.global_batch // fabric.world_size
        stream = Stream(train.seed, train.global_batch, share, train.micro_batch or share, fabric.global_rank)
        self.loader = Loader(parts.dataset, stream, fabric.device)
        self._described: dict[str, Any] | None = None

    @property
    def position(self) -> int:
        """Samples used so far: the next one's place in the training stream."""
        return (self.step + self.passed) * self.parts.configuration.train.global_batch

    @property
    def bytes(self) -> int:
        """Size of a checkpoint."""
        return sum(t.numel() * t.element_size() for group in self.tensors().values() for t in group.values())

    def describe(self) -> dict[str, Any]:
        """Return what the data set tells of itself; the first call, of all processes, may take a pass over all values.

        The first process alone looks, once, and tells the others.
        """
        if self._described is None:
            dataset = self.parts.dataset
            self._described = {
                "data": self.agreement.first(lambda: dataset.manifest),
                "statistics": self.agreement.first(lambda: dataset.statistics),
                "samples": samples_of(dataset),
            }
        return self._described

    def snapshot(self) -> Snapshot:
        """Return the live tensors and the scalars of a checkpoint, the window having been read."""
        scalars = {
            "version": __version__,
            **{name: getattr(self, name) for name in COUNTERS},
            "position": self.position,
            "good": not self.streak_now,
            "scaler": self.fabric.strategy.precision.state_dict(),
            "guard": self.guard.state(),
            "averages": self.averages.state(),
            "window": self.window.state(),
            "world_size": self.fabric.world_size,
            "configuration": self.parts.configuration.model_dump(mode="json"),
            **self.describe(),
            "encoders": [dict(source.manifest) for source in self.parts.encoders],
        }
        return Snapshot(self.tensors(), scalars)

    @property
    def streak_now(self) -> int:
        """Length of the streak of skipped steps, up to the last step that the window has read."""
        streak = self.streak
        for record in self.window.records:
            streak = 0 if not record.reason else streak + (record.reason != "overflow")
        return streak

    def close_window(self) -> None:
        """Count the window's skipped steps, and begin a new one."""
        self.skipped += sum(bool(record.reason) for record in self.window.records)
        self.streak = self.streak_now
        self.window.clear()

    def restore(self, path: Path, allow: Sequence[str] = ()) -> None:
        """Go on from a checkpoint; everything is checked before anything is written.

        Args:
            path: of the checkpoint.
            allow: entries of the configuration that may differ from the checkpoint's, as ``optim.lr``; ``data`` is
                also what the data set tells of itself.

        Raises:
            CheckpointError: it is damaged, of another configuration or data set, or of another network.
        """
        saved = self.agreement.first(lambda: checkpoints.read_state(path))  # one process verifies all hashes
        saved.setdefault("encoders", [])  # which older checkpoints do not have
        wrong = [name for name, kind in SCALARS.items() if not isinstance(saved.get(name), kind)]
        if "encoders" not in wrong and not all(isinstance(manifest, dict) for manifest in saved["encoders"]):
            wrong.append("encoders")
        if wrong:
            raise CheckpointError(f"got {path} without a usable {', '.join(wrong)}; use another checkpoint")
        check_same_run(saved, self.parts, self.describe(), path, allow)
        self._check_scalars(saved, path)
        ours = self.tensors()
        theirs = {name: _read(path, name, tensors, self.agreement) for name, tensors in ours.items()}
        with torch.no_grad():
            for name, tensors in ours.items():
                for key, tensor in tensors.items():
                    tensor.copy_(theirs[name][key])
        for name in COUNTERS:
            setattr(self, name, int(saved[name]))
        self.fabric.strategy.precision.load_state_dict(saved["scaler"])
        self.guard.restore(saved["guard"])
        self.averages.restore(saved["averages"])
        self.window.restore(saved["window"])

    def _check_scalars(self, saved: Mapping[str, Any], path: Path) -> None:
        """Restore what is no tensor into objects that nobody keeps."""
        settings = self.parts.configuration
        try:
            Guard(self.fabric.device, settings.guard).restore(saved["guard"])
            Window(self.fabric, self.agreement, settings.log.time_bins).restore(saved["window"])
            int(saved["averages"]["updates"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"got {path} with scalars that cannot be ({error!r}); use another one") from error

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the live tensors by group and name."""
        return {"model": self.network.state_dict(), "optim": self.optimizers.tensors(), **self.averages.tensors()}

    def fingerprint(self) -> int:
        """Return a number that is equal in two processes if their weights are, bit for bit; reads the device."""
        sums = [p.detach().view(torch.int32).sum(dtype=torch.int64) for p in self.network.parameters()]
        weights = torch.arange(1, len(sums) + 1, device=self.fabric.device)
        return int((torch.stack(sums) * weights).sum()) % 2**62


def _read(path: Path, group: str, ours: Mapping[str, Tensor], agreement: Agreement) -> Mapping[str, Tensor]:
    """Return a group of a checkpoint, sharded as ours is, after its names, shapes and types are checked."""
    if not sharded.is_sharded(ours):
        theirs = checkpoints.read_group(path, group)
        check_tensors(ours, theirs, f"{group} tensors in {path}")
        return theirs
    return sharded.read_into(path / group, ours, agreement.group)


def load_weights(state: State, path: Path) -> None:
    """Start from weights: a safetensors file in our layout, or the averaged weights of a checkpoint or a run.

    Where these tell of their data, they have to be of the same kind: pixels, or latents of the same autoencoder. Shape
    and classes are the network's to refuse.

    Raises:
        CheckpointError: nothing there, damaged, of another network, or of a model of other latents.
    """
    if path.suffix == ".safetensors" and path.is_file():
        weights: Mapping[str, Tensor] = read_weights(path)
        saved = parse(path.with_suffix(".json")) if path.with_suffix(".json").is_file() else {}
    else:
        checkpoint = checkpoints.find(path)
        saved = checkpoints.read_state(checkpoint)
        weights = checkpoints.read_group(checkpoint, resolve(saved["configuration"]).ema.names[0])
    changed = changes_of_samples(Described(saved, path), state.parts.dataset, shaped=()) if "samples" in saved else []
    if changed:
        raise CheckpointError(
            f"got train.initialize_from {path}, a model of other data than this run's ({'; '.join(changed)}); give one "
            "of the same, or its weights alone in a safetensors file, without the JSON file that tells of them"
        )
    check_tensors(state.network.state_dict(), weights, f"weights in {path}")
    with torch.no_grad():
        for network in (state.network, *state.averages.tracks.values()):
            for key, tensor in network.state_dict().items():
                _fill(tensor, weights[key])


def _fill(tensor: Tensor, values: Tensor) -> None:
    """Write values, or this process's part of them."""
    if isinstance(tensor, DTensor):
        values = distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements)
    tensor.copy_(values)
