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
from pathline.core.config import Configuration, differences, resolve
from pathline.core.errors import CheckpointError
from pathline.core.sections import Train
from pathline.training import checkpoints, sharded
from pathline.training.checkpoints import Snapshot, check_tensors
from pathline.training.described import samples_of
from pathline.training.devices import Agreement
from pathline.training.ema import Averages
from pathline.training.exported import read_weights
from pathline.training.guard import Guard
from pathline.training.loading import Loader, Stream
from pathline.training.network import checkpoint_activations, compile_units, shard
from pathline.training.optim import Optimizers
from pathline.training.parts import Parts
from pathline.training.window import Window

__all__ = ["State", "check_same_run", "load_weights"]

# what may change between a checkpoint and the run that goes on from it: nothing that moves a weight but by rounding
FREE = (
    "train.stop_at train.folder train.threads train.accelerator train.devices train.num_nodes train.strategy "
    "train.micro_batch train.initialize_from train.activation_checkpointing train.compile train.timeout "
    "train.collect_garbage_every guard.rollback_after guard.max_rollbacks ema.snapshot_every "
    "log. checkpoint. solver. guidance sample. autoencoder evaluation."
).split()
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
        check_same_run(saved, self.parts, self.describe()["data"], path, allow)
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


def check_same_run(
    saved: Mapping[str, Any], parts: Parts, data: Mapping[str, Any], path: Path, allow: Sequence[str] = ()
) -> None:
    """Raise CheckpointError if the checkpoint's configuration or data differ in what the weights depend on.

    ``data`` is the manifest of the run's. Differences in what ``allow`` names, entries or whole sections, are none.
    """
    before: Configuration = resolve(saved["configuration"])
    constant = parts.configuration.optim.schedule == "constant"  # only then is a longer run the same so far
    free = (*FREE, "train.steps") if constant else tuple(FREE)
    changed = [line for line in differences(before, parts.configuration) if not line.startswith(free)]
    old, new = before.train, parts.configuration.train
    if parts.objective.mixes_samples and _cut(old) != _cut(new):
        changed.append(
            f"train.micro_batch: {old.micro_batch} on {old.devices * old.num_nodes} devices -> {new.micro_batch} on "
            f"{new.devices * new.num_nodes}, and the objective mixes all that is taken at once"
        )
    changed += _changes("the data's", saved["data"], data)
    encoded: list[dict[str, Any]] = saved["encoders"]
    for number, (then, source) in enumerate(zip(encoded, parts.encoders, strict=False)):  # their number is configured
        changed += _changes(f"the encoders.{number}'s", then, source.manifest)
    allowed = tuple(f"{name}{end}" for name in allow for end in (":", "."))
    allowed += tuple(f"the {name}" for name in ("data", "encoders") if name in allow)
    changed = [line for line in changed if not line.startswith(allowed)]
    if changed:
        raise CheckpointError(
            f"got {path} of another configuration; give these back their values, start anew in another train.folder, "
            "or name what may differ by --allow:\n  " + "\n  ".join(changed)
        )


def _changes(whose: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """List what two manifests tell differently."""
    return [
        f"{whose} {key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _cut(train: Train) -> list[int]:
    """Return how many samples of a global batch are taken at once, in the order of the training stream."""
    workers = train.devices * train.num_nodes
    share = train.global_batch // workers
    micro = train.micro_batch or share
    return [min(micro, share - start) for start in range(0, share, micro)] * workers


def load_weights(state: State, path: Path) -> None:
    """Start from weights: a safetensors file in our layout, or the averaged weights of a checkpoint or a run.

    Raises:
        CheckpointError: nothing there, damaged, or of another network.
    """
    if path.suffix == ".safetensors" and path.is_file():
        weights: Mapping[str, Tensor] = read_weights(path)
    else:
        checkpoint = checkpoints.find(path)
        saved = checkpoints.read_state(checkpoint)
        weights = checkpoints.read_group(checkpoint, resolve(saved["configuration"]).ema.names[0])
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
